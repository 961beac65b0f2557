"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """Pruned weights of layers that share one input.

    Attributes:
        weights: float32 matrices (rows, columns), which may be transposed views; pruned entries
            are exactly zero.
        pruned: number of entries each layer's mask removes.
        errors: share of each layer's output energy that is lost on the calibration tokens,
            ||(W - W') X||^2 / ||W X||^2; None where the method has no Gram matrix.
        damping: damping that was used, None if the method has none.
        dtype: precision of the factorisation, None if there is none.
        dead: inputs that were zero on every token.
    """

    weights: list[Tensor]
    pruned: list[int]
    errors: list[float | None]
    damping: float | None = None
    dtype: torch.dtype | None = None
    dead: int = 0
