"""Grids: the values of quantised weights, rounding to them, and their storage cost.

A weight is `level * scale`; scales are bfloat16 values, one per group of inputs of an output row.
Bits per weight include levels, scales and the mask.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calmix.errors import InputError
from calmix.models.shards import read_file, write_file
from calmix.pruning.patterns import clear
from calmix.pruning.solvers.ggml_types import TYPES, Encoded

G = TypeVar("G", "Grid", Encoded)

SCALES_FOLDER = "calmix-scales"  # folder beside a model's weights, with one file per block
SHRINKS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)  # multiples of the largest scale that are tried
FINE = 6  # bits from which the largest weight sets the scale
SCALED_AT_ONCE = 2**17  # weights whose scales are chosen at a time on a CPU: they fit in its cache
DEAD_ZONE = 0.42  # added before a magnitude is truncated to a level: 0.5 would be rounding


@dataclass(frozen=True)
class Grid:
    """The representable values of one layer's weights.

    Attributes:
        scale: float32 (rows, groups) of bfloat16 values, or (1, 1).
        bits: per weight, all storage included.
        octaves: int8 (columns,), factor on each input's scale in quarter octaves; or None.
    """

    scale: Tensor
    bits: float
    octaves: Tensor | None = None

    def levels(self, weight: Tensor) -> Tensor:
        """Return the nearest levels (rows, columns) to weights, float32."""
        step = self.steps()[:, :, None]
        parts = weight.float().reshape(len(weight), step.shape[1], -1)
        return (parts * inverse(step)).round_().view(weight.shape)

    def values(self, levels: Tensor) -> Tensor:
        """Return the weights for levels, float32."""
        step = self.steps()[:, :, None]
        value = levels.float().view(len(levels), step.shape[1], -1) * step
        return value.view(levels.shape).add_(0.0)  # no -0.0

    def steps(self) -> Tensor:
        """Return the step between levels (rows or 1, groups of columns), float32."""
        return self.scale if self.octaves is None else self.scale * factors(self.octaves)

    def to(self, device: torch.device) -> Grid:
        """Return the grid on a device."""
        octaves = None if self.octaves is None else self.octaves.to(device)
        return replace(self, scale=self.scale.to(device), octaves=octaves)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a matrix of this shape (rows, columns) can have the grid."""
        rows, groups = self.scale.shape
        apart = self.octaves is None or (self.octaves.shape == shape[1:] and groups == 1)
        return apart and len(shape) == 2 and rows in (1, shape[0]) and shape[1] % groups == 0

    def part(self, rows: slice) -> Grid:
        """Return the grid of some rows."""
        return replace(self, scale=self.scale[rows]) if len(self.scale) > 1 else self


def stored(grids: Mapping[str, Grid | Encoded]) -> dict[str, Tensor]:
    """Return the grids of parameters as the tensors of a file in `SCALES_FOLDER`."""
    tensors = {}
    for name, grid in grids.items():
        if isinstance(grid, Encoded):
            tensors[f"{name}|{grid.name}"] = grid.data
            continue
        scale = grid.scale.bfloat16()  # may be a strided view
        tensors[f"{name}|scale"] = scale.clone(memory_format=torch.contiguous_format)
        if grid.octaves is not None:
            tensors[f"{name}|octaves"] = grid.octaves
    return tensors


def as_grids(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Grid]:
    """Return `stored` grids of a folder by parameter, without blocks; their bits are unknown."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, kind = name.rpartition("|")
        if kind not in TYPES:
            parts.setdefault(parameter, {})[kind] = value
    grids = {}
    for name, each in parts.items():
        scale, octaves = each.pop("scale", torch.empty(0)), each.pop("octaves", None)
        sound = scale.dtype == torch.bfloat16 and scale.ndim == 2 and bool(scale.isfinite().all())
        whole = octaves is None or (octaves.dtype, octaves.ndim) == (torch.int8, 1)
        if each or not (sound and whole and scale.numel()):
            raise _damaged(folder, name)
        grids[name] = Grid(scale.float(), 0.0, octaves)
    return grids


def read_grids(folder: Path, shapes: Mapping[str, Sequence[int]] = {}) -> dict[str, Grid]:
    """Return the grids of a model folder's quantised parameters; {} without scales. InputError if
    they are damaged, or do not fit the parameters' `shapes`."""
    return check_fit(as_grids(_read_stored(folder), folder), shapes, folder)


