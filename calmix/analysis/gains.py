"""What one method keeps more of than another, set by set, and whether sets lie as far apart.

A method is all of how a model is pruned: solver, options, allocation and recovery. Every figure is
a contrast of two conditions' joint bootstraps: their items are the same, and so are the draws that
both have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from calmix.analysis.bootstrap import Estimate, Joint, Sample
from calmix.analysis.cells import Cells
from calmix.analysis.differences import defaults, leads, rise
from calmix.specs import RECOVERIES

MEAN = "mean of the sets of both"

Pair = tuple[Cells, Joint]


@dataclass(frozen=True)
class Gain:
    """How much more of what a set keeps one method leaves than another, all else alike.

    Attributes:
        more, less: their conditions: one method with a recovery and without, else the one that
            keeps more over the sets of both first.
        recovered: whether the first is the second with a recovery.
        calibration: a set, or the mean of all that were run with both.
        sets: how many the mean is of.
        quantity: `total` or a dimension.
        gap: more - less.
    """

    more: str
    less: str
    recovered: bool
    calibration: str
    sets: int
    quantity: str
    gap: Estimate


@dataclass(frozen=True)
class Shift:
    """How much further ahead of the default a set is with one method than with another.

    Attributes:
        more, less, recovered: as of `Gain`.
        default: a set, or the mean of the single sources that were run with both.
        quantity: `total`, `worst` or a dimension.
        gap: the lead with more - the lead with less.
    """

    more: str
    less: str
    recovered: bool
    calibration: str
    default: str
    quantity: str
    gap: Estimate


def gains(made: Sequence[Pair], default: str | None) -> tuple[list[Gain], list[Shift]]:
    """Compare every two methods that some set was run with, model by model, pattern by pattern.

    Args:
        made: all conditions.
        default: what leads are over (`differences.margins`).
    """
    kept: list[Gain] = []
    moved: list[Shift] = []
    for one, two in itertools.combinations(made, 2):
        common = [name for name in one[0].sets if name in two[0].sets]
        if not common or _rest(one[0]) != _rest(two[0]):
            continue
        by_total = sorted((one, two), key=lambda pair: _kept(pair, common, 0)[0], reverse=True)
        pairs = [pair for pair in ((one, two), (two, one)) if _recovered(*pair)]
        more, less = pairs[0] if pairs else by_total
        kept += _gains(more, less, bool(pairs), common)
        moved += _shifts(more, less, bool(pairs), default)
    return kept, moved


def _rest(cells: Cells) -> tuple[object, ...]:
    """Return all of a condition but its method."""
    at = cells.condition
    return at.model, at.pattern, at.propagation, at.rows, at.length, at.suite


def _recovered(more: Pair, less: Pair) -> bool:
    before, after, recovery = more[0].condition.method.rpartition(" + ")
    asked = recovery.split(",")[0]
    return bool(after) and before == less[0].condition.method and asked in RECOVERIES


def _kept(pair: Pair, names: Sequence[str], quantity: int) -> tuple[float, Sample, int]:
    """Return the mean over some sets, its resamples, and the fewest draws of a set."""
    cells, found = pair
    sets = [cells.sets.index(name) for name in names]
    value = float(found.values[sets, quantity].mean())
    return value, found.sample(found.mean(sets, quantity)), int(found.counts[sets].min())


def _gains(more: Pair, less: Pair, recovered: bool, common: Sequence[str]) -> Iterator[Gain]:
    asked = [*((name, [name]) for name in common), (MEAN, list(common))]
    for (name, names), (at, quantity) in itertools.product(asked, enumerate(more[0].quantities)):
        value, sample, draws = _kept(more, names, at)
        other, under, fewer = _kept(less, names, at)
        gap = (sample - under).estimate(value - other, min(draws, fewer))
        if gap.value is not None:
            yield Gain(
                more[0].condition.label, less[0].condition.label, recovered,
                name, len(names), quantity, gap,
            )  # fmt: skip


def _shifts(more: Pair, less: Pair, recovered: bool, default: str | None) -> Iterator[Shift]:
    named = defaults([more[0], less[0]], default)
    before = {(lead.calibration, lead.quantity): (lead, sample)
              for lead, sample in leads(*less, default, named)}  # fmt: skip
    for lead, sample in leads(*more, default, named):
        other = before.get((lead.calibration, lead.quantity))
        if other and (gap := rise(other, (lead, sample))):
            yield Shift(
                lead.condition, other[0].condition, recovered, lead.calibration, lead.default,
                lead.quantity, gap,
            )  # fmt: skip
