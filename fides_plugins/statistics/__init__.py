"""Figures that decide: conformal p-values, divergences, intervals, and the sequence test behind the service alarm."""
