"""Calibration sets: full rows of token ids drawn from one source or a weighted mix."""

from calmix.calibration.build import build
from calmix.calibration.mix import Mix, parse_mix, rows_per_source
from calmix.calibration.set import CalibrationSet

__all__ = ["CalibrationSet", "Mix", "build", "parse_mix", "rows_per_source"]
