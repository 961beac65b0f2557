"""Differences over seeds: between ways to calibrate, and with sparsity. Two readings of each:

* **paired**: under one seed every calibration set is drawn anew, so what is paired is the seed,
  the model and the items. With k seeds the sign-flip test cannot give a p below 2 / 2^k: three
  seeds can never reach 0.05 by it, and Student's t stands on the normal distribution alone.
* **pooled** (ours): all seeds of either side, with the spread over draws that all sets of the
  condition have in common. It has more degrees of freedom and needs no common seeds, but takes
  every set's draws to spread alike.

Both are about other draws on these very items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calmix.analysis.cells import WORST, Cells, nan_mean
from calmix.analysis.estimates import estimate
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
        value, low, high, p: left - right by the pooled spread, with 95 % interval and two-sided
            p; value alone where no set has two seeds. `p_corrected` is over all differences of
            the analysis.
        seeds: paired; 0 where the two sides share none.
        paired, paired_low, paired_high, p_paired: mean of left - right over those seeds, by
            Student's t; no interval from one.
        p_flip: by flipping signs; `p_flip_least` is the smallest that so few seeds can give.
    """

    condition: str
    left: str
    right: str
    quantity: str
    value: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    paired: float | None
    paired_low: float | None
    paired_high: float | None
    p_paired: float | None
    p_flip: float | None
    p_flip_least: float | None
    p_corrected: float | None = None


@dataclass(frozen=True)
class Gap:
    """A difference with its 95 % interval and two-sided p; None where they cannot be told."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences with its interval and p-values."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    p_flip: float | None
    p_flip_least: float | None


def pooled(values: Array, left: Sequence[int], right: Sequence[int]) -> Gap | None:
    """Return the mean of some sets less that of others, by the spread all sets have in common.

    Args:
        values: shape (sets, seeds); nan where there is no trial.
        left, right: positions of the sets on either side.
    """
    found = estimate(values, values * np.nan, values * np.nan)
    sides = [
        [one for one in (found.sets[at] for at in side) if one.value is not None]
        for side in (left, right)
    ]
    if not all(sides):
        return None
    means = [math.fsum(one.value or 0.0 for one in side) / len(side) for side in sides]
    gap = means[0] - means[1]
    if not found.deviation:
        return Gap(gap)
    parts = [math.fsum(1 / one.seeds for one in side) / len(side) ** 2 for side in sides]
    error = found.deviation * math.sqrt(sum(parts))
    half = t_quantile(found.freedom) * error
    return Gap(gap, gap - half, gap + half, 2 * t_below(-abs(gap) / error, found.freedom))


def paired(differences: Array) -> Paired:
    """Return the mean of differences, shape (seeds,), with a t interval and two p-values."""
    count = len(differences)
    if not count:
        return Paired(None, None, None, None, None, None)
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
            gap = pooled(values, left.sets, right.sets)
            if gap is None:
                continue
            gaps = over_seeds(values, left.sets) - over_seeds(values, right.sets)
            gaps = gaps[~np.isnan(gaps)]
            told = paired(gaps)
            found.append(
                Difference(cells.condition.label, left.name, right.name, quantity, gap.value,
                           gap.low, gap.high, gap.p, len(gaps), told.value, told.low, told.high,
                           told.p, told.p_flip, told.p_flip_least)
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

    `default` is a set's name, or the mean of the single sources. The interval is by the pooled
    spread, as for `Difference`; None where no set has two seeds.
    """

    condition: str
    method: str
    sparsity: float
    calibration: str
    default: str
    quantity: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Growth:
    """How much the margin over the default grows from the lowest to the highest sparsity.

    The interval takes the draws at the two sparsities for unrelated, though the same rows serve
    both; None where either margin has none.
    """

    method: str
    calibration: str
    default: str
    quantity: str
    sparsities: tuple[float, ...]
    value: float
    low: float | None
    high: float | None


def margins(series: Sequence[Cells], default: str | None) -> tuple[list[Margin], list[Growth]]:
    """Return margins over the default for every set that is not a single source.

    Args:
        series: conditions that differ in sparsity alone, lowest first.
        default: a calibration set; None is the mean of the single sources.
    """
    found: list[Margin] = []
    for cells in series:
        against = _default_sets(cells, default)
        for at, name in enumerate(cells.sets):
            if cells.strategies[at] == "single" or at in against:
                continue
            for quantity in (cells.quantities[0], WORST, *cells.dimensions):
                gap = pooled(outcome(cells, quantity), [at], against)
                if gap is not None:
                    found.append(
                        Margin(cells.condition.label, cells.condition.method,
                               cells.condition.sparsity, name, default or SINGLES, quantity,
                               gap.value, gap.low, gap.high)
                    )  # fmt: skip
    grown = []
    for name, quantity in dict.fromkeys((one.calibration, one.quantity) for one in found):
        own = [one for one in found if (one.calibration, one.quantity) == (name, quantity)]
        if len(own) < 2:
            continue
        first, last = own[0], own[-1]
        rise = last.value - first.value
        low = high = None
        if first.high is not None and last.high is not None:
            half = math.hypot(first.high - first.value, last.high - last.value)
            low, high = rise - half, rise + half
        grown.append(
            Growth(first.method, name, default or SINGLES, quantity,
                   tuple(one.sparsity for one in own), rise, low, high)
        )  # fmt: skip
    return found, grown


def _default_sets(cells: Cells, default: str | None) -> list[int]:
    if default is None:
        return cells.of("single")
    return [cells.sets.index(default)] if default in cells.sets else []
