"""Sparsity, or a type of GGML, by layer at a fixed global target.

    uniform   the same sparsity in every layer
    owl       blocks with more outliers keep more (OWL, arXiv 2310.05175): D is the share of
              |W| ||x|| above five times its mean over a block, and a block keeps
              r - mean(r) + 1 - S with r = 0.16 minmax(D)
    loss      the types whose rounding loses least output for the size of a GGUF file

Means are over weights, so that the total is right when blocks differ in size. `owl` and `loss` add
one pass of the dense model over the calibration set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import InputError, nearest
from calmix.models.blocks import DecoderBlocks, Prunable, find_blocks, outer_layers
from calmix.models.opening import OpenModel
from calmix.precision import widest
from calmix.pruning.engine import Run, check_ids, check_pattern, costs_in_memory, run_through
from calmix.pruning.methods import Look, get_method
from calmix.pruning.patterns import Blocks, Mixed, Pattern, Rate, Recipe, Unstructured, as_pattern
from calmix.pruning.recipes import check_whole
from calmix.pruning.solvers.block_grid import fitting
from calmix.pruning.solvers.ggml import TYPES, BlockType
from calmix.pruning.solvers.libggml import quantise

OUTLIER = 5.0  # times the mean
SPREAD = 0.16  # difference between the highest and the lowest sparsity of `owl`
OWL, LOSS = "owl", "loss"
LOGIT = 2.0  # loss of a squared error of a logit, in shares of a layer's output energy
SAMPLED = 2**16  # weights of a matrix that are rounded to every type
FILLED = 0.98  # share of the requested size that a file has at least
ALIGNED = 32  # bytes that a tensor of a GGUF file is padded to


def read_allocation(name: str | None, target: Pattern) -> str | None:
    """Check the name of an allocation; return None for `uniform`."""
    if isinstance(target, Mixed) and name in (None, LOSS):
        return LOSS
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

    name: ClassVar[str] = OWL

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

    def patterns(self, target: Pattern) -> dict[str, Unstructured]:
        """Return patterns by layer, once all blocks are done."""
        sizes = {one.name: one.view().numel() for one in self.blocks.layers}
        names = [name for name in sizes if name in self.importance]
        values, weights = [self.importance[n] for n in names], [sizes[n] for n in names]
        shares = spread(values, weights, target.sparsity, SPREAD)
        return {name: Unstructured(share) for name, share in zip(names, shares, strict=True)}


def tensor_bytes(weight: Tensor, kind: str | None = None) -> int:
    """Return the bytes of a parameter in a GGUF file: in a type, else in F16, vectors in F32."""
    size = weight.numel() * (4 if weight.ndim == 1 else 2)
    if kind is not None:
        size = weight.numel() // TYPES[kind].size * TYPES[kind].bytes
    return -(-size // ALIGNED) * ALIGNED


def file_bytes(model: Any, types: Mapping[str, Pattern]) -> int:
    """Return the bytes of all tensors of a GGUF file, given the types of layers by name."""
    total, tied = 0, getattr(model, "all_tied_weights_keys", {})
    for name, weight in model.named_parameters():
        pattern, kind = types.get(name.removesuffix(".weight")), None
        if isinstance(pattern, Blocks):
            kind = fitting(pattern.type, weight.shape[-1]).name
        total += 0 if name in tied else tensor_bytes(weight, kind)
    return total


def planned_bytes(target: Pattern, model: Any, blocks: DecoderBlocks) -> int | None:
    """Return the bytes of all tensors of the GGUF file that a target asks for; None if it is none
    for whole files."""
    if isinstance(target, Mixed):
        return int(target.bits * file_weights(model) / 8)
    if isinstance(target, Recipe):
        return file_bytes(model, target.types(model, blocks))
    return None


def file_weights(model: Any) -> int:
    """Return the number of weights in a GGUF file of a model."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def _matrices(model: Any, blocks: DecoderBlocks) -> dict[str, Tensor]:
    """Return the weights that get a type, by layer name."""
    inside = {layer.name: layer.whole() for layer in blocks.layers}
    outer = outer_layers(model).items()
    return inside | {name: weight for name, weight in outer if types_for(weight.shape[1])}


