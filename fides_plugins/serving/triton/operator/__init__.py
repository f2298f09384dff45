"""An operator's tools for a protected model on Triton: watch, check, probe, reset."""
