"""What one method keeps more of than another, set by set, and whether sets lie as far apart.

A method is all of how a model is pruned: solver, options, allocation and recovery.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from calmix.analysis.bootstrap import Contrast, Estimate, Joint
from calmix.analysis.differences import SINGLES, between, leads_over
from calmix.options import RECOVERIES

MEAN = "mean of the sets of both"


@dataclass(frozen=True)
class Gain:
    """How much more one method keeps than another, all else alike: of a set, or of the mean of all
    `sets` that were run with both.

    `more` and `less` are conditions: one method with a recovery and without (`recovered`), else
    the one that keeps more over the sets of both first.
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
    """How much further ahead of the default a set is with one method than with another."""

    more: str
    less: str
    recovered: bool
    calibration: str
    default: str
    quantity: str
    gap: Estimate


def gains(made: Sequence[Joint], default: str | None) -> tuple[list[Gain], list[Shift]]:
    """Compare every two methods that some set was run with, model by model, pattern by pattern."""
    kept: list[Gain] = []
    moved: list[Shift] = []
    for pair in itertools.combinations(made, 2):
        common = [name for name in pair[0].cells.sets if name in pair[1].cells.sets]
        rest = ("model", "pattern", "propagation", "rows", "length", "suite")
        if not common or any(len({getattr(one.cells.condition, name) for one in pair}) > 1
                             for name in rest):  # fmt: skip
            continue
        asked = [(name, [name]) for name in common] + [(MEAN, common)]
        ordered = [each for each in (pair, pair[::-1]) if _recovered(*each)]
        by_total = sorted(pair, key=lambda one: _mean(one, common, 0).value, reverse=True)
        more, less = ordered[0] if ordered else by_total
        head = more.cells.condition.label, less.cells.condition.label, bool(ordered)
        for (name, names), (at, quantity) in itertools.product(
            asked, enumerate(more.cells.quantities)
        ):
            gap = (_mean(more, names, at) - _mean(less, names, at)).estimate()
            if gap.value is not None:
                kept.append(Gain(*head, name, len(names), quantity, gap))
        ours, theirs = leads_over((more, less), default)
        moved += [
            Shift(*head, name, default or SINGLES, quantity, gap.estimate())
            for (name, quantity), gap in between(ours, theirs).items()
        ]
    return kept, moved


def _recovered(more: Joint, less: Joint) -> bool:
    before, after, recovery = more.cells.condition.method.rpartition(" + ")
    asked = recovery.split(",")[0]
    return bool(after) and before == less.cells.condition.method and asked in RECOVERIES


def _mean(found: Joint, names: Sequence[str], quantity: int) -> Contrast:
    return found.contrast(found.mean([found.cells.sets.index(name) for name in names], quantity))
