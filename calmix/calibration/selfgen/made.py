"""What a method of self-generation gives back: full rows, their tags, and how they came about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calmix.calibration.selfgen.writing import Request, Written

ROUNDS = 8  # of writing anew in place of text that cannot be used
ANOTHER = 1_000_003  # between the seeds of two rounds
Write = Callable[[Request, str], Written]  # a request, and what to call the work meanwhile


@dataclass(frozen=True)
class Made:
    """Rows of token ids, int64 (rows, length), with one tag each, and the record of the making."""

    ids: Tensor
    tags: tuple[str, ...]
    record: dict[str, Any]
