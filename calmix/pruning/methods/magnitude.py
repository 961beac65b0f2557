"""Magnitude pruning: the weights of smallest absolute value go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.methods.base import Method, Solution
from calmix.pruning.patterns import Pattern, SemiStructured, clear, smallest, smallest_of_m


class Magnitude(Method):
    """Prune by |W|, compared within a layer (unstructured) or a group of M inputs of a row."""

    name = "magnitude"
    statistic = None
    paper = "Han et al. 2015, arXiv 1506.02626"

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune; kept weights are not changed."""
        full = [weight.float() for weight in weights]
        masks = [mask(w.abs(), pattern) for w, pattern in zip(full, patterns, strict=True)]
        pruned = [clear(w.clone(), m) for w, m in zip(full, masks, strict=True)]
        return Solution(pruned, [int(m.count_nonzero()) for m in masks], [None] * len(masks))


def mask(saliency: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask (rows, columns) with the whole matrix as one comparison group."""
    if isinstance(pattern, SemiStructured):
        return grouped_mask(saliency, pattern)
    flat = saliency.reshape(1, -1)
    return smallest(flat, pattern.count(flat.shape[1])).view(saliency.shape)


def grouped_mask(saliency: Tensor, pattern: SemiStructured) -> Tensor:
    """Return the N:M mask (rows, columns) of a saliency matrix."""
    rows, columns = saliency.shape
    groups = saliency.view(rows, columns // pattern.m, pattern.m).permute(2, 0, 1).contiguous()
    marked = smallest_of_m(groups, pattern.m - pattern.n)
    return marked.permute(1, 2, 0).reshape(rows, columns)
