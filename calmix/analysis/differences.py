"""Differences that are paired over seeds: between ways to calibrate, and with sparsity.

Under one seed every calibration set is drawn anew, so what is paired is the seed, the model and
the items. With k seeds the sign-flip test cannot give a p below 2 / 2^k: three seeds can never
reach 0.05 by it, and Student's t then stands on the normal distribution alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calmix.analysis.cells import WORST, Cells, nan_mean
from calmix.analysis.statistics import (
    Array,
    benjamini_hochberg,
    sign_flip_p,
    t_below,
    t_quantile,
)

SINGLES = "mean of the single sources"


@dataclass(frozen=True)
class Difference:
    """How much more one way to calibrate keeps than another, paired over seeds.

    Attributes:
        left, right: a calibration set, or the mean of the single sources.
        quantity: `total`, `worst` or a dimension.
        seeds: paired.
        value: mean of left - right.
        low, high: 95 % interval by Student's t over the seeds; None from one seed. It is about
            other draws on these very items.
        p: two-sided by the same t; `p_corrected` over all differences of the analysis.
        p_flip: by flipping signs; `p_flip_least` is the smallest that so few seeds can give.
    """

    condition: str
    left: str
    right: str
    quantity: str
    seeds: int
    value: float
    low: float | None
    high: float | None
    p: float | None
    p_flip: float
    p_flip_least: float
    p_corrected: float | None = None


@dataclass(frozen=True)
class Paired:
    """The mean of differences with its interval and p-values."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    p_flip: float
    p_flip_least: float


def paired(differences: Array) -> Paired:
    """Return the mean of differences, shape (seeds,), with a t interval and two p-values."""
    count = len(differences)
    mean = float(differences.mean())
    flip, _ = sign_flip_p(differences)
    least = 2 / 2**count
    if count < 2:
        return Paired(mean, None, None, None, flip, least)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    half = t_quantile(count - 1) * error
    p = 2 * t_below(-abs(mean) / error, count - 1) if error > 0 else None
    return Paired(mean, mean - half, mean + half, p, flip, least)


@dataclass(frozen=True)
class Contender:
    """One way to calibrate: a set, or several whose mean counts. `made` says how."""

    name: str
    made: str
    sets: tuple[int, ...]


def contenders(cells: Cells) -> list[Contender]:
    """Return what is compared: every set that is not a single source, the single source with
    the highest mean total, and the mean of all single sources.

    The best source is picked by the numbers it is then compared on, which favours it.
    """
    found = [
        Contender(name, cells.strategies[at], (at,))
        for at, name in enumerate(cells.sets)
        if cells.strategies[at] != "single"
    ]
    singles = cells.of("single")
    totals = cells.means[singles, 0]
    if len(singles) and not np.isnan(totals).all():
        best = singles[int(np.nanargmax(totals))]
        found.append(Contender(cells.sets[best], "single", (best,)))
    if len(singles) > 1:
        found.append(Contender(SINGLES, "single", tuple(singles)))
    return found


def outcome(cells: Cells, quantity: str) -> Array:
    """Return one quantity, `worst` included, of every trial, shape (sets, seeds)."""
    if quantity == WORST:
        return cells.worst
    return cells.values[:, :, cells.quantities.index(quantity)]


def over_seeds(values: Array, sets: Sequence[int]) -> Array:
    """Return the mean of several sets for each seed; nan where it would not be balanced.

    While trials are missing, the seeds and sets with the most complete cells are taken, so that
    every seed averages the same sets.
    """
    block = values[list(sets)]
    known = ~np.isnan(block)
    order = np.argsort(-known.sum(0), kind="stable")
    best: tuple[int, list[int], Any] = (0, [], None)
    for count in range(1, len(order) + 1):
        seeds = order[:count].tolist()
        complete = known[:, seeds].all(1)
        if count * int(complete.sum()) > best[0]:
            best = count * int(complete.sum()), seeds, complete
    found = np.full(block.shape[1], np.nan)
    if best[0]:
        found[best[1]] = nan_mean(block[best[2]][:, best[1]], 0)
    return found


