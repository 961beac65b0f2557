"""RIA (Zhang et al., ICLR 2024): relative importance of a weight times its input's norm."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from calmix.pruning.gram import Squares
from calmix.pruning.methods.base import Solution
from calmix.pruning.methods.refitted import Refitted
from calmix.pruning.patterns import Pattern
from calmix.pruning.solvers import ria


class Ria(Refitted):
    """Prune by a weight's share of its input's and output's, times ||x_j||^power."""

    name = "ria"
    statistic = Squares
    paper = "Zhang et al., ICLR 2024"

    power: float = Field(
        default=ria.POWER, ge=0, allow_inf_nan=False, description="Exponent of an input's norm."
    )

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune; kept weights are not changed.

        Args:
            weights: matrices (rows, columns) of any float type that share one input.
            statistic: float32 (columns,), sum of squares of each input over the tokens.
            patterns: what share of every layer, or of every group of M inputs, to prune.
        """
        assert statistic is not None
        pruned = ria.ria(weights, statistic, patterns, power=self.power)
        counts = self.counts(weights, patterns)
        return Solution(pruned, counts, dead=int((statistic == 0).sum()))
