"""Ranking of calibration sets by retention, and the sets tied for first place.

Everything that names a best set uses this module. Sets are ordered by their measured totals;
whether two sets differ is decided by the shrunken totals, since the first was picked for its rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calmix.evaluation.measures import Array
from calmix.study.bootstrap import ROUNDING, Contrast, Interval, Joint

SMALL = 4  # fewest sets in a group to estimate its spread


@dataclass(frozen=True)
class Ranked:
    """One calibration set under one condition, with all that was measured."""

    calibration: str
    strategy: str
    total: Interval  # as measured
    shrunken: Interval  # expected value of a set that was picked for its rank (`shrink`)
    best: float | None  # probability of being the best; None if there is only one set
    behind: Interval | None  # shrunken total of the first set minus this one's; None for the first
    condition: str
    rank: int | None  # by total, from 1; None without a value
    worst: str | None  # dimension with the lowest mean over seeds
    lowest: Interval  # of that dimension
    dimensions: dict[str, Interval]
    tasks: dict[str, Interval]
    accuracy: dict[str, float | None]  # retention of accuracy (the paper's), total and dimensions
    distance: dict[str, dict[str, float | None]]  # as in `Cells`, total and dimensions


def shrink(joint: Joint, weight: Array) -> tuple[Array, Array, Array]:
    """Shrink every set's weighted quantity towards its group's mean (James and Stein; ours).

    The groups are the single sources and all others, or all sets together if either is small. Noise
    is the variance, over items and seeds, of a set's distance to its group's mean (what all sets
    share does not affect ranks). Signal is the variance between a group's sets minus their mean
    noise, at least 0. A set's distance is multiplied by signal / (signal + noise), its resamples
    by the square root of that.

    Returns the values before and after, shape (sets,), nan where a part is unknown, and for each
    the coefficients of the sets' deviations.
    """
    used = weight != 0
    measured = joint.values[:, used] @ weight[used]
    values, count = measured.copy(), len(measured)
    coefficients = np.eye(count)
    singles = joint.cells.of("single")
    rest = [at for at in range(count) if at not in singles]
    few = min(len(singles), len(rest)) < SMALL
    for members in [singles + rest] if few else [singles, rest]:
        if len(members) < 2:
            continue
        mean = np.zeros(count)
        mean[members] = 1 / len(members)
        variances = [joint.variances(np.outer(coefficients[at] - mean, weight)) for at in members]
        noises = np.array([items - both + draws for items, draws, both in variances])
        noises *= len(members) / (len(members) - 1)
        centre = values[members].mean()
        signal = max(0.0, float(values[members].var(ddof=1) - noises.mean()))
        for at, noise in zip(members, noises, strict=True):
            factor = signal / (signal + noise) if signal + noise else 1.0
            coefficients[at] = mean + math.sqrt(factor) * (coefficients[at] - mean)
            values[at] = centre + factor * (values[at] - centre)
    return measured, values, coefficients


def _chances(joint: Joint, weight: Array, values: Array, coefficients: Array) -> list[float | None]:
    """Return each set's probability of being the best, shared between ties; None without a value
    or with only one set."""
    share: list[float | None] = [None] * len(values)
    used, known = weight != 0, np.flatnonzero(~np.isnan(values))
    if len(known) < 2 or not used.any():
        return share
    deviations = np.einsum("sqr,q->sr", (joint.item + joint.draw)[:, used], weight[used])
    sampled = values[known, None] + coefficients[known] @ deviations
    sampled = sampled[:, ~np.isnan(sampled).any(0)]
    top = sampled >= sampled.max(0) - ROUNDING  # fully shrunken sets are all tied
    first = (top / top.sum(0)).sum(1)
    for at, times in zip(known, first, strict=True):
        share[at] = float(times / max(1, first.sum()))
    return share


def leaders(ranking: Sequence[Ranked]) -> list[Ranked]:
    """Return the first set and those tied with it: the interval of `behind` reaches 0 or below."""
    return [
        one
        for one in ranking
        if one.total.value is not None
        and (one.behind is None or one.behind.low is None or one.behind.low <= 0)
    ]


def rank(joint: Joint) -> list[Ranked]:
    """Rank the calibration sets of a condition by total, highest first; sets without a value come
    last."""
    cells, names = joint.cells, joint.cells.quantities
    weight = np.eye(joint.values.shape[1])[0]
    measured, values, coefficients = shrink(joint, weight)
    best = _chances(joint, weight, values, coefficients)
    order = np.argsort(-measured, kind="stable").tolist()
    parts = joint.values[:, 1 : len(names)]
    unit, ranked = np.eye(len(values)), []

    def estimate(of_sets: Array, value: float, *, test: bool = False) -> Interval:
        return Contrast(float(value), {joint: np.outer(of_sets, weight)}).estimate(test=test)

    for position, at in enumerate(order, start=1):
        behind, first, trial = None, order[0], cells.per_set[at]
        if at != first and not math.isnan(measured[first]):
            apart = coefficients[first] - coefficients[at]
            behind = estimate(apart, values[first] - values[at], test=True)
        total = estimate(unit[at], measured[at])
        dimensions = {name: joint.mean([at], q).estimate() for q, name in enumerate(names) if q}
        worst = None if (low := lowest_of(parts[at])) is None else cells.dimensions[low]
        ranked.append(
            Ranked(
                trial.calibration,
                trial.strategy,
                total,
                estimate(coefficients[at], values[at]),
                best[at],
                behind,
                cells.condition.label,
                None if total.value is None else position,
                worst,
                Interval(None) if worst is None else dimensions[worst],
                dimensions,
                {
                    task.name: joint.mean([at], q).estimate()
                    for q, task in enumerate(cells.tasks, len(names))
                },
                _named(names, cells.accuracy[at]),
                {key: _named(names, by_set[at]) for key, by_set in cells.distance.items()},
            )
        )
    return ranked


def _named(names: Sequence[str], values: Array) -> dict[str, float | None]:
    pairs = zip(names, values.tolist(), strict=False)
    return {name: None if math.isnan(value) else value for name, value in pairs}


def lowest_of(dimensions: Array) -> int | None:
    """Return the position of the lowest value; None if all are nan."""
    return None if np.isnan(dimensions).all() else int(np.nanargmin(dimensions))
