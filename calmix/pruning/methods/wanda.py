"""Wanda (arXiv 2306.11695): weight magnitude times input norm, compared within an output row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.gram import Squares
from calmix.pruning.methods.base import Solution
from calmix.pruning.methods.refitted import Refitted
from calmix.pruning.patterns import Pattern, SemiStructured, clear, grouped_mask, smallest


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
        pruned = []
        for given, pattern in zip(weights, patterns, strict=True):
            weight = given.float()
            saliency = weight.abs().mul_(norm)
            if isinstance(pattern, SemiStructured):
                mask = grouped_mask(saliency, pattern)
            else:
                mask = smallest(saliency, pattern.count(weight.shape[1]))
            pruned.append(clear(weight.clone() if weight is given else weight, mask))
        counts = self.counts(weights, patterns)
        return Solution(pruned, counts, [None] * len(pruned), dead=(statistic == 0).sum())

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Every row is a group."""
        return [(rows, columns)]
