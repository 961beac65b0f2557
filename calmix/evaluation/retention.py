"""Retention: the fraction of each capability that a pruned model keeps, with confidence intervals.

Pure functions over two models' records of the same items. Tasks are measured by `measures`; a
dimension is the mean over its tasks, the total the mean over dimensions, and the *worst* is the
dimension with the lowest retention. The signal test, the noise floor and the bootstrap are ours
(docs/evaluation.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from calmix.errors import InputError
from calmix.evaluation import measures
from calmix.evaluation.measures import Array, Parts, Ratio, TaskPair, TaskScores, parts
from calmix.evaluation.suites import Score
from calmix.shown import Shown, rounded_percent

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval, 95 % by default; None if undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def bounds(one: Estimate) -> dict[str, float | None]:
    """Return the ends of an interval in per cent, as columns of a table."""
    return {"from": rounded_percent(one.low), "to": rounded_percent(one.high)}


@dataclass(frozen=True)
class TaskRetention:
    """Retention of one task, with the scores of the dense and the pruned model.

    `baseline` is the score without task knowledge, if the measure has one; `signal` is
    whether the dense score exceeds it by more than `noise`. Without signal `kept` has no value.
    """

    name: str
    dimension: str
    score: Score
    items: int
    baseline: float | None
    dense: float
    pruned: float
    dense_accuracy: float | None
    pruned_accuracy: float | None
    noise: float
    signal: bool
    kept: Estimate


@dataclass(frozen=True)
class DimensionRetention:
    """Mean retention over a dimension's tasks with signal; `without_signal` names the others."""

    name: str
    tasks: int
    without_signal: tuple[str, ...]
    kept: Estimate


@dataclass(frozen=True, repr=False)
class Retention(Shown):
    """Retention per task and dimension, in total (mean over dimensions) and at worst."""

    measure: Ratio
    tasks: tuple[TaskRetention, ...]
    dimensions: tuple[DimensionRetention, ...]
    total: Estimate
    worst: str | None
    resamples: int
    seed: int

    def _line(self) -> str:
        value = f"{rounded_percent(self.total.value)} %"
        if self.measure == "right":
            return f"right answers: {value} of the dense model's, worst {self.worst}"
        named = {"kept": "answers", "accuracy": "accuracy"}
        of = dict.fromkeys(named.get(one.score, "likelihood") for one in self.tasks)
        return f"{' and '.join(of)} kept: {value}, worst {self.worst}"

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Retention by dimension, and in `total`."""
        return {one.name: one.kept for one in self.dimensions} | {"total": self.total}

    def _rows(self) -> list[dict[str, Any]]:
        label = "right %" if self.measure == "right" else "kept %"
        return [
            {"dimension": name, label: rounded_percent(one.value), **bounds(one)}
            for name, one in self.estimates.items()
        ]

    def of(self, dimension: str) -> Estimate:
        """Return the retention of a dimension; all None if the measure has none."""
        return self.estimates.get(dimension, Estimate(None))


def retention(
    dense: Sequence[TaskScores],
    pruned: Sequence[TaskScores],
    *,
    measure: Ratio = "primary",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Retention:
    """Compare two models' scores on the same items (definitions: docs/evaluation.md).

    Intervals are the central `level` of a paired bootstrap: each resample draws items with
    replacement, task by task (for `right`, ability by ability), the same ones for both models, and
    recomputes every mean.

    Raises:
        InputError: the models were scored on different tasks or items, or the scores lack
            what the measure needs.
    """
    pairs = measures.judged(task_pairs(dense, pruned), measure)
    if not pairs:
        lacks = "generated" if measure == "right" else "right or wrong"
        raise InputError(f"no task has {lacks} answers: use another --measure")
    counts = {one.name: sum(one.values) if measure == "right" else 0 for one, _ in pairs}
    tasks, points = [], np.full((len(pairs), 1 + resamples), np.nan)
    for (before, after), point in zip(pairs, points, strict=True):
        scored, signal = parts(before, after, measure), measures.has_signal(before, measure)
        if signal:
            point[:] = resampled(before.name, scored, resamples=resamples, seed=seed)
        tasks.append(
            TaskRetention(
                before.name,
                before.dimension,
                scored.score,
                len(before.items),
                scored.baseline,
                scored.dense,
                scored.pruned,
                before.accuracy,
                after.accuracy,
                measures.noise(scored.whole),
                signal,
                interval(point, level, counts[before.name]),
            )
        )
    weights = measures.task_weights([before for before, _ in pairs], measure)
    of, dimensions = [task.dimension for task in tasks], []
    names = list(dict.fromkeys(of))
    total, *rolled = rolled_up(points.T, weights, of, names).T
    for name, point in zip(names, rolled, strict=False):
        members = [task for task in tasks if task.dimension == name]
        kept = interval(point, level, sum(counts[one.name] for one in members))
        silent = tuple(task.name for task in members if not task.signal)
        dimensions.append(DimensionRetention(name, len(members), silent, kept))
    known = {one.name: one.kept.value for one in dimensions if one.kept.value is not None}
    worst = min(known, key=lambda name: known[name], default=None)
    whole = interval(total, level, sum(counts[one.name] for one in tasks if one.signal))
    return Retention(measure, tuple(tasks), tuple(dimensions), whole, worst, resamples, seed)


def rolled_up(
    values: Array, weights: Sequence[float], of: Sequence[str], dimensions: Sequence[str]
) -> Array:
    """Return the mean over dimensions, the weighted mean over the tasks of each, then the tasks,
    from values of shape (..., tasks); nan is ignored. `of` has each task's dimension."""
    members = [[at for at, other in enumerate(of) if other == name] for name in dimensions]
    column = np.asarray(weights)
    stacked = np.stack([nan_mean(values[..., at], -1, column[at]) for at in members], -1)
    return np.concatenate([nan_mean(stacked, -1)[..., None], stacked, values], -1)


