"""Per-layer sparsity or bits at a fixed global target.

    uniform   the same in every layer
    owl       blocks with more outliers keep more (OWL, arXiv 2310.05175): D is the share of
              |W| ||x|| above five times its mean over a block, and a block keeps
              r - mean(r) + 1 - S with r = 0.16 minmax(D)
    error     layers that lose more of their output keep more: the same with r = 0.14 minmax(E),
              E = ||(W - W') X||^2 / ||W X||^2, where W' prunes the lowest |W| ||x|| of every row
              at half the sparsity; ours, after LSA's use of that error
    kl        distributes bits: more where rounding moves the predictions further (`rates.py`)

Means are over weights, so that the total is right when blocks differ in size. `owl` and `error`
add one pass of the dense model over the calibration set. Sparsities from a file change by at most
a few rounding steps, to make the count exact; bits from a file do not change.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import InputError, SolverError, nearest
from calmix.files import user_path
from calmix.models.blocks import DecoderBlocks, Prunable, find_blocks
from calmix.models.opening import OpenModel
from calmix.options import METHOD
from calmix.precision import widest
from calmix.pruning.engine import Run, check_ids, check_names, run_through
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import Look, Method, get_method
from calmix.pruning.patterns import Pattern, Rate, Unstructured, as_pattern, clear
from calmix.pruning.rates import rates_by_kl
from calmix.yaml_files import read_yaml

OUTLIER = 5.0  # times the mean
KL = "kl"
SPREAD = {"owl": 0.16, "error": 0.14}  # difference between highest and lowest sparsity
MEASURED = KL, *SPREAD  # allocations that look at the dense model
TOLERANCE = 5e-4  # allowed distance of a file's mean from the target: its numbers are rounded
STEPS = 2  # rounding steps a layer may move, in either direction
STATES = 4096  # totals kept while steps are chosen


def read_allocation(
    asked: str | os.PathLike[str] | Mapping[str, float] | None, target: Pattern
) -> str | dict[str, float] | None:
    """Return `owl`, `error` or `kl`, or sparsities or bits by layer; None for uniform."""
    if asked is None or asked == "uniform":
        return None
    if not isinstance(target, Unstructured | Rate):
        raise InputError(
            "--allocation has no effect with an N:M pattern, which is the same in every layer: "
            "give --sparsity"
        )
    where, bits = "the allocation", isinstance(target, Rate)
    if not isinstance(asked, Mapping):
        if bits != (asked == KL) and asked in MEASURED:
            what, other = ("a sparsity", "kl") if bits else ("bits", "owl or error")
            raise InputError(f"--allocation {asked} distributes {what}: choose {other}, or a file")
        if asked in MEASURED:
            return str(asked)
        path = user_path(str(asked))
        if not path.suffix and not path.exists():
            known = ["uniform", *MEASURED]
            raise InputError(
                f"unknown allocation '{asked}': {nearest(str(asked), known)} (or name a file)"
            )
        asked, where = read_yaml(path), str(path)
    for name, share in asked.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        least, most, what = (0.1, 8, "bits") if bits else (0, 1, "sparsity")
        if not (number and (least <= share <= most if bits else least < share < most)):
            raise InputError(
                f"{where}: the {what} of {name} is {share}, not a number between {least} and "
                f"{most}; an allocation maps layers, named as in calmix.json, to {what}"
            )
    return {str(name): float(share) for name, share in asked.items()}


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


def output_error(weight: Tensor, gram: Tensor, sparsity: float) -> float:
    """Return tr(D G D^T) / tr(W G W^T), the output energy lost when each row's lowest go.

    Args:
        weight: (rows, columns).
        gram: float32 (columns, columns), sum of x x^T.
        sparsity: fraction pruned of every row.
    """
    mask = Unstructured(sparsity).mask(_metric(weight, gram.diagonal()), by_row=True)
    return relative_error(weight, clear(weight.clone(), mask), gram)


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


def exact(
    shares: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float,
    method: Method,
) -> dict[str, Unstructured]:
    """Return patterns by layer that together prune exactly as many weights as `sparsity` would.

    Rounding in comparison groups makes counts move in steps. As few layers as possible are moved,
    the largest first.

    Args:
        shares: sparsity by layer, with mean `sparsity` over the weights.
        shapes: (rows, columns) by layer.
        sparsity: fraction pruned overall.
        method: defines the comparison groups.
    """

    def count(name: str, share: float) -> int:
        return method.count(Unstructured(share), *shapes[name])

    surplus = sum(count(name, share) - count(name, sparsity) for name, share in shares.items())
    reached: dict[int, dict[str, float]] = {surplus: {}}
    for name in sorted(shares, key=lambda name: -shapes[name][0] * shapes[name][1]):
        if 0 in reached:
            break
        before, sizes = count(name, shares[name]), [n for _, n in method.groups(*shapes[name])]
        steps = [(count(name, near) - before, near) for near in _near(shares[name], sizes)]
        grown = dict(reached)
        for total, moves in reached.items():
            for step, near in steps:
                grown.setdefault(total + step, moves | {name: near})
        reached = dict(sorted(grown.items(), key=lambda item: abs(item[0]))[:STATES])
    if 0 not in reached:
        raise InputError(
            "no sparsities near those of the allocation prune exactly as many weights as "
            f"{sparsity:g} everywhere: change the allocation"
        )
    return {name: Unstructured(share) for name, share in ({**shares} | reached[0]).items()}


def _near(share: float, sizes: Sequence[int]) -> Iterator[float]:
    """Yield the shares that are some rounding steps away, the nearest first."""
    ends = {
        (round(share * size) + step + 0.5) / size
        for size in sizes
        for step in range(-STEPS - 1, STEPS + 1)
    }
    below = [share, *sorted((end for end in ends if end < share), reverse=True)]
    above = [share, *sorted(end for end in ends if end > share)]
    for at in range(1, STEPS + 1):
        for side in (below, above):
            middle = sum(side[at : at + 2]) / 2
            if len(side) > at + 1 and 0 < middle < 1:
                yield middle


def from_shares(
    shares: Mapping[str, float], blocks: DecoderBlocks, target: Pattern, method: Method
) -> dict[str, Pattern]:
    """Return patterns from a user's sparsities, made exact, or bits by layer."""
    shapes = {layer.name: layer.shape for layer in blocks.layers}
    check_names(list(shapes), shares, "allocation")
    bits = isinstance(target, Rate)
    wanted = target.bits if isinstance(target, Rate) else target.sparsity
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    mean = sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
    if abs(mean - wanted) > TOLERANCE:
        what = f"{mean:.4f} bits" if bits else f"a sparsity of {mean:.4f}"
        raise InputError(
            f"the allocation averages {what} over all weights, not the {wanted:g} requested"
        )
    if bits:
        return {name: Rate(shares[name]) for name in shapes}
    moved = wanted - mean if abs(mean - wanted) > 1e-12 else 0.0
    level = {name: min(max(shares[name] + moved, 1e-6), 1 - 1e-6) for name in shapes}
    return dict(exact(level, shapes, wanted, method))


