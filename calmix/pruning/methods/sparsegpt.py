"""SparseGPT (arXiv 2301.00774): prune column by column, correcting the columns that follow.

Weights are held transposed, one input a contiguous row, because every step works on one input
of all output rows: with row-major weights the same loop is some seventy times slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from calmix.precision import large_products
from calmix.pruning.gram import Factor, Gram, inverse_factor
from calmix.pruning.methods.base import Refitted, Solution
from calmix.pruning.patterns import Pattern, SemiStructured, Unstructured, clear
from calmix.pruning.solvers import columns as fused

BLOCK = 128  # columns that choose their mask together (the paper's B_s)
PANEL = 16  # columns corrected one by one before a matrix product corrects the others
AT_ONCE = 32  # on an accelerator: columns whose errors one call solves for, half as many calls


class SparseGPT(Refitted):
    """Prune with optimal brain surgeon updates (algorithm 1 of the paper).

    Saliencies are compared as |w| / U_jj, which orders as the paper's w^2 / U_jj^2 does, within
    128 columns of a layer. Equal ones are pruned in order of column, row.
    """

    name, title = "sparsegpt", "SparseGPT"
    paper = "arXiv 2301.00774"
    statistic = Gram
    work = 7, 8  # the factor and what makes it; the weights transposed, and a block's masks

    damping: float = Field(
        default=0.01,
        gt=0,
        allow_inf_nan=False,
        description="Share of the mean diagonal of the Gram matrix added to its diagonal.",
    )

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune and correct the weights that are kept."""
        assert statistic is not None
        factor = inverse_factor(statistic, self.damping)
        # Layers with shares are solved at once; those with N:M only with their like.
        kinds = [pattern if pattern.group > 1 else None for pattern in patterns]
        made: dict[int, tuple[Tensor, int]] = {}
        for kind in dict.fromkeys(kinds):
            places = [i for i, own in enumerate(kinds) if own == kind]
            solved = _solve([weights[i] for i in places], factor, [patterns[i] for i in places])
            made |= dict(zip(places, solved, strict=True))
        weight, pruned = zip(*(made[i] for i in range(len(weights))), strict=True)
        dead = int(factor.dead.sum())
        return Solution(list(weight), list(pruned), [], factor.damping, factor.dtype, dead)

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Every 128 columns are a group, and what is left of them."""
        found = [(columns // BLOCK, rows * BLOCK), (1, rows * (columns % BLOCK))]
        return [(number, size) for number, size in found if number * size]


def _solve(
    weights: Sequence[Tensor], factor: Factor, patterns: Sequence[Pattern]
) -> list[tuple[Tensor, int]]:
    """Return pruned weights and entries pruned of layers: shares, or one N:M."""
    upper = factor.upper
    columns = upper.shape[0]
    heights = [len(weight) for weight in weights]
    stacked = torch.empty(columns, sum(heights), device=upper.device)
    layers = stacked.split(heights, dim=1)
    for layer, weight in zip(layers, weights, strict=True):
        layer.copy_(weight.T)
    pruned = [0] * len(heights)
    block = _multiple(BLOCK, patterns[0])
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        inverse = upper.diagonal()[start:stop].reciprocal()[:, None]
        # Inputs that never fired carry nothing: their weights are the first to go.
        leverage = inverse.masked_fill(factor.dead[start:stop, None], 0)
        # Masks are 1.0 and 0.0, not booleans: the loop multiplies by them.
        mask = torch.empty_like(stacked[start:stop])
        parts = mask.split(heights, dim=1)
        for layer, part, pattern in zip(layers, parts, patterns, strict=True):
            if pattern.group == 1:
                part.copy_(pattern.mask((layer[start:stop] * leverage).abs_()))
        local = upper[start:stop, start:stop]
        errors = _block(stacked[start:stop], mask, local, inverse, leverage, patterns[0])
        clear(stacked[start:stop], mask)
        with large_products():
            stacked[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        for number, (height, pattern) in enumerate(zip(heights, patterns, strict=True)):
            pruned[number] += pattern.count((stop - start) * height)
    return list(zip([layer.T for layer in layers], pruned, strict=True))


def _block(
    weights: Tensor,
    mask: Tensor,
    upper: Tensor,
    inverse: Tensor,
    leverage: Tensor,
    pattern: Pattern,
    *,
    at_once: bool | None = None,
) -> Tensor:
    """Prune one block in place and return its scaled errors (w_pruned / U_jj), same shape.

    `weights` is (columns of the block, rows of all layers). `mask` is given (unstructured) or
    filled group by group from the corrected weights times `leverage` (N:M). A column is
    corrected by all before it in its group at once, just before it is pruned. Pruned entries
    are left for the caller to clear: no later step reads them.

    A CPU goes column by column. An accelerator, where starting a kernel takes longer than a
    column's arithmetic, has one kernel do that, or where it is not `usable` takes many columns
    `at_once`.
    """
    semi = pattern.group > 1
    if at_once is None:
        at_once = weights.device.type != "cpu"
        m, go = (pattern.group, pattern.count(pattern.group)) if semi else (0, 0)
        at = weights.device, len(weights), m, go
        if at_once and m <= fused.LARGEST and fused.usable(*at, _kernel_agrees):
            return fused.prune_columns(weights, mask, upper, inverse, leverage, m, go)
    if at_once:
        return _block_at_once(weights, mask, upper, leverage, pattern)
    size = len(weights)
    panel = _multiple(PANEL, pattern)
    width = pattern.group if semi else panel
    errors = torch.empty_like(weights)
    # Views are made once: a step's arithmetic takes no longer than making one.
    before, across = errors.T, upper.T.contiguous().unbind()
    columns, wrong = weights.unbind(), errors.unbind()
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        for group in range(start, stop, width):
            last = min(group + width, stop)
            if group > start:
                seen = upper[start:group, group:last].T
                weights[group:last].addmm_(seen, errors[start:group], alpha=-1)
            if semi:
                score = (weights[group:last] * leverage[group:last]).abs_()
                mask[group:last] = pattern.group_mask(score)
            torch.mul(mask[group:last], inverse[group:last], out=errors[group:last])
            wrong[group].mul_(columns[group])
            for j in range(group + 1, last):
                seen = across[j].narrow(0, group, j - group)
                columns[j].addmv_(before.narrow(1, group, j - group), seen, alpha=-1)
                wrong[j].mul_(columns[j])
        if stop < size:
            weights[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors


def _block_at_once(
    weights: Tensor, mask: Tensor, upper: Tensor, leverage: Tensor, pattern: Pattern
) -> Tensor:
    """Do what `_block` does in few kernels: for all columns of which the mask is known at once."""
    size, semi = len(weights), pattern.group > 1
    width = pattern.group if semi else AT_ONCE
    panel = _multiple(AT_ONCE, pattern)
    errors = torch.empty_like(weights)
    strict, identity = upper.triu(1), torch.eye(width, device=upper.device)
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        for group in range(start, stop, width):
            last = min(group + width, stop)
            here = weights[group:last]
            if semi:
                if group > start:
                    here.addmm_(strict[start:group, group:last].T, errors[start:group], alpha=-1)
                mask[group:last] = pattern.group_mask((here * leverage[group:last]).abs_())
            own, ones = upper[group:last, group:last], identity[: last - group, : last - group]
            errors[group:last] = _errors(here, mask[group:last], own, ones)
            if semi:
                here.addmm_(strict[group:last, group:last].T, errors[group:last], alpha=-1)
        behind = stop if semi else start  # the columns of a group themselves are corrected too
        if behind < size:
            weights[behind:].addmm_(strict[start:stop, behind:].T, errors[start:stop], alpha=-1)
    return errors


def _errors(weights: Tensor, mask: Tensor, upper: Tensor, identity: Tensor) -> Tensor:
    """Return the scaled errors of a group of columns whose mask is known, all at once.

    The column's rule e_j = m_j (w_j - sum_{i<j} e_i U_ij) / U_jj is, for one output, the
    triangular system e A = m w, where A takes the columns of U that are pruned and those of the
    identity elsewhere. The systems of all outputs are solved in one call.
    """
    system = torch.where(mask.T[:, None, :] > 0, upper, identity)
    right = (weights * mask).T[:, None, :]
    return torch.linalg.solve_triangular(system, right, upper=True, left=False)[:, 0, :].T


def _kernel_agrees(device: torch.device, size: int, m: int, go: int) -> bool:
    """Tell whether the kernel does on a device what the plain way does, on an example."""
    outputs = fused.OUTPUTS + 8  # of two programs, one of which is not full
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(size, outputs, generator=generator).to(device)
    upper = torch.rand(size, size, generator=generator).triu_().to(device)
    upper.diagonal().add_(size)
    inverse = upper.diagonal().reciprocal()[:, None]
    pattern = SemiStructured(m - go, m) if m else Unstructured(0.5)
    plain, mask = given.clone(), (given > 0.5).float()
    expected = _block_at_once(plain, mask, upper, inverse, pattern)
    weights, found = given.clone(), (given > 0.5).float()
    errors = fused.prune_columns(weights, found, upper, inverse, inverse, m, go)
    pairs = ((errors, expected), (clear(weights, found), clear(plain, mask)))
    near = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
    return near and torch.equal(found, mask)


def _multiple(size: int, pattern: Pattern) -> int:
    """Round a block or panel size up to a whole number of N:M groups."""
    return -(-size // pattern.group) * pattern.group
