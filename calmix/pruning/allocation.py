"""A type of GGML for every matrix, or whole bits: those that lose least output for a file's size.

The loss of rounding is measured in one pass of the dense model over the calibration set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import InputError
from calmix.files import size_text
from calmix.models.blocks import DecoderBlocks, Prunable, find_blocks, outer_layers
from calmix.models.opening import OpenModel
from calmix.pruning.engine import Run, check_ids, check_pattern, costs_in_memory, run_through
from calmix.pruning.methods import Look, Method, get_method
from calmix.pruning.methods.ggml import Typed
from calmix.pruning.methods.gptq import Gptq
from calmix.pruning.patterns import Blocks, Mixed, Pattern, Rate, Recipe, as_pattern
from calmix.pruning.solvers.ggml_scales import fitting
from calmix.pruning.solvers.ggml_types import TYPES, BlockType
from calmix.pruning.solvers.libggml import quantise
from calmix.pruning.type_recipes import check_whole

LOGIT = 2.0  # loss of a squared error of a logit, in shares of a layer's output energy
SAMPLED = 2**16  # weights of a matrix that are rounded to every type
FILLED = 0.98  # share of the requested size that a file has at least
ALIGNED = 32  # bytes that a tensor of a GGUF file is padded to


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
        sizes = " to ".join(size_text(rate * total / 8) for rate in (low, high))
        low, high = math.ceil(100 * low) / 100, math.floor(100 * high) / 100
        raise InputError(
            f"{bits:g} bits per weight are out of reach: GGUF files of this model have {low:g} to "
            f"{high:g} ({sizes})"
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

    def __init__(
        self, model: nn.Module, blocks: DecoderBlocks, outer: Mapping[str, Pattern] | None = None
    ) -> None:
        if outer is None:
            each = outer_layers(model).items()
            outer = {name: Blocks("Q8_0") for name, weight in each if types_for(weight.shape[1])}
        super().__init__(model, blocks, Look(), outer)
        self.seen = self._measure
        self.losses: dict[str, dict[str, float]] = {}

    def _measure(self, layers: list[Prunable], statistic: Tensor) -> None:
        for layer in layers:
            self._record(layer.name, layer.view(), statistic)

    def _record(
        self, name: str, weight: Tensor, squares: Tensor, worth: float | None = None
    ) -> None:
        sample = weight[:: weight.numel() // SAMPLED | 1].float()  # of all places in a head, if odd
        squares = squares.float()
        energy = float((sample.square() @ squares).sum()) or 1.0
        by_row = energy / len(sample)
        scale = 1.0 if worth is None else worth * by_row / self.report.tokens
        if self.report.weighted:
            scale = by_row * len(weight) / (2 * self.report.tokens)
        self.losses[name] = {
            kind: scale * (float(((values - sample).square_() @ squares).sum()) / energy)
            for kind, values in self._rounded(sample, squares)
        }

    def _rounded(self, rows: Tensor, squares: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield float32 rows rounded in each way, with its name."""
        for kind in types_for(rows.shape[1]):
            yield kind.name, quantise(rows, squares, name=kind.name).values()

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


class LevelPass(LossPass):
    """The same for whole bits of a quantiser's levels. Layers of one input have equal bits: engines
    fuse them."""

    def __init__(self, model: nn.Module, blocks: DecoderBlocks, method: Gptq) -> None:
        super().__init__(model, blocks, {})
        self.quantiser, self._together = method, list[list[str]]()

    def _measure(self, layers: list[Prunable], statistic: Tensor) -> None:
        super()._measure(layers, statistic)
        self._together.append([layer.name for layer in layers])

    def _rounded(self, rows: Tensor, squares: Tensor) -> Iterator[tuple[str, Tensor]]:
        stacked = rows.T.contiguous()
        for bits in self.quantiser.choices:
            yield str(bits), self.quantiser.grid([rows], bits).nearest(stacked, squares).T

    def outside(self) -> None:
        """Embeddings and head stay as they are."""

    def patterns(self, target: Pattern) -> dict[str, Pattern]:
        """Return bits by layer, of the target's on average, once all blocks are done."""
        assert isinstance(target, Mixed)
        counts = {layer.name: math.prod(layer.shape) for layer in self.blocks.layers}
        choices = {
            names[0]: [
                (
                    bits * sum(counts[name] for name in names),
                    math.fsum(self.losses[name][str(bits)] for name in names),
                    str(bits),
                )
                for bits in self.quantiser.choices
            ]
            for names in self._together
        }
        least = self.quantiser.choices[0]  # also where no input is
        unseen = sum(count for name, count in counts.items() if name not in self.losses)
        budget = int(target.bits * sum(counts.values())) - least * unseen
        chosen = cheapest(choices, budget)
        bits = {name: int(chosen[names[0]]) for names in self._together for name in names}
        return {name: Rate(bits.get(name, least)) for name in counts}


def loss_pass(model: nn.Module, blocks: DecoderBlocks, method: Method) -> LossPass:
    """Return the pass that chooses a type of GGML or whole bits for every matrix."""
    if isinstance(method, Gptq):
        return LevelPass(model, blocks, method)
    return LossPass(model, blocks)


def check_mixed(target: Mixed, model: Any, blocks: DecoderBlocks, method: Method) -> None:
    """Refuse bits per weight that no types of a GGUF file's matrices give."""
    if isinstance(method, Typed):
        check_bits(target.bits, model, blocks)


def allocate(
    model: nn.Module | OpenModel,
    ids: Tensor | CalibrationSet,
    target: Pattern | str,
    *,
    method: Method | str = "ggml",
    micro_tokens: int | None = None,
) -> dict[str, Pattern]:
    """Return a type for every matrix of a model in memory, for `calmix.prune`, or whole bits.

    Args:
        model, ids, micro_tokens: as for `calmix.prune`.
        target: bits per weight of the file, `"3.4 bits"`.
        method: `ggml` for types, or `gptq` with its options for whole bits.

    Raises:
        InputError: the model's matrices cannot have so many bits.
        ModelError, SolverError: as `calmix.prune`.
    """
    target = as_pattern(target)
    if not isinstance(target, Rate | Mixed):
        raise InputError(f"types are chosen for a number of bits, such as '3.4 bits', not {target}")
    target = Mixed(target.bits)
    net: nn.Module = model.model if isinstance(model, OpenModel) else model
    rows = ids.ids if isinstance(ids, CalibrationSet) else ids
    blocks = find_blocks(net)
    chosen = get_method(method)
    check_pattern(blocks, target, chosen)
    check_mixed(target, net, blocks, chosen)
    losses = loss_pass(net, blocks, chosen)
    losses.weigh(costs_in_memory(net, blocks, check_ids(rows, "loss")), power=1)
    run_through(losses, rows, micro_tokens)
    return losses.patterns(target)