class DensePass(Run):
    """A pass that measures the importance of the dense model's layers, and changes nothing.

    Args:
        by: `owl` or `error`.
        sparsities: overall targets; the error is measured at half of each.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: DecoderBlocks,
        by: str,
        sparsities: Sequence[float],
    ) -> None:
        super().__init__(model, blocks, Look(gram=by == "error"))
        self.seen, self._by = self._measure, by
        self._squares: dict[str, Tensor] = {}
        self.importance: dict[float, dict[str, float]] = {share: {} for share in sparsities}

    def _measure(self, layers: list[Prunable], statistic: Tensor) -> None:
        for layer in layers:
            if self._by == "owl":
                self._squares[layer.name] = statistic
                continue
            for share, importance in self.importance.items():
                importance[layer.name] = error = output_error(layer.view(), statistic, share / 2)
                if not math.isfinite(error):
                    raise SolverError(f"{layer.name}: its weights or inputs are not finite")

    def block(self, index: int) -> None:
        super().block(index)
        # None for `error`, and in a block whose layers are all skipped.
        if layers := [one for one in self.blocks.prunables(index) if one.name in self._squares]:
            squares = [self._squares.pop(layer.name) for layer in layers]
            share = outlier_share([layer.view() for layer in layers], squares)
            for importance in self.importance.values():
                importance.update((layer.name, share) for layer in layers)

    def patterns(self, sparsity: float, method: Method) -> dict[str, Unstructured]:
        """Return exact patterns by layer, once all blocks are done."""
        importance = self.importance[sparsity]
        shapes = {one.name: one.shape for one in self.blocks.layers if one.name in importance}
        sizes = [rows * columns for rows, columns in shapes.values()]
        values = [importance[name] for name in shapes]
        shares = spread(values, sizes, sparsity, SPREAD[self._by])
        return exact(dict(zip(shapes, shares, strict=True)), shapes, sparsity, method)


def allocate(
    model: nn.Module | OpenModel,
    ids: Tensor | CalibrationSet,
    target: Pattern | str | float,
    by: str = "owl",
    *,
    method: str | Method = METHOD,
    micro_tokens: int | None = None,
) -> dict[str, Pattern]:
    """Return a pattern for every layer of a model in memory, for `calmix.prune`.

    Args:
        model, ids, micro_tokens: as for `calmix.prune`; `kl` does not use micro_tokens.
        target: fraction pruned of all weights; for `kl` bits a weight, such as `2.6 bits`.
        by: `owl`, `error` or `kl`.
        method: the pruning method; its comparison groups determine the rounding.

    Raises:
        InputError: no such allocation or method, or no room for it.
        ModelError, SolverError: as `calmix.prune`.
    """
    if by not in MEASURED:
        raise InputError(f"unknown allocation '{by}': {nearest(by, MEASURED)}")
    net: nn.Module = model.model if isinstance(model, OpenModel) else model
    rows = ids.ids if isinstance(ids, CalibrationSet) else ids
    target, found = as_pattern(target), find_blocks(net)
    read_allocation(by, target)
    if isinstance(target, Rate):
        return dict(rates_by_kl(net, found, check_ids(rows, f"allocation {by}"), [target])[target])
    dense = DensePass(net, found, by, [target.sparsity])
    run_through(dense, rows, micro_tokens)
    made: dict[str, Pattern] = {layer.name: target for layer in found.layers}  # some stay dense
    return made | dense.patterns(target.sparsity, get_method(method))
