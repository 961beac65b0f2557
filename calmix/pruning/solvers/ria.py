"""Relative importance and activations (Zhang et al., ICLR 2024): a saliency as cheap as Wanda's.

"Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models". A weight
counts by its share of its input's and of its output's weights, so that no input or output is
pruned whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calmix.pruning.patterns import Pattern, clear, layer_mask

POWER = 0.5


def saliency(weight: Tensor, squares: Tensor, *, power: float = POWER) -> Tensor:
    """Return (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||x_j||^power, float32, same shape.

    Args:
        weight: (rows, columns) of any float type.
        squares: float32 (columns,), sum of squares of each input over the calibration tokens.
        power: of the norm of the inputs (the paper's a, 0.5).
    """
    size = weight.abs().float()
    least = 1e-38  # an input or output without weights has none to divide
    share = size / size.sum(0).clamp(min=least)
    return share.add_(size.div_(size.sum(1, keepdim=True).clamp(min=least))).mul_(
        squares.pow(power / 2)
    )


def ria(
    weights: Sequence[Tensor],
    squares: Tensor,
    patterns: Sequence[Pattern],
    *,
    power: float = POWER,
) -> list[Tensor]:
    """Prune by relative importance and activations; kept weights are not changed.

    Args:
        weights: matrices (rows, columns) of any float type that share one input.
        squares: float32 (columns,), sum of squares of each input over the calibration tokens.
        patterns: of each layer: the share of the whole layer to prune, or of every group of M
            columns of a row.
        power: of the norm of the inputs.

    Returns:
        The pruned weights, in the type of those given.
    """
    return [
        clear(weight.clone(), layer_mask(saliency(weight, squares, power=power), pattern))
        for weight, pattern in zip(weights, patterns, strict=True)
    ]