def compare(cells: Cells) -> list[Difference]:
    """Return every pair of contenders, for total, worst and each dimension."""
    found = []
    for left, right in itertools.combinations(contenders(cells), 2):
        if left.made == right.made == "single":
            continue  # the best of them against the mean of them says nothing
        for quantity in (cells.quantities[0], WORST, *cells.dimensions):
            values = outcome(cells, quantity)
            gaps = over_seeds(values, left.sets) - over_seeds(values, right.sets)
            gaps = gaps[~np.isnan(gaps)]
            if not len(gaps):
                continue
            told = paired(gaps)
            found.append(
                Difference(cells.condition.label, left.name, right.name, quantity, len(gaps),
                           told.value, told.low, told.high, told.p, told.p_flip,
                           told.p_flip_least)
            )  # fmt: skip
    return found


def corrected_differences(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p corrected over all that have one."""
    adjusted = iter(benjamini_hochberg([one.p for one in differences if one.p is not None]))
    return [
        one if one.p is None else replace(one, p_corrected=next(adjusted)) for one in differences
    ]


@dataclass(frozen=True)
class Margin:
    """How far a set is ahead of the default, at one sparsity.

    `default` is a set's name, or the mean of the single sources. The interval is paired over
    seeds, as for `Difference`.
    """

    condition: str
    method: str
    sparsity: float
    calibration: str
    default: str
    quantity: str
    seeds: int
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Growth:
    """How much the margin over the default grows from the lowest to the highest sparsity."""

    method: str
    calibration: str
    default: str
    quantity: str
    sparsities: tuple[float, ...]
    value: float
    low: float | None
    high: float | None
    seeds: int


def margins(series: Sequence[Cells], default: str | None) -> tuple[list[Margin], list[Growth]]:
    """Return margins over the default for every set that is not a single source.

    Args:
        series: conditions that differ in sparsity alone, lowest first.
        default: a calibration set; None is the mean of the single sources.
    """
    found: list[Margin] = []
    gaps: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for cells in series:
        against = _default_sets(cells, default)
        if not against:
            continue
        for at, name in enumerate(cells.sets):
            if cells.strategies[at] == "single" or at in against:
                continue
            for quantity in (cells.quantities[0], WORST, *cells.dimensions):
                values = outcome(cells, quantity)
                gap = values[at] - over_seeds(values, against)
                known = ~np.isnan(gap)
                if not known.any():
                    continue
                told = paired(gap[known])
                found.append(
                    Margin(cells.condition.label, cells.condition.method,
                           cells.condition.sparsity, name, default or SINGLES, quantity,
                           int(known.sum()), told.value, told.low, told.high)
                )  # fmt: skip
                by_seed = dict(zip(cells.seeds, gap.tolist(), strict=True))
                gaps.setdefault((name, quantity), {})[cells.condition.sparsity] = {
                    seed: value for seed, value in by_seed.items() if not math.isnan(value)
                }
    grown = []
    for (name, quantity), by_sparsity in gaps.items():
        if len(by_sparsity) < 2:
            continue
        low, high = min(by_sparsity), max(by_sparsity)
        common = sorted(set(by_sparsity[low]) & set(by_sparsity[high]))
        if not common:
            continue
        rise = np.array([by_sparsity[high][seed] - by_sparsity[low][seed] for seed in common])
        told = paired(rise)
        grown.append(
            Growth(series[0].condition.method, name, default or SINGLES, quantity,
                   tuple(sorted(by_sparsity)), told.value, told.low, told.high, len(common))
        )  # fmt: skip
    return found, grown


def _default_sets(cells: Cells, default: str | None) -> list[int]:
    if default is None:
        return cells.of("single")
    return [cells.sets.index(default)] if default in cells.sets else []