def _extreme(matrices: Mapping[str, Tensor], end: int) -> dict[str, Pattern]:
    """Return the smallest type of every matrix for 0, the largest for -1."""
    return {name: Blocks(types_for(one.shape[1])[end].name) for name, one in matrices.items()}


def check_bits(bits: float, model: Any, blocks: DecoderBlocks) -> None:
    """Refuse a size of a file that no types of its matrices give."""
    check_whole(blocks, f"{bits:g} bits per weight")
    matrices, total = _matrices(model, blocks), file_weights(model)
    low, high = (8 * file_bytes(model, _extreme(matrices, end)) / total for end in (0, -1))
    if not low <= bits <= high / FILLED:
        low, high = math.ceil(100 * low) / 100, math.floor(100 * high) / 100
        raise InputError(
            f"{bits:g} bits per weight are out of reach: GGUF files of this model have {low:g} to "
            f"{high:g}"
        )


def types_for(columns: int) -> list[BlockType]:
    """Return the types whose blocks fit rows, the smallest first."""
    fit = [kind for kind in TYPES.values() if columns % kind.size == 0]
    return sorted(fit, key=lambda kind: kind.bits)


def cheapest(
    choices: Mapping[str, Sequence[tuple[int, float, str]]], budget: int
) -> dict[str, str]:
    """Return the choice of each name with about the least total loss within a budget.

    Every name starts at its smallest choice. Steps along the lower convex hull of loss against
    bytes are then taken in order of the loss they save per byte, as long as they fit.

    Args:
        choices: (bytes, loss, what is chosen) by name.
        budget: bytes of all together.
    """
    chosen, steps, left = dict[str, str](), list[tuple[float, str, int, str]](), budget
    for name, several in choices.items():
        hull = sorted(several)[:1]
        left -= hull[0][0]
        chosen[name] = hull[0][2]
        while larger := [one for one in several if one[0] > hull[-1][0] and one[1] < hull[-1][1]]:
            size, loss, _ = hull[-1]
            best = max(larger, key=lambda one: ((loss - one[1]) / (one[0] - size), one[0]))
            steps.append(((loss - best[1]) / (best[0] - size), name, best[0] - size, best[2]))
            hull.append(best)
    stopped = set[str]()
    for _, name, size, choice in sorted(steps, key=lambda step: (-step[0], step[2])):
        if name in stopped or size > left:
            stopped.add(name)
            continue
        left -= size
        chosen[name] = choice
    return chosen


