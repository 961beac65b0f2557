"""Calibration sets: full rows of token ids from one source or a weighted mix."""

from calmix.calibration.build import build as build
from calmix.calibration.build import mix_text as mix_text
from calmix.calibration.build import parse_mix as parse_mix
from calmix.calibration.dataset import CalibrationSet as CalibrationSet
from calmix.calibration.dataset import saved_set as saved_set
from calmix.calibration.resolving import parse_calibration as parse_calibration
from calmix.calibration.resolving import resolve as resolve
from calmix.calibration.tokenizer import OpenTokenizer as OpenTokenizer
from calmix.calibration.tokenizer import open_tokenizer as open_tokenizer
