"""How good a bundle is, measured on rows that nothing was trained on."""
