"""The grid of a block type of GGML: scales searched on corrected weights, levels column by column.

llama.cpp searches the scale (and minimum) of each group for the least squared error, weighted by
the importance of each column (`make_qkx3_quants`, `make_qx_quants`). The same search runs here when
`solve_columns` reaches a block, on the weights as corrected by then.

Arrays are transposed as in that loop: each column of all outputs is a contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from calmix.precision import large_products
from calmix.pruning.gram import Factor
from calmix.pruning.solvers.ggml_types import TYPES, BlockType, Encoded, encode
from calmix.pruning.solvers.grids import Rounding, inverse
from calmix.pruning.solvers.libggml import quantise

# Weights whose scales are searched at a time on a CPU: fewer cost more calls, more leave its cache.
SEARCHED_AT_ONCE = 2**18
OUTPUTS_AT_ONCE = 128  # of several blocks at a time
# Candidates on each side of the scale that maps the largest weight to the last level; none with 255
# levels, where they would spare a tenth of an error that is a sixtieth of Q5_0's.
SCALE_TRIES = 9
APART = 0.1  # levels between two candidates; ten times as much in a codebook of -127 to 113
NEAR = (-1, 0, 1)  # neighbours of a group's integer scale and minimum that are tried
SWEEP_PANEL = 64  # columns of a sweep whose errors one product gathers
ROUNDED_ROWS = 4096  # rounded plainly at a time
# Types for rows that are not a multiple of 256. They are llama.cpp's, but for IQ4_NL in place of
# Q4_0, of the same size.
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
SWEEPS = 2  # over integers and steps, each chosen for the other


@dataclass
class Scales:
    """Scales of a block, or of several in a row.

    Attributes:
        step, least: float16 (blocks, outputs), units of the scales and of the minima.
        scales, minima: float32 (groups, outputs), integers; minima are 0 in types without.
    """

    step: Tensor
    least: Tensor
    scales: Tensor
    minima: Tensor

    def units(self) -> tuple[Tensor, Tensor]:
        """Return scales and minima in float32, as GGML computes them."""
        shape = len(self.step), -1, self.step.shape[1]
        pairs = (self.step, self.scales), (self.least, self.minima)
        scale, minimum = (
            (step.float()[:, None] * number.view(shape)).view(number.shape)
            for step, number in pairs
        )
        return scale, minimum


class BlockGrid(Rounding[Encoded]):
    """Rounds columns to a block type; all layers in one.

    Args:
        weights: matrices (rows, columns) of the layers.
        kind: a type that has levels.
        importance: (columns,), weight of a squared error in each column.

    Attributes:
        scales: of all blocks reached so far.
    """

    def __init__(self, weights: Sequence[Tensor], kind: BlockType, importance: Tensor) -> None:
        columns, outputs, device = len(importance), sum(map(len, weights)), importance.device
        half: dict[str, Any] = {"dtype": torch.float16, "device": device}
        steps = [torch.zeros(columns // kind.size, outputs, **half) for _ in range(2)]
        numbers = [torch.zeros(columns // kind.group, outputs, device=device) for _ in range(2)]
        self.kind, self._importance = kind, importance
        self.scales = Scales(*steps, *numbers)
        self._units = [torch.zeros_like(numbers[0]) for _ in range(3)]
        self._levels = torch.empty(columns, outputs, dtype=torch.int8, device=device)
        # Views are created once: creating one takes as long as a step's arithmetic.
        self._groups = list(zip(*(unit.unbind() for unit in self._units), strict=True))
        self._columns = self._levels.unbind()
        self._nearest = Nearest(kind, device)

    def begin(self, start: int, stacked: Tensor, *_: object) -> None:
        self._start, self._stacked = start, stacked

    def step(self, number: int, column: Tensor, level: Tensor, mask: Tensor) -> None:
        at = self._start + number
        if at % self.kind.size == 0:
            block = at // self.kind.size
            for outputs in _parts(len(column), self.kind.size, column.device):
                self._search(self._stacked, slice(block, block + 1), outputs)
        self._round(at, column, level)
        scale, _, minimum = self._groups[at // self.kind.group]
        column.addcmul_(self._nearest.values(level), scale, value=-1)
        if self.kind.minima:
            column.add_(minimum)

    def _round(self, at: int, column: Tensor, level: Tensor) -> None:
        """Write the levels nearest to a column."""
        _, units, minimum = self._groups[at // self.kind.group]
        above = torch.add(column, minimum, out=level) if self.kind.minima else column
        self._nearest.levels(torch.mul(above, units, out=level))
        self._columns[at].copy_(level)

    def _value(self, at: int, level: Tensor, column: Tensor) -> None:
        """Write the weights that a column's levels stand for."""
        scale, _, minimum = self._groups[at // self.kind.group]
        torch.mul(self._nearest.values(level), scale, out=column)
        if self.kind.minima:
            column.sub_(minimum)

    def sweep(self, target: Tensor, values: Tensor, gram: Tensor) -> None:
        """Choose all levels once more, each for the current errors of all others, in place.

        The loop cannot correct a column for the rounding of those after it; this coordinate descent
        does.

        Args:
            target, values: (columns, outputs), dense and rounded weights.
            gram: damped (columns, columns).
        """
        wrong, level = target - values, torch.empty_like(values[0])
        columns = values.unbind()
        for start in range(0, len(gram), SWEEP_PANEL):
            here = slice(start, start + SWEEP_PANEL)
            inner, moves = gram[here, here], torch.zeros_like(values[here])
            with large_products():
                pulls = gram[here] @ wrong
            diagonal, before, moved = inner.diagonal().tolist(), moves.T, moves.unbind()
            for at, pull in enumerate(pulls.unbind()):
                pull.addmv_(before[:, :at], inner[at, :at], alpha=-1)
                column, move = columns[start + at], moved[at]
                torch.neg(column, out=move)
                self._round(start + at, pull.div_(diagonal[at]).add_(column), level)
                self._value(start + at, level, column)
                move.add_(column)
            wrong[here] -= moves

    def finish(self, weights: Tensor, levels: Tensor) -> None:
        for at, (column, level) in enumerate(zip(weights, levels, strict=True), self._start):
            self._value(at, level, column)

    def grids(self, weights: Sequence[Tensor], pruned: Sequence[int]) -> list[Encoded]:
        """Return the blocks of each layer."""
        scales = self.scales
        transposed = (
            part.T
            for part in (self._levels, scales.step, scales.scales, scales.least, scales.minima)
        )
        parts = encode(self.kind, *transposed).data.split([len(weight) for weight in weights])
        return [Encoded(self.kind.name, part) for part in parts]

    def round_alone(self, columns: Tensor) -> None:
        """Choose all levels of weights (columns, outputs), none for the error of another."""
        size, group, device = self.kind.size, self.kind.group, columns.device
        for outputs in _parts(columns.shape[1], SEARCHED_AT_ONCE // OUTPUTS_AT_ONCE, device):
            for blocks in _parts(len(columns) // size, size * OUTPUTS_AT_ONCE, device):
                self._search(columns, blocks, outputs)
                here = slice(blocks.start * size, blocks.stop * size)
                groups = slice(here.start // group, here.stop // group)
                _, units, minimum = (unit[groups, None, outputs] for unit in self._units)
                scaled = (columns[here, outputs].unflatten(0, (-1, group)) + minimum).mul_(units)
                levels = self._nearest.levels(scaled).flatten(0, 1)
                self._levels[here, outputs] = levels.to(torch.int8)

    def _search(self, columns: Tensor, blocks: slice, outputs: slice) -> None:
        """Find and freeze the scales of some blocks of some outputs."""
        whole, size, per = self.scales, self.kind.size, self.kind.size // self.kind.group
        here, groups = (slice(blocks.start * each, blocks.stop * each) for each in (size, per))
        some = search(self.kind, columns[here, outputs], self._importance[here])
        whole.step[blocks, outputs], whole.least[blocks, outputs] = some.step, some.least
        whole.scales[groups, outputs], whole.minima[groups, outputs] = some.scales, some.minima
        scale, minimum = some.units()
        for unit, new in zip(self._units, (scale, inverse(scale), minimum), strict=True):
            unit[groups, outputs] = new


def _parts(length: int, weights: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of a dimension whose every index has so many weights to search."""
    some = max(1, SEARCHED_AT_ONCE // weights) if device.type == "cpu" else length
    for start in range(0, length, some):
        yield slice(start, min(start + some, length))


def fitting(name: str, columns: int) -> BlockType:
    """Return a type, or the one in its place for rows that its blocks of 256 do not fit."""
    kind = TYPES[name]
    return TYPES[FALLBACKS.get(name, "IQ4_NL")] if columns % kind.size else kind


def rounded_alone(weight: Tensor, kind: BlockType, importance: Tensor | None = None) -> Encoded:
    """Return a matrix (rows, columns) in blocks, no weight making up for another's error.

    Args:
        importance: (columns,), weight of a squared error in each column; None if all are equal.
    """
    if importance is None:
        importance = torch.ones_like(weight[0], dtype=torch.float32)
    if not kind.group:
        return quantise(weight, importance, name=kind.name)
    parts = []
    for rows in weight.split(ROUNDED_ROWS):
        grid = BlockGrid([rows], kind, importance)
        grid.round_alone(rows.T.float().contiguous())
        parts += grid.grids([rows], [0])
    return Encoded(kind.name, torch.cat([part.data for part in parts]))


def solve_blocks(
    weight: Tensor,
    factor: Factor,
    size: int,
    quantise: Callable[[Tensor, Tensor], Encoded],
) -> Encoded:
    """Return a matrix quantised some columns at a time, correcting those that follow.

    For types without levels: the loop of `solve_columns`, with whole blocks in place of columns.

    Args:
        weight: (rows, columns).
        factor: of the inputs' Gram matrix.
        size: columns quantised at a time.
        quantise: returns columns in blocks, with the weight of a squared error in each column.
    """
    rest, parts = weight.float().clone(), []
    for columns in torch.arange(weight.shape[1]).split(size):
        here = slice(int(columns[0]), int(columns[-1]) + 1)
        local, identity = factor.upper[here, here], torch.eye(len(columns), device=rest.device)
        inner = torch.linalg.solve_triangular(local, identity, upper=True)
        # Errors E of these columns cost |E U^-1|^2 once the columns after them have made up for it.
        parts.append(quantise(rest[:, here], inner.square().sum(1)))
        wrong = (rest[:, here] - parts[-1].values()) @ inner
        with large_products():
            rest[:, here.stop :].addmm_(wrong, factor.upper[here, here.stop :], alpha=-1)
    return Encoded(parts[0].name, torch.cat([part.data for part in parts], dim=1))


class Nearest:
    """Nearest levels of a type, and the values they stand for."""

    def __init__(self, kind: BlockType, device: torch.device) -> None:
        self._ends, self._coded = (kind.low, kind.high), bool(kind.codebook)
        self.book = book = torch.tensor(kind.codebook, dtype=torch.float32, device=device)
        if kind.codebook:  # a table of half integers is fifteen times faster than bucketize
            self._ends = 2 * kind.codebook[0], 2 * kind.codebook[-1]
            halves = torch.arange(*self._ends, device=device) / 2 + 0.25
            self._table = torch.bucketize(halves, (book[1:] + book[:-1]) / 2)
            self._rounded = book[self._table]

    def _places(self, scaled: Tensor) -> Tensor:
        low, high = self._ends
        return scaled.mul_(2).floor_().clamp_(low, high - 1).sub_(low)

    def levels(self, scaled: Tensor) -> Tensor:
        """Round weights in units of their scale to levels, in place."""
        if not self._coded:
            return scaled.round_().clamp_(*self._ends)
        return scaled.copy_(_looked_up(self._table, self._places(scaled)))

    def rounded(self, scaled: Tensor) -> Tensor:
        """Return the values of the nearest levels; overwrites the weights."""
        if not self._coded:
            return self.levels(scaled)
        return _looked_up(self._rounded, self._places(scaled))

    def values(self, levels: Tensor) -> Tensor:
        """Return the values of levels in units of their scale."""
        return _looked_up(self.book, levels) if self._coded else levels


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    return table.index_select(0, places.flatten().int()).view(places.shape)


def search(kind: BlockType, values: Tensor, importance: Tensor) -> Scales:
    """Return the scales of blocks with about the least error.

    Args:
        values: (columns, outputs), the weights of whole blocks.
        importance: (columns,), weight of a squared error in each column.
    """
    nearest = Nearest(kind, values.device)
    x, w = values.unflatten(0, (-1, kind.group)), importance.view(-1, kind.group, 1)
    scale, minimum, weight = _affine(kind, x, w) if kind.minima else _signed(kind, nearest, x, w)
    if kind.scales is None:  # a block is one group
        ones = torch.ones_like(scale)
        block = Scales(scale.half(), minimum.half(), ones, ones if kind.minima else 0 * ones)
    else:
        parts = [_numbers(one, at, kind) for one, at in ((scale, weight), (minimum, w.sum(1)))]
        (step, scales), (least, minima) = parts
        block = Scales(step, least, scales, minima)
    for _ in range(SWEEPS):
        if kind.scales is not None:
            _settle(kind, nearest, block, x, w)
        _refit(kind, nearest, block, x, w)
    if kind.scales is not None:
        _settle(kind, nearest, block, x, w)
    return block


def _affine(kind: BlockType, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each group's best scale and minimum, and the weight of an error in the scale.

    Args:
        x: (groups, group, outputs).
        w: (groups, group, 1).
    """
    high, low = kind.high, x.amin(1).clamp_(max=0)
    above, xw, wt = x - low[:, None], x * w, w.transpose(1, 2)
    total, first, span = w.sum(1), xw.sum(1), above.amax(1)
    scale, minimum = span / high, -low
    best, weight = torch.full_like(scale, -torch.inf), torch.zeros_like(scale)
    for at in range(-SCALE_TRIES, SCALE_TRIES + 1):
        units = (high + APART * at) * inverse(span)
        level = torch.mul(above, units[:, None]).round_().clamp_(0, high)
        one, cross = (wt @ level)[:, 0], (xw * level).sum(1)
        two = (wt @ level.square_())[:, 0]
        determinant = total * two - one * one
        s = (total * cross - first * one) / determinant
        m = (two * first - one * cross) / determinant
        s, m = torch.where(m > 0, cross / two, s), m.clamp_(max=0)
        gain = 2 * (s * cross + m * first) - s * s * two - m * (2 * s * one + m * total)
        _keep(gain > best, (best, gain), (scale, s), (minimum, -m), (weight, two))
    return scale, minimum, weight


def _signed(
    kind: BlockType, nearest: Nearest, x: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same with minima of zero: the largest weight gets the lowest level or beyond."""
    end, apart = (kind.codebook[0], 10 * APART) if kind.codebook else (kind.low, APART)
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    scale, xw, wt = largest / end, x * w, w.transpose(1, 2)
    best, weight = torch.zeros_like(scale), torch.zeros_like(scale)
    tries = 0 if kind.high == 127 else SCALE_TRIES
    ends = [end + apart * at for at in range(-tries, tries + 1)]
    for one in [*ends, -end] if kind.codebook else ends:  # its ends are not alike
        units = one * inverse(largest)
        level = nearest.rounded(x * units[:, None])
        cross, two = (xw * level).sum(1), (wt @ level.square())[:, 0]
        s = cross / two
        _keep(s * cross > best, (best, s * cross), (scale, s), (weight, two))
    return scale, torch.zeros_like(scale), weight


def _keep(better: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Overwrite the first of each pair by the second where that is better (false for NaN)."""
    for old, new in pairs:
        old.copy_(torch.where(better, new, old))


def _numbers(values: Tensor, weight: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Return a step, float16 (blocks, outputs), and integers times which it is near values.

    Args:
        values: (groups, outputs), not negative if no integer may be.
        weight: of a squared error in each.
    """
    assert kind.scales
    values, weight = (_by_block(kind, one) for one in (values, weight))
    (low, high), end = kind.scales, kind.scales[0] or kind.scales[1]
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    step, best = largest / end, torch.full_like(largest, -torch.inf)
    for at in range(-SCALE_TRIES, SCALE_TRIES + 1):
        number = (values * ((end + APART * at) * inverse(largest))).round_().clamp_(low, high)
        cross, two = ((weight * number * part).sum(1, keepdim=True) for part in (values, number))
        _keep(cross * cross / two > best, (best, cross * cross / two), (step, cross / two))
    half = step.half()
    numbers = (values * inverse(half.float())).round_().clamp_(low, high)
    return half[:, 0], numbers.flatten(0, 1)


def _by_block(kind: BlockType, groups: Tensor) -> Tensor:
    return groups.unflatten(0, (-1, kind.size // kind.group))


def _settle(kind: BlockType, nearest: Nearest, block: Scales, x: Tensor, w: Tensor) -> None:
    """Replace each group's integers by those near them with the least error."""
    low, high = kind.scales or (1, 1)
    best = torch.full_like(block.scales, torch.inf)
    before = block.scales.clone(), block.minima.clone()
    for ds, dm in product(NEAR, NEAR if kind.minima else (0,)):
        scales, minima = (
            (old + more).clamp_(low, high) for old, more in zip(before, (ds, dm), strict=True)
        )
        one = Scales(block.step, block.least, scales, minima)
        scale, minimum = one.units()
        error = _errors(kind, nearest, x, scale, minimum)[1].square_()
        error = (w.transpose(1, 2) @ error)[:, 0]
        _keep(error < best, (best, error), (block.scales, scales), (block.minima, minima))


def _errors(
    kind: BlockType, nearest: Nearest, x: Tensor, scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the values of the nearest levels in units of their scale, and the errors."""
    above = x + minimum[:, None] if kind.minima else x
    level = nearest.rounded(above * inverse(scale)[:, None])
    return level, above - level * scale[:, None]


def _refit(kind: BlockType, nearest: Nearest, block: Scales, x: Tensor, w: Tensor) -> None:
    """Replace the steps by those with the least error for the same levels and integers."""
    level = _errors(kind, nearest, x, *block.units())[0]
    wt, k, m = w.transpose(1, 2), block.scales, -block.minima
    one, two, cross = (wt @ level)[:, 0], (wt @ level.square())[:, 0], (w * x * level).sum(1)
    first, total = (wt @ x)[:, 0], w.sum(1)
    sums = (k * k * two, k * m * one, m * m * total, k * cross, m * first)
    a, b, c, p, q = (_by_block(kind, one).sum(1) for one in sums)
    determinant = a * c - b * b
    both = determinant > 1e-6 * a * c
    before = block.least.float()
    step = torch.where(both, (c * p - b * q) / determinant, (p - b * before) / a).half()
    least = torch.where(both, (a * q - b * p) / determinant, before).half()
    good = step.isfinite() & least.isfinite() & (least >= 0)
    _keep(good, (block.step, step), (block.least, least))
