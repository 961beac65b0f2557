"""Calibration sets: full rows of token ids from one source or a weighted mix."""
