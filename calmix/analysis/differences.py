"""Differences between calibrations and between methods, and how leads change.

Each is a contrast of the joint bootstrap: both sides share the items, and the seeds that both have.
A method here includes solver, options, allocation and recovery.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import numpy as np

from calmix.analysis.bootstrap import ALPHA, Contrast, Estimate, Joint, corrected
from calmix.analysis.cells import TOTAL, WORST
from calmix.analysis.ranking import lowest_of, shrink
from calmix.options import RECOVERIES

SINGLES = "mean of the single sources"
BEST = "best single source, "
MEAN = "mean of the sets of both"
Key = TypeVar("Key")
Leads = dict[tuple[str, str], Contrast]  # over the default, by (set, quantity)


@dataclass(frozen=True)
class Difference:
    """How much more one calibration keeps than another: `gap` is left - right.

    Quantities are `total`, `worst` (each side's own worst dimension) and the dimensions.
    """

    condition: str
    left: str  # a calibration set, the best single source, or the mean of single sources
    right: str
    quantity: str
    gap: Estimate
    p_corrected: float | None = None  # over all differences of the analysis
    draw_p_corrected: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p, for other items and seeds, is at most 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


@dataclass(frozen=True)
class Gain:
    """How much more one condition keeps than another that differs only in method, in the mean of
    the `sets` that both have; or, with `over`, how much a set's lead over that set (or over the
    mean of single sources) grows, also between sparsities.

    `more` is the method with recovery if that is the difference, else the one that keeps more over
    common sets; between sparsities, the highest at which the set was run.
    """

    more: str
    less: str
    by: str  # method, recovery or sparsity
    calibration: str
    over: str
    sets: int
    quantity: str
    gap: Estimate
    p_corrected: float | None = None  # over all gains of the analysis that are changes of leads

    @property
    def significant(self) -> bool:
        """Whether the corrected p is at most 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


def every(found: Joint, sets: Sequence[int], *, picked: bool = False) -> dict[str, Contrast]:
    """Return the mean of some sets, by position: total, worst and dimensions by name.

    A set that was `picked` for its high values, which are biased upwards, uses its shrunken ones;
    its worst dimension is that of the measured values.
    """
    names, sets = found.cells.quantities, list(sets)
    kept = [found.mean(sets, at) for at in range(len(names))]
    if picked:
        weights = np.eye(found.values.shape[1])[: len(names)]
        shrunken = [(weight, *shrink(found, weight)) for weight in weights]
        kept = [Contrast(float(values[sets].mean()), {found: np.outer(unit[sets].mean(0), weight)})
                for weight, _, values, unit in shrunken]  # fmt: skip
    low = lowest_of(found.values[sets, 1 : len(names)].mean(0))
    worst = Contrast(math.nan, {}) if low is None else kept[1 + low]
    return {TOTAL: kept[0], WORST: worst, **dict(zip(names[1:], kept[1:], strict=True))}


def between(left: Mapping[Key, Contrast], right: Mapping[Key, Contrast]) -> dict[Key, Contrast]:
    """Return left - right for everything that has a value on both sides."""
    gaps = {key: kept - right[key] for key, kept in left.items() if key in right}
    return {key: gap for key, gap in gaps.items() if not math.isnan(gap.value)}


