"""Detector, re-classifier and generator: their features, training and calibration."""
