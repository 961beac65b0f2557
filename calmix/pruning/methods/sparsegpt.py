"""SparseGPT (arXiv 2301.00774): prune column by column, correcting the columns that follow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.gram import Gram, inverse_factor
from calmix.pruning.methods.base import DAMPING, Damping, Solution, Sparse, by_kind
from calmix.pruning.patterns import Pattern
from calmix.pruning.solvers.grids import Grid, Symmetric
from calmix.pruning.solvers.surgeon import BLOCK, solve_columns


class SparseGPT(Sparse):
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
        counts = self.counts(weights, patterns)

        def solved(places: list[int]) -> list[tuple[Tensor, Grid | None]]:
            own = [weights[place] for place in places]
            wanted = [patterns[place] for place in places]
            if not self.bits or self.refit:  # a refit would leave the grid
                made = solve_columns(own, factor, wanted)
                return [(weight, None) for weight in made]
            rounding = Symmetric(own, self.group, self.bits)
            made = solve_columns(own, factor, wanted, rounding)
            grids = rounding.grids(made, [counts[place] for place in places])
            return list(zip(made, grids, strict=True))

        # Layers with shares are solved at once; those with N:M only with their like.
        kinds = [pattern if pattern.group > 1 else None for pattern in patterns]
        made, grids = zip(*by_kind(kinds, solved), strict=True)
        dead = int(factor.dead.sum())
        return Solution(
            list(made), counts, [], factor.damping, factor.dtype, dead,
            [grid for grid in grids if grid is not None],
        )  # fmt: skip

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Every 128 columns are a group, and what is left of them."""
        found = [(columns // BLOCK, rows * BLOCK), (1, rows * (columns % BLOCK))]
        return [(number, size) for number, size in found if number * size]
