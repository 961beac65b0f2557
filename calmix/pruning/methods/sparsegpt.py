"""SparseGPT (arXiv 2301.00774): prune column by column, correcting the columns that follow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.gram import Gram, inverse_factor
from calmix.pruning.methods.base import DAMPING, Damping, Refitted, Solution
from calmix.pruning.patterns import Pattern
from calmix.pruning.solvers.grids import Grid, Symmetric
from calmix.pruning.solvers.surgeon import BLOCK, solve_columns


class SparseGPT(Refitted):
    """Prune with optimal brain surgeon updates (algorithm 1 of the paper).

    Saliencies are compared as |w| / U_jj, which orders as the paper's w^2 / U_jj^2 does, within
    128 columns of a layer. Equal ones are pruned in order of column, row. With `bits` kept weights
    are rounded in the same loop (the paper's joint sparsification and quantisation).
    """

    name, title = "sparsegpt", "SparseGPT"
    paper = "arXiv 2301.00774"
    statistic = Gram
    work = 7, 8  # the factor and what makes it; the weights transposed, and a block's masks

    damping: Damping = DAMPING

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune and correct the weights that are kept."""
        assert statistic is not None
        factor = inverse_factor(statistic, self.damping)
        # Layers with shares are solved at once; those with N:M only with their like.
        kinds = [pattern if pattern.group > 1 else None for pattern in patterns]
        counts = self.counts(weights, patterns)
        made: dict[int, Tensor] = {}
        grids: dict[int, Grid] = {}
        for kind in dict.fromkeys(kinds):
            places = [i for i, own in enumerate(kinds) if own == kind]
            own = [weights[i] for i in places]
            rounding = None
            if self.bits and not self.refit:  # a refit would leave the grid
                rounding = Symmetric(own, self.group, self.bits)
            solved = solve_columns(own, factor, [patterns[i] for i in places], rounding)
            made |= dict(zip(places, solved, strict=True))
            if rounding is not None:
                found = self.grids(rounding, solved, [counts[i] for i in places])
                grids |= dict(zip(places, found, strict=True))
        order, dead = range(len(weights)), int(factor.dead.sum())
        return Solution(
            [made[i] for i in order], counts, [], factor.damping, factor.dtype, dead,
            [grids[i] for i in order if grids],
        )  # fmt: skip

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Every 128 columns are a group, and what is left of them."""
        found = [(columns // BLOCK, rows * BLOCK), (1, rows * (columns % BLOCK))]
        return [(number, size) for number, size in found if number * size]
