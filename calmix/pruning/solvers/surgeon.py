"""The loop of SparseGPT and GPTQ: prune or round column by column, correcting those that follow.

Both are optimal brain surgeon (arXiv 2301.00774, arXiv 2210.17323): a column is moved to its grid,
which is zero for pruned weights, and U, the factor of the inverse Gram matrix, gives the correction
of the columns that follow.

Weights are stored transposed, each input a contiguous row, because every step works on one input
of all output rows: with row-major weights the same loop is about seventy times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from calmix.precision import large_products
from calmix.pruning.gram import Factor
from calmix.pruning.patterns import Pattern, Unstructured, clear
from calmix.pruning.solvers.grids import G, Rounding

BLOCK = 128  # columns whose mask is chosen together (SparseGPT's B_s)
PANEL = 16  # columns corrected one by one before a matrix product corrects the rest


def solve_columns(
    weights: Sequence[Tensor],
    factor: Factor,
    patterns: Sequence[Pattern] | None,
    rounding: Rounding[G] | None = None,
    pruned: Sequence[int] = (),
) -> tuple[list[Tensor], list[G]]:
    """Return pruned or rounded float32 weights of layers that share one input, and their grids.

    Args:
        weights: matrices (rows, columns) of any float type.
        factor: of their input's Gram matrix.
        patterns: one per layer, all unstructured or one N:M for all; None to prune nothing more.
        rounding: grid of the kept weights; without it they are only corrected.
        pruned: number of pruned weights per layer, for the mask's bits in the grid; without
            patterns these weights are already zero and stay so.
    """
    upper = factor.upper
    columns = upper.shape[0]
    heights = [len(weight) for weight in weights]
    stacked = torch.empty(columns, sum(heights), device=upper.device)
    layers = stacked.split(heights, dim=1)
    for layer, weight in zip(layers, weights, strict=True):
        layer.copy_(weight.T)
    first = patterns[0] if patterns else Unstructured(0.5)  # any without groups
    size = -(-BLOCK // first.group) * first.group  # whole N:M groups
    # Masks are 1.0 and 0.0, not booleans: the loop multiplies by them.
    masks = torch.empty_like(stacked[:size])
    levels = masks if rounding is None else torch.empty_like(masks)
    inverses = upper.diagonal().reciprocal()[:, None]
    # Dead inputs carry nothing: their weights are pruned first.
    leverages = inverses.masked_fill(factor.dead[:, None], 0)
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        leverage = leverages[start:stop]
        mask = masks[: stop - start].zero_()
        for i, part in enumerate(mask.split(heights, dim=1)):
            if pruned and not patterns:
                part.copy_(weights[i][:, start:stop].T == 0)
            elif patterns and first.group == 1:
                part.copy_(patterns[i].mask((layers[i][start:stop] * leverage).abs_()))
        if rounding is not None:
            rounding.begin(start, stacked, mask, leverages, bool(pruned or patterns))
        prune_block(
            stacked[start:],
            mask,
            upper[start:stop, start:],
            inverses[start:stop],
            leverage,
            first,
            rounding,
            levels[: stop - start],
        )
        if rounding is None:
            clear(stacked[start:stop], mask)
    solved = [layer.T for layer in layers]
    if rounding is None:
        return solved, []
    return solved, rounding.grids(solved, pruned or [0] * len(solved))


def prune_block(
    columns: Tensor,
    mask: Tensor,
    upper: Tensor,
    inverse: Tensor,
    leverage: Tensor,
    pattern: Pattern,
    rounding: Rounding[Any] | None,
    levels: Tensor,
) -> None:
    """Prune one block of columns in place, and correct those behind it.

    `columns` are those of the block and all behind it, (columns, rows of all layers); `upper` has
    the block's rows of U for them. `mask` is given (unstructured) or filled group by group from the
    corrected weights times `leverage` (N:M). A column is corrected by all earlier ones in its group
    at once, just before it is pruned. The caller clears pruned entries: no later step reads them.
    `levels` is a buffer for the rounding.
    """
    semi, size = pattern.group > 1, len(mask)
    weights, behind, across = columns[:size], columns[size:], upper[:, size:]
    panel = -(-PANEL // pattern.group) * pattern.group
    width = pattern.group if semi else panel
    errors = torch.empty_like(weights) if rounding is None else weights
    starts, reaching, done = {*range(0, size, panel)}, 0, 0
    # Views are created once: creating one takes as long as a step's arithmetic.
    before, column, upper = errors.T, weights.unbind(), upper[:, :size]
    if rounding is None:
        turned, wrong = upper.T.contiguous().unbind(), errors.unbind()
    else:  # errors overwrite the weights and are scaled at the end
        upper = (upper * inverse).triu_(1)
        factors, rows = upper.T.contiguous(), list(zip(column, levels, mask, strict=True))
        chosen = [at - at % pattern.group for at in rounding.starts(size)]
        starts |= {*chosen}
        if chosen and chosen[-1] + rounding.group > size:
            reaching = chosen[-1]  # a group that ends behind the block
    for start, stop in pairwise([*sorted(starts), size]):
        if start and start == reaching:
            scaled = weights[:start] * inverse[:start]
            behind.addmm_(across[:start].T, scaled, alpha=-1)
            done = start
        for group in range(start, stop, width):
            last = min(group + width, stop)
            if group > start:
                seen = upper[start:group, group:last].T
                weights[group:last].addmm_(seen, errors[start:group], alpha=-1)
            if semi:
                score = (weights[group:last] * leverage[group:last]).abs_()
                mask[group:last] = pattern.group_mask(score)
            if rounding is not None:  # columns that are not errors yet are multiplied by zero
                earlier, parts = before[:, group:last], factors[group:last, group:last].unbind()
                for j, part in enumerate(parts, start=group):
                    if j > group:
                        column[j].addmv_(earlier, part, alpha=-1)
                    rounding.step(j, *rows[j])
                continue
            torch.mul(mask[group:last], inverse[group:last], out=errors[group:last])
            for j in range(group, last):
                if j > group:
                    seen = turned[j].narrow(0, group, j - group)
                    column[j].addmv_(before.narrow(1, group, j - group), seen, alpha=-1)
                wrong[j].mul_(column[j])
        if stop < size:
            weights[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    if rounding is not None:
        errors = torch.mul(weights, inverse, out=mask)  # no longer needed
        rounding.finish(weights, levels)
        weights.add_(0.0)  # no -0.0
    with large_products():
        behind.addmm_(across[done:].T, errors[done:], alpha=-1)