class LossPass(Run):
    """A pass over the dense model that measures what each matrix loses in each type of GGML.

    The loss of the head is absolute: most of the energy of its outputs is common to all tokens of
    the vocabulary, and makes no difference to their probabilities.

    Attributes:
        losses: what rounding costs by layer and type: nats per token if tokens are weighted, else
            the share of the output energy lost, for the head `LOGIT` times the mean squared error
            of a logit.
    """

    name: ClassVar[str] = LOSS

    def __init__(self, model: nn.Module, blocks: DecoderBlocks) -> None:
        outer = outer_layers(model)
        kept = {n: Blocks("Q8_0") for n, weight in outer.items() if types_for(weight.shape[1])}
        super().__init__(model, blocks, Look(), kept)
        self.seen = self._measure
        self.losses: dict[str, dict[str, float]] = {}

    def _measure(self, layers: list[Prunable], statistic: Tensor) -> None:
        for layer in layers:
            self._record(layer.name, layer.view(), statistic)

    def _record(
        self, name: str, weight: Tensor, squares: Tensor, worth: float | None = None
    ) -> None:
        energy, losses = rounding_losses(weight, squares)
        scale = 1.0 if worth is None else worth * energy / self.report.tokens
        if self.report.weighted:
            scale = energy * len(weight) / (2 * self.report.tokens)
        self.losses[name] = {kind: scale * loss for kind, loss in losses.items()}

    def outside(self) -> None:
        """Measure head and embeddings; all inputs of separate embeddings count alike."""
        for number, (name, weight) in enumerate(outer_layers(self.model).items()):
            if name in self.outer:
                gram = None if number else self._head_gram(name, weight)
                if gram is not None:
                    self._record(name, weight, gram.sum.diagonal(), worth=LOGIT)
                    continue
                # A token reads one row of separate embeddings.
                each = self.costs[name].sum() / len(weight) if name in self.costs else 1.0
                self._record(name, weight, torch.ones_like(weight[0], dtype=torch.float32) * each)

    def patterns(self, target: Pattern) -> dict[str, Pattern]:
        """Return types by layer for a file of at most the target's bits per weight, once all blocks
        are done."""
        assert isinstance(target, Mixed)
        matrices = _matrices(self.model, self.blocks)
        choices = {
            name: [(tensor_bytes(matrices[name], kind), one, kind) for kind, one in losses.items()]
            for name, losses in self.losses.items()
        }
        rest = file_bytes(self.model, {}) - sum(tensor_bytes(matrices[name]) for name in choices)
        budget = int(target.bits * file_weights(self.model) / 8) - rest
        # Layers that no input reaches stay dense, whatever their type.
        chosen = {name: Blocks(kind) for name, kind in cheapest(choices, budget).items()}
        return _extreme(matrices, 0) | chosen


def rounding_losses(weight: Tensor, squares: Tensor) -> tuple[float, dict[str, float]]:
    """Return a row's mean output energy, and the share of it that GGML's rounding loses, by type.

    Args:
        weight: (rows, columns); some of its rows are rounded.
        squares: sum of squares of each input, (columns,).
    """
    some = weight[:: weight.numel() // SAMPLED | 1].float()  # of all places in a head, if odd
    squares = squares.float()
    energy = float((some.square() @ squares).sum()) or 1.0
    losses = {}
    for kind in types_for(weight.shape[1]):
        wrong = quantise(some, squares, name=kind.name).values() - some
        losses[kind.name] = float((wrong.square_() @ squares).sum()) / energy
    return energy / len(some), losses


def allocate(
    model: nn.Module | OpenModel,
    ids: Tensor | CalibrationSet,
    target: Pattern | str | float,
    by: str | None = None,
    *,
    micro_tokens: int | None = None,
) -> dict[str, Pattern]:
    """Return a pattern for every layer of a model in memory, for `calmix.prune`.

    Args:
        model, ids, micro_tokens: as for `calmix.prune`.
        target: fraction pruned of all weights; for `loss` bits per weight, `"3.4 bits"`.
        by: `owl` or `loss`.

    Raises:
        InputError: no such allocation, or no room for it.
        ModelError, SolverError: as `calmix.prune`.
    """
    target = as_pattern(target)
    target = Mixed(target.bits) if isinstance(target, Rate) else target
    by = read_allocation(by or (None if isinstance(target, Mixed) else OWL), target)
    if by is None:
        raise InputError("a uniform sparsity needs no look at the model: pass it alone")
    net: nn.Module = model.model if isinstance(model, OpenModel) else model
    rows = ids.ids if isinstance(ids, CalibrationSet) else ids
    blocks = find_blocks(net)
    if isinstance(target, Mixed):
        check_pattern(blocks, target, get_method("ggml"))
        check_bits(target.bits, net, blocks)
        losses = LossPass(net, blocks)
        losses.weigh(costs_in_memory(net, blocks, check_ids(rows, LOSS)), power=1)
        run_through(losses, rows, micro_tokens)
        return losses.patterns(target)
    dense = OutlierPass(net, blocks)
    run_through(dense, rows, micro_tokens)
    uniform: dict[str, Pattern] = {layer.name: target for layer in blocks.layers}
    return uniform | dense.patterns(target)  # layers that no input reaches stay uniform