def read_blocks(folder: Path, shapes: Mapping[str, Sequence[int]] = {}) -> dict[str, Encoded]:
    """Return the blocks of a model folder's quantised parameters; as `read_grids`."""
    parts = ((name.rpartition("|"), value) for name, value in _read_stored(folder).items())
    blocks = {name: Encoded(kind, value) for (name, _, kind), value in parts if kind in TYPES}
    return check_fit(blocks, shapes, folder)


def replace_blocks(folder: Path, blocks: Mapping[str, Encoded]) -> None:
    """Write other blocks of the same parameters into a model folder."""
    tensors = stored(blocks)
    for path in sorted((folder / SCALES_FOLDER).glob("[!.]*")):
        before = read_file(path)
        if before.keys() & tensors.keys():
            write_file(path, {name: tensors.get(name, one) for name, one in before.items()})


def _read_stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted((folder / SCALES_FOLDER).glob("[!.]*")):
        tensors |= read_file(path)
    return tensors


def check_fit(
    stored: dict[str, G], shapes: Mapping[str, Sequence[int]], folder: Path
) -> dict[str, G]:
    """Return grids or blocks of a folder; InputError for one that does not fit its parameter's
    shape."""
    for name in stored.keys() & shapes.keys():
        if not stored[name].fits(shapes[name]):
            raise _damaged(folder, name)
    return stored


def _damaged(folder: Path, name: str) -> InputError:
    return InputError(
        f"{folder / SCALES_FOLDER} is damaged, or of another model ({name}): fetch the model "
        "again, or delete these scales to use the weights as they are"
    )


def factors(octaves: Tensor) -> Tensor:
    """Return 2^(octaves / 4) in float32, rounded to few bits: identical on every machine."""
    quarters = torch.tensor([1.0, 1.1875, 1.40625, 1.6875], device=octaves.device)
    whole = octaves.int()
    return torch.ldexp(quarters[whole & 3], whole >> 2)


def entropy(values: Tensor, inverse: float = 1.0) -> float:
    """Return the entropy in bits of a matrix's levels, value * inverse.

    Rows must be contiguous; they are counted in chunks that fit in the CPU's cache.
    """
    low, high = (round(float(end) * inverse) for end in values.aminmax())
    counts = torch.zeros(high - low + 1, dtype=torch.int64, device=values.device)
    for part in values.split(64):
        levels = (part * inverse).round_().sub_(low).int().flatten()
        counts += torch.bincount(levels, minlength=len(counts))
    return entropy_of(counts.cpu().numpy())


def entropy_of(counts: NDArray[np.int64]) -> float:
    """Return the entropy in bits of a value, from the count of each value."""
    share = counts[counts > 0] / counts.sum()
    return -float(share @ np.log2(share))


def mask_bits(sparsity: float) -> float:
    """Return the bits per weight that an ideal coder needs for the mask."""
    parts = (sparsity, 1 - sparsity)
    return -sum(part * math.log2(part) for part in parts if part)


def check_group(group: int, columns: int, name: str = "a layer") -> int:
    """Return how many inputs share a scale: all if the group is longer than a row."""
    if columns and columns % min(group, columns):
        raise InputError(
            f"groups of {group} do not divide the {columns} inputs of {name}: choose another "
            "group, such as group=32, or leave such layers dense with --skip"
        )
    return min(group, columns)


class Rounding(ABC, Generic[G]):
    """Rounds the columns of layers that share an input, as `solve_columns` reaches them.

    It calls `begin` for a block of columns, `step` for each of them and `finish` at its end.

    Attributes:
        group: columns that share a scale, chosen at the first of them, which `starts` a panel; 0 if
            panels need not start there.
    """

    group = 0

    @abstractmethod
    def begin(
        self, start: int, stacked: Tensor, mask: Tensor, leverage: Tensor, masked: bool
    ) -> None:
        """Prepare a block of columns.

        Args:
            start: the block's first column.
            stacked: all columns (columns, outputs), corrected so far.
            mask: the block's, 1.0 where a weight is known to be pruned.
            leverage: 1 / U_jj of all columns, (columns, 1).
            masked: whether any weight is pruned.
        """

    def starts(self, size: int) -> range:
        """Return the first columns of groups that start in a block."""
        return range(0)

    @abstractmethod
    def step(self, number: int, column: Tensor, level: Tensor, mask: Tensor) -> None:
        """Write the levels of one column of a block, and overwrite the column with its errors."""

    @abstractmethod
    def finish(self, weights: Tensor, levels: Tensor) -> None:
        """Write a block's weights from its levels."""

    @abstractmethod
    def grids(self, weights: Sequence[Tensor], pruned: Sequence[int]) -> list[G]:
        """Return the grid of each layer, from its rounded weights and number of pruned ones."""


