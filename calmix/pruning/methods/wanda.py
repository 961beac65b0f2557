"""Wanda (arXiv 2306.11695): weight magnitude times input norm, compared within an output row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calmix.pruning.gram import Squares
from calmix.pruning.methods.base import Solution
from calmix.pruning.methods.refitted import Refitted
from calmix.pruning.patterns import Pattern, SemiStructured, clear, grouped_mask, smallest

CACHED = 2**18  # weights worked on at a time on a CPU: larger buffers are asked of the system anew


class Wanda(Refitted):
    """Prune by |W_ij| * ||x_j||_2 (equation 1), within an output row or a group of M inputs."""

    name = "wanda"
    statistic = Squares
    paper = "arXiv 2306.11695"

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune; kept weights are not changed.

        Args:
            weights: matrices (rows, columns) of any float type that share one input.
            statistic: float32 (columns,), sum of squares of each input over the tokens.
            patterns: what share of every row, or of every group of M inputs, to prune.
        """
        assert statistic is not None
        norm = statistic.sqrt()
        pruned = [_prune(w, norm, pattern) for w, pattern in zip(weights, patterns, strict=True)]
        counts = self.counts(weights, patterns)
        return Solution(pruned, counts, dead=int((statistic == 0).sum()))

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Every row is a group."""
        return [(rows, columns)]


def _prune(weights: Tensor, norm: Tensor, pattern: Pattern) -> Tensor:
    """Return pruned weights, made as many rows at a time as a processor's cache holds."""
    made = torch.empty_like(weights)
    rows = max(1, CACHED // weights.shape[1]) if weights.device.type == "cpu" else len(weights)
    for given, pruned in zip(weights.split(rows), made.split(rows), strict=True):
        weight = given.float()
        saliency = weight.abs().mul_(norm)
        if isinstance(pattern, SemiStructured):
            mask = grouped_mask(saliency, pattern)
        else:
            mask = smallest(saliency, pattern.count(weight.shape[1]))
        pruned.copy_(clear(weight.clone() if weight is given else weight, mask))
    return made
