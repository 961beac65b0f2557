"""Differences between calibrations and between methods.

Each is a contrast of the joint bootstrap: both sides share the items, and the seeds that both have.
A method here includes solver, options and recovery.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import numpy as np

from calmix.study.bootstrap import Contrast, Interval, Joint, Testable
from calmix.study.cells import TOTAL, WORST
from calmix.study.ranking import lowest_of, shrink

SINGLES = "mean of the single sources"
BEST = "best single source, "
T = TypeVar("T")


@dataclass(frozen=True)
class Difference(Testable):
    """How much more one calibration keeps than another: `gap` is left - right.

    Quantities are `total`, `worst` (each side's own worst dimension) and the dimensions.
    """

    condition: str
    left: str  # a calibration set, the best single source, or the mean of single sources
    right: str
    quantity: str
    gap: Interval
    p_corrected: float | None = None


@dataclass(frozen=True)
class Gain(Testable):
    """How much more one condition keeps than another that differs only in method, in the mean of
    the `sets` that both have."""

    more: str
    less: str
    sets: int
    quantity: str
    gap: Interval
    p_corrected: float | None = None


def every(joint: Joint, sets: Sequence[int], *, picked: bool = False) -> dict[str, Contrast]:
    """Return the mean of some sets, by position: total, worst and dimensions by name.

    A set that was `picked` for its high values, which are biased upwards, uses its shrunken ones;
    its worst dimension is that of the measured values.
    """
    names, sets = joint.cells.quantities, list(sets)
    means = [joint.mean(sets, at) for at in range(len(names))]
    if picked:
        weights = np.eye(joint.values.shape[1])[: len(names)]
        shrunken = [(weight, *shrink(joint, weight)) for weight in weights]
        means = [
            Contrast(float(values[sets].mean()), {joint: np.outer(unit[sets].mean(0), weight)})
            for weight, _, values, unit in shrunken
        ]
    low = lowest_of(joint.values[sets, 1 : len(names)].mean(0))
    worst = Contrast(math.nan, {}) if low is None else means[1 + low]
    return {TOTAL: means[0], WORST: worst, **dict(zip(names[1:], means[1:], strict=True))}


def between(left: Mapping[T, Contrast], right: Mapping[T, Contrast]) -> dict[T, Contrast]:
    """Return left - right for everything that has a value on both sides."""
    gaps = {key: mean - right[key] for key, mean in left.items() if key in right}
    return {key: gap for key, gap in gaps.items() if not math.isnan(gap.value)}


def compare(joint: Joint, default: str | None = None) -> list[Difference]:
    """Compare every two calibrations under a condition: each mix and self-written set, the single
    source with the highest total, the mean of all single sources, and the default."""
    cells, singles, differences = joint.cells, joint.cells.of("single"), list[Difference]()
    sides = [
        (one.calibration, one.strategy, [at])
        for at, one in enumerate(cells.per_set)
        if one.strategy != "single" or one.calibration == default
    ]
    sides.sort(key=lambda side: side[0] == default)  # so that others are compared with it
    totals = joint.values[singles, 0]
    if not np.isnan(totals).all():
        best = singles[int(np.nanargmax(totals))]
        sides.append((BEST + cells.sets[best], "single", [best]))
    if len(singles) > 1:
        sides.append((SINGLES, "single", singles))
    contrasts = [
        (name, strategy, every(joint, sets, picked=name.startswith(BEST)))
        for name, strategy, sets in sides
    ]
    for (left, one, ours), (right, other, theirs) in itertools.combinations(contrasts, 2):
        if one == other == "single":
            continue  # single sources are not compared among themselves
        differences += [
            Difference(cells.condition.label, left, right, name, gap.estimate(test=True))
            for name, gap in between(ours, theirs).items()
        ]
    return differences


def gains(joints: Sequence[Joint]) -> list[Gain]:
    """Compare every two methods by model and pattern."""
    rows = list[Gain]()
    alike = attrgetter("model", "pattern", "propagation", "rows", "length", "suite")
    for pair in itertools.combinations(joints, 2):
        common = [name for name in pair[0].cells.sets if name in pair[1].cells.sets]
        if not common or alike(pair[0].cells.condition) != alike(pair[1].cells.condition):
            continue
        means = {one: every(one, [one.cells.sets.index(name) for name in common]) for one in pair}
        more, less = sorted(pair, key=lambda one: means[one][TOTAL].value, reverse=True)
        rows += [
            Gain(
                more.cells.condition.label,
                less.cells.condition.label,
                len(common),
                quantity,
                gap.estimate(test=True),
            )
            for quantity, gap in between(means[more], means[less]).items()
        ]
    return rows
