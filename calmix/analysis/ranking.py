"""Which calibration set is best: sets in order of what they keep, and those tied for the first.

The one answer for everything that names a best set: the order is that of the measured totals, and
whether two sets are apart is decided by the shrunken ones, since the first was picked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from calmix.analysis.bootstrap import Estimate, Joint
from calmix.analysis.cells import Cells, nan_mean
from calmix.analysis.statistics import ROUNDING, Array

SMALL = 4  # a group of fewer sets tells nothing of its own spread


@dataclass(frozen=True)
class Candidate:
    """A calibration set by one weighted quantity.

    Attributes:
        total: as measured.
        shrunken: drawn towards the mean of its group (`shrink`): what to expect of a set that was
            picked for its rank.
        best: probability of being the highest, from the shrunken resamples; None of one set.
        behind: shrunken total of the first set less this one's; None for the first.
    """

    calibration: str
    strategy: str
    total: Estimate
    shrunken: Estimate
    best: float | None
    behind: Estimate | None


@dataclass(frozen=True)
class Ranked:
    """One calibration set under one condition.

    Attributes:
        rank, rank_worst: by total and by worst dimension, from 1; None without a value.
        dimensions, tasks: raw means over draws.
        worst: the dimension with the lowest mean over draws; `lowest` is its estimate.
        total, shrunken, best, behind: as of `Candidate`.
        accuracy: retention of accuracy (the paper's), total and dimensions.
        distance: to the dense model by `cells.DISTANCES`, mean over draws, total and dimensions.
        halves: tasks that are the other half of a benchmark this set was made of.
        without_own: total and dimensions without those tasks, where that makes a difference.
    """

    condition: str
    calibration: str
    strategy: str
    kind: str
    rank: int | None
    rank_worst: int | None
    total: Estimate
    shrunken: Estimate
    best: float | None
    worst: str | None
    lowest: Estimate
    dimensions: dict[str, Estimate]
    tasks: dict[str, Estimate]
    accuracy: dict[str, float | None]
    distance: dict[str, dict[str, float | None]]
    halves: tuple[str, ...]
    without_own: dict[str, Estimate]
    behind: Estimate | None


@dataclass(frozen=True)
class Shrunken:
    """One weighted quantity of every set, drawn towards its group's mean (empirical Bayes, ours).

    Attributes:
        values: shape (sets,); nan where unknown.
        coefficients: of the sets' deviations in each, shape (sets, sets).
    """

    values: Array
    coefficients: Array


def groups_of(cells: Cells) -> list[list[int]]:
    """Return what is shrunk together: single sources, and all else; all if either is few."""
    singles = cells.of("single")
    rest = [at for at in range(len(cells.sets)) if at not in singles]
    if min(len(singles), len(rest)) < SMALL:
        return [singles + rest]
    return [singles, rest]


def shrink(found: Joint, groups: Sequence[Sequence[int]], weight: Array) -> Shrunken:
    """Draw every set's weighted quantity towards its group's mean, as James and Stein do.

    Signal is the variance between the group's sets with the mean noise of a set taken out, at
    least 0; noise is by other items and other draws, of a set's distance to its group's mean (what
    all sets share moves no rank). A set keeps signal / (signal + its noise) of that distance, and
    the square root of it of the distance's resamples.

    Args:
        weight: of the quantities, shape (quantities,).
    """
    used = weight != 0
    values = found.values[:, used] @ weight[used]
    count = len(values)
    coefficients = np.eye(count)
    for group in groups:
        members = list(group)
        if len(members) < 2:
            continue
        mean = np.zeros(count)
        mean[members] = 1 / len(members)
        apart = [found.variances(np.outer(np.eye(count)[at] - mean, weight)) for at in members]
        noise = np.array([items - both + draws for items, draws, both in apart])
        noise *= len(members) / (len(members) - 1)
        centre = values[members].mean()
        signal = max(0.0, float(values[members].var(ddof=1) - noise.mean()))
        for at, own in zip(members, noise, strict=True):
            kept = signal / (signal + own) if signal + own else 1.0
            coefficients[at] = mean + math.sqrt(kept) * (coefficients[at] - mean)
            values[at] = centre + kept * (values[at] - centre)
    return Shrunken(values, coefficients)


def chances(found: Joint, weight: Array, shrunken: Shrunken) -> list[float | None]:
    """Return each set's probability of being the best, ties shared; None without a value, or
    where there is but one set."""
    used = weight != 0
    known = np.flatnonzero(~np.isnan(shrunken.values))
    if len(known) < 2 or not used.any():
        return [None] * len(shrunken.values)
    deviations = np.einsum("sqr,q->sr", (found.item + found.draw)[:, used], weight[used])
    sampled = shrunken.values[known, None] + shrunken.coefficients[known] @ deviations
    sampled = sampled[:, ~np.isnan(sampled).any(0)]
    top = sampled >= sampled.max(0) - ROUNDING  # sets wholly drawn to one mean are all the same
    first = (top / top.sum(0)).sum(1)
    share: list[float | None] = [None] * len(shrunken.values)
    for at, times in zip(known, first, strict=True):
        share[at] = float(times / max(1, first.sum()))
    return share


def candidates(cells: Cells, found: Joint, weight: Array) -> list[Candidate]:
    """Return the sets by a weighted quantity, the highest first; those without a value are last.

    Args:
        weight: of the quantities of `found`.
    """
    used = weight != 0
    order = in_order(found.values[:, used] @ weight[used])
    shrunken = shrink(found, groups_of(cells), weight)
    best = chances(found, weight, shrunken)
    unit = np.eye(len(cells.sets))
    made = []
    for at in [*order, *(at for at in range(len(cells.sets)) if at not in order)]:
        own, behind = shrunken.coefficients[at], None
        if order and at != order[0]:
            gap = np.outer(shrunken.coefficients[order[0]] - own, weight)
            value = float(shrunken.values[order[0]] - shrunken.values[at])
            behind = found.estimate(gap, value, test=True)
        made.append(
            Candidate(
                cells.sets[at], cells.strategies[at], found.estimate(np.outer(unit[at], weight)),
                found.estimate(np.outer(own, weight), float(shrunken.values[at])), best[at], behind,
            )
        )  # fmt: skip
    return made


Placed = TypeVar("Placed", Candidate, Ranked)


def leaders(placed: Sequence[Placed]) -> list[Placed]:
    """Return the first set and those tied with it: not behind it beyond doubt."""
    return [
        one for one in placed
        if one.total.value is not None
        and (one.behind is None or one.behind.low is None or one.behind.low <= 0)
    ]  # fmt: skip


def rank(cells: Cells, found: Joint) -> list[Ranked]:
    """Return the calibration sets of a condition by total, the highest first."""
    names = cells.quantities
    width = len(names)
    lows = [lowest_of(row[1:width]) for row in found.values]
    by_worst = in_order(
        np.array([np.nan if low is None else found.values[at, 1 + low]
                  for at, low in enumerate(lows)])
    )  # fmt: skip
    accuracy = nan_mean(cells.accuracy, 1)
    far = {key: nan_mean(values, 1) for key, values in cells.distance.items()}
    made = []
    for place, one in enumerate(candidates(cells, found, found.alone(0)), start=1):
        at = cells.sets.index(one.calibration)
        dimensions = {key: found.one(at, q) for q, key in enumerate(cells.dimensions, start=1)}
        worst = None if (low := lows[at]) is None else cells.dimensions[low]
        made.append(
            Ranked(
                cells.condition.label, one.calibration, one.strategy, cells.kinds[at],
                None if one.total.value is None else place,
                by_worst.index(at) + 1 if at in by_worst else None, one.total, one.shrunken,
                one.best, worst, Estimate(None) if worst is None else dimensions[worst], dimensions,
                {task.name: found.one(at, width + q) for q, task in enumerate(cells.tasks)},
                _named(names, accuracy[at]),
                {key: _named(names, values[at]) for key, values in far.items()},
                cells.halves[at], _without_own(cells, found, at), one.behind,
            )
        )  # fmt: skip
    return made


def _named(names: Sequence[str], values: Array) -> dict[str, float | None]:
    told = zip(names, values.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in told}


def _without_own(cells: Cells, found: Joint, at: int) -> dict[str, Estimate]:
    own = np.eye(len(cells.sets))[at]
    weights = without(cells, found, cells.halves[at])
    return {name: found.estimate(np.outer(own, weight)) for name, weight in weights.items()}


def without(cells: Cells, found: Joint, left_out: Collection[str]) -> dict[str, Array]:
    """Return the total and the dimensions without some tasks, where that makes a difference.

    Returns:
        By name, weights of the quantities of `found`; all 0 where no task is left.
    """
    width = len(cells.quantities)
    total = np.zeros(found.values.shape[1])
    made: dict[str, Array] = {}
    dimensions = 0
    for number, name in enumerate(cells.dimensions, start=1):
        known = [q for q, task in enumerate(cells.tasks) if task.dimension == name and task.signal]
        left = [width + q for q in known if cells.tasks[q].name not in left_out]
        own = found.alone(number)
        if len(left) < len(known):
            own = made[name] = np.zeros(len(total))
            own[left] = 1 / max(1, len(left))
        if left:
            total += own
            dimensions += 1
    return {cells.quantities[0]: total / max(1, dimensions), **made} if made else {}


def lowest_of(dimensions: Array) -> int | None:
    """Return the position of the lowest value; None where none is known."""
    return None if np.isnan(dimensions).all() else int(np.nanargmin(dimensions))


def in_order(values: Array) -> list[int]:
    """Return the positions of what is known, the highest first; equal values as given."""
    return [int(at) for at in np.argsort(-values, kind="stable") if not np.isnan(values[at])]