def nan_mean(values: Array, axis: int, weights: Array | float = 1.0) -> Array:
    """Return the weighted mean along an axis, ignoring nan; nan where all values are."""
    known = ~np.isnan(values)
    weights = weights * known
    total, count = (np.where(known, values, 0.0) * weights).sum(axis), weights.sum(axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def flips(dense: Sequence[TaskScores], pruned: Sequence[TaskScores]) -> dict[str, Estimate]:
    """Return *flips* (arXiv 2407.09141), the fraction of items right under exactly one of two
    models: the mean over tasks by dimension, and the mean over dimensions as `total`.

    Tasks with a single answer per item are left out. Intervals are from the same bootstrap over
    items as in `retention`, and the same errors are raised.
    """
    if not measures.judged(task_pairs(dense, pruned), "flips"):
        return {}
    return retention(dense, pruned, measure="flips").estimates


def task_pairs(dense: Sequence[TaskScores], pruned: Sequence[TaskScores]) -> list[TaskPair]:
    """Return the tasks of two models in pairs; an `InputError` unless tasks and items are the same,
    which names the first difference."""
    names = [task.name for task in dense], [task.name for task in pruned]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1])) or names[1]
        raise InputError(
            f"the two models were scored on different tasks (first: {odd[0]}): "
            "evaluate both on the same suite"
        )
    pairs = [*zip(dense, pruned, strict=True)]
    for before, after in pairs:
        if (before.items, before.bytes, before.metric) != (after.items, after.bytes, after.metric):
            raise InputError(
                f"the two models were scored on different items of task {before.name} "
                f"({len(before.items)} and {len(after.items)}): evaluate both again"
            )
    return pairs


def item_weights(task: str, count: int, *, resamples: int, seed: int) -> Array:
    """Return how often each resample draws each item, shape (resamples, count).

    The counts depend only on the seed, the task's name and its number of items, so all models are
    resampled alike whatever else is in the suite.
    """
    digest = hashlib.sha256(task.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def resampled(task: str, scored: Parts, *, resamples: int, seed: int) -> Array:
    """Return one task's retention, then that of each resample, shape (1 + resamples,); nan where
    the sum of `whole` is not positive."""
    weights = item_weights(task, len(scored.kept), resamples=resamples, seed=seed)
    retained, whole = weights @ scored.kept, weights @ scored.whole
    ratios = np.divide(retained, whole, out=np.full(resamples, np.nan), where=whole > 0)
    return np.append(scored.retention, ratios)


def interval(point: Array, level: float = LEVEL, right: float = 0) -> Estimate:
    """Return the first value with the central `level` of the resamples that follow it.

    If all are equal, because no answer changed or none is left, the bootstrap says nothing: then
    Wilson's interval (1927) of so many `right` answers all alike, to both sides (ours).
    """
    value, resamples = float(point[0]), point[1:]
    known = resamples[~np.isnan(resamples)]
    if math.isnan(value) or not len(known):
        return Estimate(None if math.isnan(value) else value)
    tail = (1 - level) / 2
    low, high = map(float, np.quantile(known, [tail, 1 - tail]))
    if low == high and right:
        square = NormalDist().inv_cdf(1 - tail) ** 2
        low, high = (max(0.0, low + sign * square / (right + square)) for sign in (-1, 1))
    return Estimate(value, low, high)
