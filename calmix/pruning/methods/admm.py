"""ADMM: mask and weights together, by alternating directions, then a refit (solvers/admm.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from calmix.pruning.gram import Gram
from calmix.pruning.methods.base import Method, Solution
from calmix.pruning.patterns import Pattern
from calmix.pruning.solvers import admm


class Admm(Method):
    """Prune by alternating directions on the Gram matrix, and refit the kept weights."""

    name = "admm"
    statistic = Gram
    paper = "arXiv 2401.02938, arXiv 2406.07831"

    iterations: int = Field(
        default=admm.ITERATIONS, ge=1, le=1000, description="Products that look for the mask."
    )
    refit: int = Field(
        default=admm.REFIT,
        ge=0,
        le=1000,
        description="Steps of conjugate gradients on the kept weights, after the mask.",
    )
    rho: float = Field(
        default=admm.RHO, gt=0, allow_inf_nan=False, description="Penalty on leaving the mask."
    )
    damping: float = Field(
        default=admm.DAMPING,
        gt=0,
        allow_inf_nan=False,
        description="Share of what every input has of its own, added to its square sum.",
    )

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune and refit.

        Args:
            weights: matrices (rows, columns) of any float type that share one input.
            statistic: the Gram matrix, float32 (columns, columns), sum of x x^T over the tokens.
            patterns: share of every layer, or of every group of M columns of a row, to prune.

        Raises:
            SolverError: the Gram matrix cannot be factorised, or weights are not finite.
        """
        assert statistic is not None
        made = admm.admm(
            weights,
            statistic,
            patterns,
            iterations=self.iterations,
            rho=self.rho,
            damping=self.damping,
            steps=self.refit,
        )
        return Solution(
            made.weights,
            self.counts(weights, patterns),
            damping=made.damping,
            dtype=torch.float32,
            dead=made.dead,
        )

    def memory(self, columns: int, outputs: int, widest: int) -> int:
        """The Gram matrix, the pruned weights, and what the solver works on."""
        held = Gram.memory(columns) + 2 * columns * outputs
        return held + admm.memory(outputs, columns, widest)
