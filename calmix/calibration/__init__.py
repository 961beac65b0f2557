"""Calibration sets: full rows of token ids drawn from one source or a weighted mix."""

from calmix.calibration.build import build
from calmix.calibration.mix import Mix, parse_mix, rows_per_source
from calmix.calibration.resolving import parse_spec, resolve
from calmix.calibration.set import CalibrationSet
from calmix.calibration.tokenizer import OpenTokenizer, open_tokenizer

__all__ = [
    "CalibrationSet",
    "Mix",
    "OpenTokenizer",
    "build",
    "open_tokenizer",
    "parse_mix",
    "parse_spec",
    "resolve",
    "rows_per_source",
]
