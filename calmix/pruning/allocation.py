"""Per-layer sparsity at a fixed global target.

    uniform   the same in every layer
    owl       blocks with more outliers keep more (OWL, arXiv 2310.05175): D is the share of
              |W| ||x|| above five times its mean over a block, and a block keeps
              r - mean(r) + 1 - S with r = 0.16 minmax(D)

Means are over weights, so that the total is right when blocks differ in size. `owl` adds one pass
of the dense model over the calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import InputError, nearest
from calmix.models.blocks import DecoderBlocks, Prunable, find_blocks
from calmix.models.opening import OpenModel
from calmix.precision import widest
from calmix.pruning.engine import Run, run_through
from calmix.pruning.methods import Look
from calmix.pruning.patterns import Pattern, Unstructured, as_pattern

OUTLIER = 5.0  # times the mean
SPREAD = 0.16  # difference between the highest and the lowest sparsity of `owl`
OWL = "owl"


def read_allocation(name: str | None, target: Pattern) -> str | None:
    """Check the name of an allocation; return None for `uniform`."""
    if name is None or name == "uniform":
        return None
    if name != OWL:
        raise InputError(f"unknown allocation '{name}': {nearest(name, ['uniform', OWL])}")
    if not isinstance(target, Unstructured):
        raise InputError(f"--allocation {OWL} distributes a sparsity: it needs --sparsity")
    return name


def outlier_share(weights: Sequence[Tensor], squares: Sequence[Tensor]) -> float:
    """Return the share of a block's |W_ij| ||x_j|| above `OUTLIER` times their mean (OWL).

    Args:
        weights: the block's matrices (rows, columns).
        squares: sum of squares of the inputs of each, (columns,).
    """
    pairs = list(zip(weights, squares, strict=True))
    size, wide = sum(weight.numel() for weight in weights), widest(squares[0].device)
    sums = [_metric(weight, square).sum(dtype=wide) for weight, square in pairs]
    bound = OUTLIER * torch.stack(sums).sum() / size
    above = [(_metric(weight, square) > bound).sum() for weight, square in pairs]
    return int(torch.stack(above).sum()) / size


def _metric(weight: Tensor, squares: Tensor) -> Tensor:
    return weight.abs().float().mul_(squares.sqrt())


def spread(
    importance: Sequence[float], sizes: Sequence[int], sparsity: float, width: float
) -> list[float]:
    """Return sparsities with mean `sparsity` over the weights: important parts keep more."""
    low, high = min(importance), max(importance)
    scale = width / (high - low) if high > low else 0.0
    moved = [scale * (value - low) for value in importance]
    mean = sum(m * size for m, size in zip(moved, sizes, strict=True)) / sum(sizes)
    shares = [sparsity + mean - value for value in moved]
    if min(shares) <= 0 or max(shares) >= 1:
        raise InputError(
            f"at sparsity {sparsity:g} there is no room for sparsities that differ by {width:g}: "
            "leave out --allocation"
        )
    return shares


class OutlierPass(Run):
    """A pass that measures the share of outliers in the dense model's blocks, and changes nothing.

    Attributes:
        importance: the share of outliers by layer, the same for all layers of a block.
    """

    def __init__(self, model: nn.Module, blocks: DecoderBlocks) -> None:
        super().__init__(model, blocks, Look())
        self.seen = self._measure
        self._squares: dict[str, Tensor] = {}
        self.importance: dict[str, float] = {}

    def _measure(self, layers: list[Prunable], statistic: Tensor) -> None:
        self._squares |= {layer.name: statistic for layer in layers}

    def block(self, index: int) -> None:
        super().block(index)
        if layers := [one for one in self.blocks.prunables(index) if one.name in self._squares]:
            squares = [self._squares.pop(layer.name) for layer in layers]
            share = outlier_share([layer.view() for layer in layers], squares)
            self.importance |= {layer.name: share for layer in layers}

    def patterns(self, sparsity: float) -> dict[str, Unstructured]:
        """Return patterns by layer, once all blocks are done."""
        sizes = {one.name: one.view().numel() for one in self.blocks.layers}
        names = [name for name in sizes if name in self.importance]
        values, weights = [self.importance[n] for n in names], [sizes[n] for n in names]
        shares = spread(values, weights, sparsity, SPREAD)
        return {name: Unstructured(share) for name, share in zip(names, shares, strict=True)}


def allocate(
    model: nn.Module | OpenModel,
    ids: Tensor | CalibrationSet,
    target: Pattern | str | float,
    by: str = OWL,
    *,
    micro_tokens: int | None = None,
) -> dict[str, Pattern]:
    """Return a pattern for every layer of a model in memory, for `calmix.prune`.

    Args:
        model, ids, micro_tokens: as for `calmix.prune`.
        target: fraction pruned of all weights.
        by: `owl`.

    Raises:
        InputError: no such allocation, or no room for it.
        ModelError, SolverError: as `calmix.prune`.
    """
    target = as_pattern(target)
    if read_allocation(by, target) is None:
        raise InputError(f"allocation '{by}' needs no look at the model: pass the target alone")
    net: nn.Module = model.model if isinstance(model, OpenModel) else model
    rows = ids.ids if isinstance(ids, CalibrationSet) else ids
    blocks = find_blocks(net)
    dense = OutlierPass(net, blocks)
    run_through(dense, rows, micro_tokens)
    uniform: dict[str, Pattern] = {layer.name: target for layer in blocks.layers}
    return uniform | dense.patterns(target.sparsity)  # layers that no input reaches stay uniform
