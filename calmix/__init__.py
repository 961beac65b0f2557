"""Prune language models with mixed calibration sets, and see which abilities survive."""
