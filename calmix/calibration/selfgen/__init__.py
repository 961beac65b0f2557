"""Calibration text that the model writes itself."""
