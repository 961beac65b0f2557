"""SparseGPT (arXiv 2301.00774): prune column by column, correcting the columns that follow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.gram import Gram, inverse_factor
from calmix.pruning.methods.base import DAMPING, Damping, Solution, Sparse
from calmix.pruning.patterns import Pattern
from calmix.pruning.solvers.grids import Symmetric
from calmix.pruning.solvers.surgeon import BLOCK, solve_columns


class SparseGPT(Sparse):
    """Prune with optimal brain surgeon updates (algorithm 1 of the paper).

    Saliencies |w| / U_jj, in the same order as the paper's w^2 / U_jj^2, are compared within 128
    columns of a layer. Ties are pruned in order of column, then row. With `bits`, kept weights are
    rounded in the same loop (the paper's joint sparsification and quantisation).
    """

    name, title = "sparsegpt", "SparseGPT"
    paper = "arXiv 2301.00774"
    statistic = Gram
    work = 7, 8  # factorisation; transposed weights and a block's masks

    damping: Damping = DAMPING

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune, and correct the kept weights."""
        factor = inverse_factor(statistic, self.damping)
        counts, rounding = self.counts(weights, patterns), None
        if self.bits and not self.refit:  # a refit would leave the grid
            rounding = Symmetric(weights, self.group, self.bits)
        solved, grids = solve_columns(weights, factor, patterns, rounding, counts)
        dead = int(factor.dead.sum())
        return Solution(solved, counts, factor.damping, factor.dtype, dead, grids)

    @property
    def rounding_damping(self) -> float:
        return self.damping

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return one group per 128 columns, and one for the remainder."""
        groups = [(columns // BLOCK, rows * BLOCK), (1, rows * (columns % BLOCK))]
        return [(number, size) for number, size in groups if number * size]
