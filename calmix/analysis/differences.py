"""Differences between ways to calibrate, leads over a default, and what becomes of them.

Every one is a contrast of the joint bootstrap: items are the same for both sides, and so are the
seeds that both have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from calmix.analysis.bootstrap import Contrast, Estimate, Joint
from calmix.analysis.cells import APART, TOTAL, WORST
from calmix.analysis.ranking import in_order, lowest_of, shrink, weighed, without
from calmix.analysis.statistics import ALPHA, Array, corrected

SINGLES = "mean of the single sources"
BEST = "best single source, "
Key = TypeVar("Key")


@dataclass(frozen=True)
class Difference:
    """How much more one way to calibrate keeps than another: `gap` is left - right.

    Quantities are `total`, `worst` (each side's own worst dimension), the dimensions, and `apart`:
    the total without the tasks whose benchmark a source of either side holds the other half of.
    """

    condition: str
    left: str  # a calibration set, the best single source, or the mean of them
    right: str
    quantity: str
    gap: Estimate
    p_corrected: float | None = None  # over all differences of the analysis, `apart` by itself
    draw_p_corrected: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it survives correction at 0.05, for other items and other seeds."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


@dataclass(frozen=True)
class Margin:
    """How far a set is ahead of the default, a set or the mean of the single sources."""

    condition: str
    method: str
    sparsity: float
    calibration: str
    default: str
    quantity: str
    gap: Estimate


@dataclass(frozen=True)
class Growth:
    """How much the margin over the default grows from the lowest to the highest sparsity."""

    series: str
    calibration: str
    default: str
    quantity: str
    sparsities: tuple[float, ...]
    gap: Estimate


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a set, several whose mean counts, or one `picked` for its numbers,
    which lie too high for that: it counts by its shrunken ones."""

    name: str
    made: str
    sets: tuple[int, ...]
    picked: bool = False

    def kept(self, found: Joint, weight: Array) -> Contrast:
        """Return a weighted quantity."""
        unit, sets = np.eye(len(found.counts)), list(self.sets)
        values, own = shrink(found, weight) if self.picked else (weighed(found, weight), unit)
        return found.contrast(np.outer(own[sets].mean(0), weight), float(values[sets].mean()))

    def every(self, found: Joint) -> dict[str, Contrast]:
        """Return total, worst and dimensions by name; the worst by its own, unshrunken numbers."""
        names = found.cells.quantities
        total, *rest = (self.kept(found, found.alone(at)) for at in range(len(names)))
        low = lowest_of(found.values[list(self.sets), 1 : len(names)].mean(0))
        worst = Contrast(math.nan, {}) if low is None else rest[low]
        return {TOTAL: total, WORST: worst, **dict(zip(found.cells.dimensions, rest, strict=True))}


def between(left: Mapping[Key, Contrast], right: Mapping[Key, Contrast]) -> dict[Key, Contrast]:
    """Return left - right of everything that has a value on both sides."""
    gaps = {key: kept - right[key] for key, kept in left.items() if key in right}
    return {key: gap for key, gap in gaps.items() if not math.isnan(gap.value)}


def compare(found: Joint) -> list[Difference]:
    """Compare every two ways to calibrate, p not corrected yet: mixes and written text set by set,
    the single source with the highest total, and the mean of all single sources."""
    cells, singles, made = found.cells, found.cells.of("single"), []
    sides = [Side(cells.sets[at], how, (at,)) for at, how in enumerate(cells.strategies)
             if how != "single"]  # fmt: skip
    ordered = [at for at in in_order(found.values[:, 0]) if at in singles]
    sides += [Side(BEST + cells.sets[at], "single", (at,), picked=True) for at in ordered[:1]]
    if len(singles) > 1:
        sides.append(Side(SINGLES, "single", tuple(singles)))
    every = {side: side.every(found) for side in sides}
    for left, right in itertools.combinations(sides, 2):
        if left.made == right.made == "single":
            continue  # the best of them against the mean of them says nothing
        halves = {name for at in (*left.sets, *right.sets) for name in cells.halves[at]}
        rest = without(cells, halves).get(TOTAL)
        gaps = between(every[left], every[right])
        if rest is not None and rest.any():
            gaps |= between(*({APART: side.kept(found, rest)} for side in (left, right)))
        made += [
            Difference(cells.condition.label, left.name, right.name, name, gap.estimate(test=True))
            for name, gap in gaps.items()
        ]
    return made


def correct(differences: Sequence[Difference]) -> list[Difference]:
    """Return all differences of an analysis with both p-values corrected."""
    return corrected(
        differences,
        lambda one: one.quantity == APART,
        p_corrected=lambda one: one.gap.p,
        draw_p_corrected=lambda one: one.gap.draw_p,
    )


def leads_over(made: Sequence[Joint], default: str | None) -> list[dict[tuple[str, str], Contrast]]:
    """Return the leads over the default under several conditions, by set and quantity.

    The default is a calibration set, or with None the mean of those single sources that every
    condition with sources has: a lead does not change because other sources were run.
    """
    singles = [{one.cells.sets[at] for at in one.cells.of("single")} for one in made]
    there = [names for names in singles if names] if default is None else [{default}]
    named, every = set.intersection(*there) if there else set(), []
    for found in made:
        cells = found.cells
        leads: dict[tuple[str, str], Contrast] = {}
        against = tuple(at for at, name in enumerate(cells.sets) if name in named)
        theirs = Side("", "", against).every(found) if against else {}
        for at, name in enumerate(cells.sets):
            if against and cells.strategies[at] != "single" and at not in against:
                ours = Side(name, cells.strategies[at], (at,)).every(found)
                leads |= {(name, key): gap for key, gap in between(ours, theirs).items()}
        every.append(leads)
    return every


def margins(series: Sequence[Joint], default: str | None) -> tuple[list[Margin], list[Growth]]:
    """Return the leads of mixes and written text over the default, and how they grow over
    conditions that differ in sparsity alone, lowest first."""
    every, over = leads_over(series, default), default or SINGLES
    conditions = [found.cells.condition for found in series]
    leads = [
        Margin(at.label, at.method, at.sparsity, name, over, quantity, gap.estimate(test=True))
        for at, own in zip(conditions, every, strict=True)
        for (name, quantity), gap in own.items()
    ]
    grown = []
    for key in dict.fromkeys(key for own in every for key in own):
        known = [(at.sparsity, own[key]) for at, own in zip(conditions, every, strict=True)
                 if key in own]  # fmt: skip
        if len(known) > 1:
            gap = (known[-1][1] - known[0][1]).estimate()
            shares = tuple(share for share, _ in known)
            grown.append(Growth(conditions[0].series, key[0], over, key[1], shares, gap))
    return leads, grown
