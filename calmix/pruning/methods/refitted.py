"""What methods share that choose a mask: the weights it keeps may be refitted afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field
from torch import Tensor

from calmix.pruning.gram import Gram, Statistic
from calmix.pruning.methods.base import Method, Solution
from calmix.pruning.patterns import Pattern
from calmix.pruning.solvers import refit


class Refitted(Method):
    """A method whose mask may be followed by conjugate gradients on the kept weights.

    With `refit` the Gram matrix is gathered, whatever the mask alone looks at, and no layer's
    output error is larger than without.
    """

    refit: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Steps of conjugate gradients on the kept weights, after the mask.",
    )

    @abstractmethod
    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune by the method's own statistic; as `solve` otherwise."""

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune, and refit what is kept if that was asked for.

        Raises:
            SolverError: weights or inputs are not finite, or every input is zero.
        """
        if not self.refit:
            return self.choose(weights, statistic, patterns)
        assert statistic is not None
        own = statistic if self.statistic is Gram else statistic.diagonal()
        chosen = self.choose(weights, own, patterns)
        made = refit.refit(weights, chosen.weights, statistic, steps=self.refit)
        return replace(chosen, weights=made.weights, dead=made.dead)

    @property
    def needs(self) -> type[Statistic] | None:
        """The Gram matrix for a refit, else the method's own statistic."""
        return Gram if self.refit else self.statistic

    def own_memory(self, columns: int, outputs: int, widest: int) -> int:
        """Return the bytes held while the mask is chosen, the statistic among them."""
        return super().memory(columns, outputs, widest)

    def memory(self, columns: int, outputs: int, widest: int) -> int:
        """The mask's; or the Gram matrix, the pruned weights and what the refit works on."""
        own = self.own_memory(columns, outputs, widest)
        if not self.refit:
            return own
        fitting = refit.memory(outputs, columns) + 6 * columns * outputs
        return max(own, Gram.memory(columns) + fitting)
