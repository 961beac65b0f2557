"""Wanda: weight magnitude times input norm, compared within an output row."""

from __future__ import annotations

from torch import Tensor

from calmix.pruning.gram import Squares
from calmix.pruning.methods.base import Saliency


class Wanda(Saliency):
    """Prune by |W_ij| * ||x_j||_2 (equation 1), within an output row or a group of M inputs."""

    name, title = "wanda", "Wanda"
    paper = "arXiv 2306.11695"
    statistic = Squares
    by_row = True

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        return weight.float().abs().mul_(statistic.sqrt())
