"""Calibration text the model writes itself: the generators over one way of writing."""
