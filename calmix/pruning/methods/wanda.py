"""Wanda (arXiv 2306.11695): weight magnitude times input norm, compared within an output row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.methods.magnitude import grouped_mask
from calmix.pruning.methods.solution import Solution
from calmix.pruning.patterns import Pattern, SemiStructured, clear, smallest


def solve(weights: Sequence[Tensor], squares: Tensor, pattern: Pattern) -> Solution:
    """Prune by |W_ij| * ||x_j||_2 (equation 1); kept weights are not changed.

    Args:
        weights: matrices (rows, columns) of any float type that share one input.
        squares: float32 (columns,), sum of squares of each input over the calibration tokens.
        pattern: what share of every row, or of every group of M inputs, to prune.
    """
    norm = squares.sqrt()
    pruned, counts = [], []
    for given in weights:
        weight = given.float()
        saliency = weight.abs().mul_(norm)
        if isinstance(pattern, SemiStructured):
            mask = grouped_mask(saliency, pattern)
        else:
            mask = smallest(saliency, pattern.count(weight.shape[1]))
        pruned.append(clear(weight.clone() if weight is given else weight, mask))
        counts.append(int(mask.count_nonzero()))
    dead = int((squares == 0).sum())
    return Solution(pruned, counts, [None] * len(pruned), dead=dead)