def compare(made: Sequence[Joint], default: str | None = None) -> list[Difference]:
    """Compare every two calibrations under each condition: each mix and self-written set, the
    single source with the highest total, the mean of all single sources, and the default."""
    differences = []
    for found in made:
        cells, singles = found.cells, found.cells.of("single")
        sides = [(one.calibration, one.strategy, [at]) for at, one in enumerate(cells.made)
                 if one.strategy != "single" or one.calibration == default]  # fmt: skip
        sides.sort(key=lambda side: side[0] == default)  # so that others are compared with it
        totals = found.values[singles, 0]
        if not np.isnan(totals).all():
            best = singles[int(np.nanargmax(totals))]
            sides.append((BEST + cells.sets[best], "single", [best]))
        if len(singles) > 1:
            sides.append((SINGLES, "single", singles))
        kept = [(name, strategy, every(found, sets, picked=name.startswith(BEST)))
                for name, strategy, sets in sides]  # fmt: skip
        for (left, one, ours), (right, other, theirs) in itertools.combinations(kept, 2):
            if one == other == "single":
                continue  # single sources are not compared among themselves
            differences += [
                Difference(cells.condition.label, left, right, name, gap.estimate(test=True))
                for name, gap in between(ours, theirs).items()
            ]
    return corrected(differences, p_corrected=lambda one: one.gap.p,
                     draw_p_corrected=lambda one: one.gap.draw_p)  # fmt: skip


def leads_over(made: Sequence[Joint], default: str | None) -> list[Leads]:
    """Return the leads over the default under each of several conditions.

    The default is a calibration set or, if None, the mean of the single sources that all conditions
    with sources share, so that leads do not depend on which other sources were run.
    """
    singles = [{one.cells.sets[at] for at in one.cells.of("single")} for one in made]
    defaults = [names for names in singles if names] if default is None else [{default}]
    common, leads = set.intersection(*defaults) if defaults else set(), list[Leads]()
    for found in made:
        against = [at for at, name in enumerate(found.cells.sets) if name in common]
        theirs = every(found, against) if against else {}
        leads.append({
            (one.calibration, name): gap
            for at, one in enumerate(found.cells.made)
            if one.strategy != "single" and at not in against
            for name, gap in between(every(found, [at]), theirs).items()
        })  # fmt: skip
    return leads


def gains(made: Sequence[Joint], default: str | None) -> list[Gain]:
    """Compare every two methods by model and pattern, and the leads of mixes and self-written sets
    between methods and between the lowest and the highest sparsity."""
    over, found = default or SINGLES, list[Gain]()
    alike = attrgetter("model", "pattern", "propagation", "rows", "length", "suite")
    for pair in itertools.combinations(made, 2):
        common = [name for name in pair[0].cells.sets if name in pair[1].cells.sets]
        if not common or alike(pair[0].cells.condition) != alike(pair[1].cells.condition):
            continue
        means = {one: every(one, [one.cells.sets.index(name) for name in common]) for one in pair}
        by = "recovery"  # if one is the other's method followed by a recovery
        for more, less in (pair, pair[::-1]):
            before, _, added = more.cells.condition.method.rpartition(" + ")
            if before == less.cells.condition.method and added.split(",")[0] in RECOVERIES:
                break
        else:
            by = "method"
            more, less = sorted(pair, key=lambda one: means[one][TOTAL].value, reverse=True)
        head = more.cells.condition.label, less.cells.condition.label, by
        found += [Gain(*head, MEAN, "", len(common), quantity, gap.estimate())
                  for quantity, gap in between(means[more], means[less]).items()]  # fmt: skip
        leads = between(*leads_over((more, less), default))
        found += [Gain(*head, name, over, 1, quantity, gap.estimate(test=True))
                  for (name, quantity), gap in leads.items()]  # fmt: skip
    # How leads grow over conditions that differ only in sparsity, without N:M patterns.
    series: dict[str, list[Joint]] = {}
    for one in made:
        at = one.cells.condition
        if at.rows and at.pattern.endswith("%"):
            series.setdefault(at.series, []).append(one)
    for members in series.values():
        each = leads_over(members, default)
        for key in dict.fromkeys(key for own in each for key in own):
            known = [(one, own[key]) for one, own in zip(members, each, strict=True) if key in own]
            if len(known) > 1:
                (less, low), *_, (more, high) = known
                labels = more.cells.condition.label, less.cells.condition.label
                gap = (high - low).estimate(test=True)
                found.append(Gain(*labels, "sparsity", key[0], over, 1, key[1], gap))
    return corrected(found, p_corrected=lambda one: one.gap.p)
