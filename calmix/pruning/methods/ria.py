"""RIA: relative importance and activations, a saliency as cheap as Wanda's.

"Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models". A weight is
scored relative to its input's and its output's weights, so that no input or output is pruned
entirely.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from calmix.pruning.gram import Squares
from calmix.pruning.methods.base import Saliency

SMALLEST = 1e-38  # avoids division by zero for an all-zero row or column


class Ria(Saliency):
    """Prune by (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||x_j||^power, within a layer."""

    name, title = "ria", "RIA"
    paper = "Zhang et al., ICLR 2024"
    statistic = Squares

    power: float = Field(
        default=0.5, ge=0, allow_inf_nan=False, description="Exponent of an input's norm."
    )

    def score(self, weight: Tensor, statistic: Tensor) -> Tensor:
        size = weight.float().abs()
        share = size / size.sum(0).clamp(min=SMALLEST)
        share += size.div_(size.sum(1, keepdim=True).clamp(min=SMALLEST))
        return share.mul_(statistic.pow(self.power / 2))
