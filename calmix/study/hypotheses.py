"""The comparisons that a study declared before its first trial, judged by its primary measure.

Each is a contrast of the joint bootstrap. p-values are corrected by Holm over all declared
comparisons, also those still to be run. Verdicts are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from calmix.options import Settings
from calmix.study.bootstrap import Contrast, Interval, Joint, Testable, holm, joined
from calmix.study.cells import Cells, shared, tables
from calmix.study.declaration import Declaration
from calmix.study.results import StudyResults, Trial


@dataclass(frozen=True)
class TestedComparison(Testable):
    """A declared comparison on one model.

    Attributes:
        gap: `of` minus `over`; no value without finished trials on both sides.
        seeds: whether the spread over seeds is from the compared conditions or pooled over all of
            the model, or unknown: then the interval is over items alone.
        best: the sets that `best_of` chose.
        level: whether the interval is inside the declared margin and covers seeds.
        predicted: whether the value is in the predicted interval, if there is one.
        refuted: whether the interval refutes the prediction, if the study says what would.
    """

    name: str
    model: str
    gap: Interval
    seeds: Literal["own", "pooled", "unknown"]
    best: tuple[str, ...] = ()
    level: bool = False
    predicted: bool | None = None
    refuted: bool | None = None
    p_corrected: float | None = None

    @property
    def verdict(self) -> str:
        """`more` or `less` if interval and corrected p exclude 0, else `level`, or that it cannot
        be told."""
        if self.gap.clear and self.significant:
            return "more" if (self.gap.value or 0) > 0 else "less"
        return "level" if self.level else "cannot be told"


def judge_comparisons(
    results: StudyResults, settings: Settings, without: Iterable[str] = ()
) -> list[TestedComparison]:
    """Judge what a study declared, each model by itself; `without` leaves out more tasks."""
    declared, comparisons = results.declaration, list[TestedComparison]()
    if not declared.comparisons:
        return comparisons
    every = tables(results, declared.primary, {*declared.exclude, *without})
    known = {trial.key: trial for trial in results.trials}
    used = [known[key] for key in declared.keys if key in known]

    @cache
    def places(*start: int) -> dict[Any, tuple[Joint, int]]:
        """Return where the sets under each condition are: on all items, or on half of them."""
        cells = [half_items(one, *start) for one in every] if start else every
        return {
            (*shared(one.cells.condition), name): (one, at)
            for one in joined(cells, settings, used)
            for at, name in enumerate(one.cells.sets)
        }

    def total(trial: Trial) -> float:
        """Return the total of a trial's set on the items of odd position."""
        one, at = places(0)[*shared(trial), trial.calibration]
        return -math.inf if math.isnan(one.values[at, 0]) else float(one.values[at, 0])

    for name, comparison in declared.comparisons.items():
        split = "best_of" in comparison["of"] or "best_of" in comparison["over"]
        for model in dict.fromkeys(pair.model for pair in declared.pairs[name]):
            gaps, best = list[Contrast](), list[str]()
            for pair in declared.pairs[name]:
                sides = [[known[key] for key in side if key in known] for side in pair.sides]
                if pair.model != model or not all(sides):
                    continue
                means, place_of = list[Contrast](), places(1) if split else places()
                for side in sides:
                    trial = max(side, key=total) if split else side[0]
                    if len({one.calibration for one in side}) > 1:
                        best.append(trial.calibration)
                    joint, at = place_of[*shared(trial), trial.calibration]
                    means.append(joint.mean([at], 0))
                gaps.append(means[0] - means[1])
            comparisons.append(_judged(name, model, gaps, best, declared))
    corrected = holm([one.p for one in comparisons])
    return [replace(one, p_corrected=p) for one, p in zip(comparisons, corrected, strict=True)]


def _judged(
    name: str,
    model: str,
    gaps: Sequence[Contrast],
    best: Sequence[str],
    declared: Declaration,
) -> TestedComparison:
    """Judge the mean of the gaps of one comparison on one model."""
    if not gaps:
        return TestedComparison(name, model, Interval(None), "unknown")
    mean = sum(gaps[1:], gaps[0]) * (1 / len(gaps))
    gap, joints = mean.estimate(test=True), mean.parts
    seeds: Literal["own", "pooled", "unknown"] = "own"
    if any(one.pooled for one in joints):
        seeds = "pooled"
    if not all(one.freedom for one in joints):
        seeds = "unknown"
    head = name, model, gap, seeds, tuple(best)
    if gap.value is None or gap.low is None or gap.high is None:
        return TestedComparison(*head)
    value, low, high = (100 * number for number in (gap.value, gap.low, gap.high))
    margin, comparison = declared.margin, declared.comparisons[name]
    predict, refuted = comparison.get("predict"), comparison.get("refuted")
    return TestedComparison(
        *head,
        level=seeds != "unknown" and margin is not None and -margin <= low and high <= margin,
        predicted=predict and predict[0] <= value <= predict[1],
        refuted=refuted
        and (high < refuted.get("below", -math.inf) or low > refuted.get("above", math.inf)),
    )


def half_items(cells: Cells, start: int) -> Cells:
    """Return a condition on every second item of each task, from the first (0) or second (1)."""
    items = {
        at: (each[:, start::2], whole[start::2])
        for at, (each, whole) in cells.items.items()
        if whole[start::2].sum() > 0
    }
    tasks = tuple(
        replace(task, signal=at in items, items=len(items[at][1]) if at in items else 0)
        for at, task in enumerate(cells.tasks)
    )
    return replace(cells, items=items, tasks=tasks)
