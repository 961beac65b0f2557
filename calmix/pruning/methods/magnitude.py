"""Magnitude pruning: the weights of smallest absolute value go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.methods.base import Solution
from calmix.pruning.methods.refitted import Refitted
from calmix.pruning.patterns import Pattern, clear, layer_mask


class Magnitude(Refitted):
    """Prune by |W|, compared within a layer (unstructured) or a group of M inputs of a row."""

    name = "magnitude"
    statistic = None
    paper = "Han et al. 2015, arXiv 1506.02626"

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune; kept weights are not changed."""
        full = [weight.float() for weight in weights]
        masks = [layer_mask(w.abs(), pattern) for w, pattern in zip(full, patterns, strict=True)]
        pruned = [clear(w.clone(), m) for w, m in zip(full, masks, strict=True)]
        return Solution(pruned, self.counts(weights, patterns))
