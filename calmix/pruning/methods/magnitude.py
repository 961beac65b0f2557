"""Magnitude pruning: remove the weights of smallest absolute value."""

from __future__ import annotations

from torch import Tensor

from calmix.pruning.methods.base import Saliency


class Magnitude(Saliency):
    """Prune by |W|, compared within a layer or a group of M inputs of a row."""

    name, title = "magnitude", "Magnitude"
    paper = "Han et al. 2015, arXiv 1506.02626"
    statistic = None

    def score(self, weight: Tensor, statistic: None) -> Tensor:
        return weight.float().abs()
