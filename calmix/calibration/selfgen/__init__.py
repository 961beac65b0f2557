"""Calibration text the model writes itself: Self-Cal, SGS and IGSP over one way of writing."""
