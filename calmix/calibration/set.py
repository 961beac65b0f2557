"""The calibration set: full rows of token ids, the source of each row, and a manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of token ids without padding.

    Attributes:
        ids: int64 token ids, shape (rows, length).
        sources: name of the source each row was drawn from, one a row.
        manifest: how the set was made: specification, seed, packing, tokenizer and documents
            by hash. JSON-serialisable.
    """

    ids: Tensor
    sources: tuple[str, ...]
    manifest: dict[str, Any]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in each row."""
        return self.ids.shape[1]

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows of each source, in order of first appearance."""
        return dict(Counter(self.sources))

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian int64, row by row."""
        raw = np.ascontiguousarray(self.ids.numpy().astype("<i8")).tobytes()
        return hashlib.sha256(raw).hexdigest()