class Symmetric(Rounding[Grid]):
    """2^bits evenly spaced levels; the largest weight is level -2^(bits-1), as in GGUF's Q4_0.

    Scales can therefore be negative.

    Args:
        weights: matrices (rows, columns) of the layers.
        group: columns that share a scale, chosen when the loop reaches the first of them.

    Attributes:
        beside: bits that a group takes besides its levels.
    """

    def __init__(self, weights: Sequence[Tensor], group: int, bits: int) -> None:
        self.beside = 16
        columns, outputs = weights[0].shape[1], sum(map(len, weights))
        self.group = check_group(group, columns)
        self.scales = torch.zeros(columns // self.group, outputs, device=weights[0].device)
        self.bits, self._half = bits, 2 ** (bits - 1)
        self._found: list[tuple[Any, ...]] = []  # of groups: scales, inverse, lowest, highest level
        self._lost = self.scales.new_empty(0)  # reused: allocating costs more than computing

    def begin(
        self, start: int, stacked: Tensor, mask: Tensor, leverage: Tensor, masked: bool
    ) -> None:
        self._start, self._stacked, self._mask, self._masked = start, stacked, mask, masked
        self._squares = leverage.square().T

    def starts(self, size: int) -> range:
        return range(-self._start % self.group, size, self.group)

    def step(self, number: int, column: Tensor, level: Tensor, mask: Tensor) -> None:
        group, inside = divmod(self._start + number, self.group)
        if not inside:
            self._found.append(self._scales(group, number))
        scale, units, *ends = self._found[group]
        torch.mul(column, units, out=level).round_().clamp_(*ends)
        if self._masked:
            clear(level, mask)
        column.addcmul_(level, scale, value=-1)

    def finish(self, weights: Tensor, levels: Tensor) -> None:
        at = 0
        while at < len(levels):
            group = (self._start + at) // self.group
            to = min(len(levels), (group + 1) * self.group - self._start)
            torch.mul(levels[at:to], self._found[group][0], out=weights[at:to])
            at = to

    def nearest(self, stacked: Tensor, importance: Tensor) -> Tensor:
        """Return all columns (columns, outputs) rounded without correction, their squared errors
        weighted by the importance (columns,) of each."""
        self.begin(0, stacked, stacked, importance.sqrt()[:, None], masked=False)
        values = torch.empty_like(stacked)
        for number, (part, rounded) in enumerate(
            zip(stacked.split(self.group), values.split(self.group), strict=True)
        ):
            scale, units, *ends = self._scales(number, 0)
            torch.mul(part, units, out=rounded).round_().clamp_(*ends).mul_(scale)
        return values

    def _scales(self, group: int, at: int) -> tuple[Any, ...]:
        """Choose the scales of a group that begins `at` a column of the block, whose weights are
        corrected by all columns before it; return them, their inverse and the ends of levels."""
        columns = slice(group * self.group, (group + 1) * self.group)
        values, squares = self._stacked[columns], self._squares[:, columns]
        if self._masked:
            values, known = values.clone(), self._mask[at : at + self.group]
            clear(values[: len(known)], known)
        size = (
            max(SCALED_AT_ONCE // self.group, 64)
            if values.device.type == "cpu"
            else values.shape[1]
        )
        scales = [self._fit(part, squares) for part in values.split(size, 1)]
        here = self.scales[group].copy_(torch.cat(scales).bfloat16())
        return here, inverse(here), *self._ends(values)

    def _widest(self, values: Tensor) -> Tensor:
        """Return the scales (outputs,) that cover all weights of a group of columns."""
        high, low = values.amax(0), values.amin(0)
        largest = torch.where(high > -low, high, low)
        tied = (high == -low).nonzero()[:, 0]  # the first of the two decides
        ties = values.T[tied]
        largest[tied] = ties.gather(1, ties.abs().argmax(1, keepdim=True))[:, 0]
        return largest / -self._half

    def _ends(self, values: Tensor) -> tuple[Any, Any]:
        """Return the lowest and the highest level in a group of columns: numbers, or (outputs,)."""
        return -self._half, self._half - 1

    def _fit(self, values: Tensor, importance: Tensor) -> Tensor:
        """Return the scales (outputs,) of a group of columns (group, outputs).

        Of the widest scale and a few smaller ones, the one with the least error. The search stops
        once fewer than one output in a hundred gains.

        Args:
            importance: (1, group), weight of a squared error in a column.
        """
        scale, ends = self._widest(values), self._ends(values)
        if self.bits >= FINE:
            return scale
        shrinks = torch.tensor(SHRINKS, device=scale.device)[:, None]
        tried = (scale * shrinks).bfloat16().float()
        best, least = scale, torch.full_like(scale, math.inf)
        lost = self._lost.resize_(values.shape)
        for one, units in zip(tried, inverse(tried), strict=True):
            level = torch.mul(values, units, out=lost).round_().clamp_(*ends)
            torch.addcmul(values, level, one, value=-1, out=lost).square_()
            error = (importance @ lost)[0]
            gains = error < least
            if 100 * int(gains.count_nonzero()) < gains.numel():
                break
            best, least = torch.where(gains, one, best), torch.minimum(error, least)
        return best

    def grids(self, weights: Sequence[Tensor], pruned: Sequence[int]) -> list[Grid]:
        grids = []
        for weight, scale, count in zip(
            weights, _by_layer(self.scales, weights), pruned, strict=True
        ):
            sparsity, beside = count / weight.numel(), self.beside * scale.numel() / weight.numel()
            bits = self.bits * (1 - sparsity) + mask_bits(sparsity) + beside
            grids.append(Grid(scale, bits))
        return grids


class Asymmetric(Symmetric):
    """2^bits evenly spaced levels from the least to the largest weight of a group, or zero.

    Levels are counted from zero, which is one of them; the file that stores them has it as the
    group's zero point.
    """

    def __init__(self, weights: Sequence[Tensor], group: int, bits: int) -> None:
        super().__init__(weights, group, bits)
        self.beside, self._top = 16 + bits, 2**bits - 1

    def _widest(self, values: Tensor) -> Tensor:
        return (values.amax(0).clamp_(min=0) - values.amin(0).clamp_(max=0)) / self._top

    def _ends(self, values: Tensor) -> tuple[Any, Any]:
        low = (values.amin(0).clamp_(max=0) * inverse(self._widest(values))).round_()
        return low, low + self._top


class DeadZone(Rounding[Grid]):
    """Unbounded integer levels with one step per layer, and a wider interval rounded to zero.

    Args:
        weights: in units of their step.
        steps: one per layer, bfloat16 values.
    """

    def __init__(self, weights: Sequence[Tensor], steps: Sequence[float]) -> None:
        parts = [w.new_full((1, len(w)), step) for w, step in zip(weights, steps, strict=True)]
        self.scales = torch.cat(parts, dim=1)
        self._zone = torch.full((), DEAD_ZONE, device=self.scales.device)

    def begin(self, *block: Any) -> None:
        """Do nothing: the scales are known."""

    def step(self, number: int, column: Tensor, level: Tensor, mask: Tensor) -> None:
        column.sub_(self.nearest(column, level))

    def finish(self, weights: Tensor, levels: Tensor) -> None:
        torch.mul(levels, self.scales, out=weights)

    def nearest(self, scaled: Tensor, out: Tensor | None = None) -> Tensor:
        """Return sign(w) floor(|w| + 0.42)."""
        return torch.copysign(self._zone, scaled, out=out).add_(scaled).trunc_()

    def grids(self, weights: Sequence[Tensor], pruned: Sequence[int]) -> list[Grid]:
        grids = []
        for weight, scale in zip(weights, _by_layer(self.scales, weights), strict=True):
            bits = entropy(weight.T, float(inverse(scale[:1])))
            grids.append(Grid(scale[:1].clone(), bits + self.beside(weight)))
        return grids

    @staticmethod
    def beside(weight: Tensor) -> float:
        """Return the bits per weight of the step and the columns' scales."""
        return 16 / weight.numel() + 8 / len(weight)


def _by_layer(scales: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the scales (rows, groups) of each layer, from those of all, transposed."""
    return [part.T.contiguous() for part in scales.split([len(w) for w in weights], 1)]


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, or zero where the scale is zero."""
    return torch.where(scale != 0, scale.reciprocal(), 0)
