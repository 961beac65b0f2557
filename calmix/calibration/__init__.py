"""Calibration sets: full rows of token ids drawn from one source or a weighted mix."""

from calmix.calibration.build import build
from calmix.calibration.dataset import CalibrationSet, is_saved_set, saved_set
from calmix.calibration.resolving import Asked, ask, resolve
from calmix.calibration.spec import (
    Mix,
    make_mix,
    parse_mix,
    parse_spec,
    rows_per_source,
)
from calmix.calibration.tokenizer import OpenTokenizer, open_tokenizer

__all__ = [
    "Asked",
    "CalibrationSet",
    "Mix",
    "OpenTokenizer",
    "ask",
    "build",
    "is_saved_set",
    "make_mix",
    "open_tokenizer",
    "parse_mix",
    "parse_spec",
    "resolve",
    "rows_per_source",
    "saved_set",
]
