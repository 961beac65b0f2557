"""A model's results on a task, item by item, and the measures computed from them: the score of an
item and how much of it a pruned model retains. Pure functions of records, so that new measures need
only the file, not the model.

Every measure of retention is a ratio of two sums over items, `sum(kept) / sum(whole)`, so one
bootstrap serves all. With l the log-likelihoods of an item's choices and g the right one:

    right         right generated answers, s1 / s0, of all items of an ability together (`pooled`)
    kept          right answers that stay right (kept = s1 s0, whole = s0): gains do not count
    flips         items right under one model only (kept = |s1 - s0|, whole = 1): a distance
    accuracy      1 if the answer is right, else 0
    bits          -l_g, in bits per byte of all answers together
    smoothed      as bits, of (exp(l_g) + exp(u_g)) / 2, with u_g from a unigram code

`right` is the primary measure: the mean over abilities of right answers relative to the dense
model. Accuracy and bits are relative to a baseline f, the score without task knowledge: kept =
s1 - f, whole = s0 - f (negated for bits), without clipping. f is chance for accuracy; for bits the
better of a unigram code and the dense model without the question. Smoothed bits (interpolation
after Jelinek and Mercer; ours) lose at most one bit per answer; otherwise a few short answers would
dominate a task. The measures `accuracy` and `ratio` are defined as in the paper: (s1 - c) / (s0 -
c) and s1 / s0 for accuracy, b0 / b1 for bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, Field

from calmix.errors import InputError
from calmix.evaluation.suites import WRITTEN, Score
from calmix.options import Measure

Array = NDArray[np.float64]
Ratio = Measure | Literal["flips"]  # all that is a ratio of two sums over items

Z = 1.959963984540054  # normal quantile of a two-sided 95 % interval
LN2 = math.log(2)
PRIMARY: Measure = "right"  # decides wherever answers were generated; all else is secondary
ALPHA = 0.05  # of tests and of 95 % intervals
FEW = 10  # an ability is judged only if the dense model gets at least this many answers right
RIGHT_OR_WRONG: tuple[Score, ...] = ("accuracy", "kept", "right")  # scores that are 0 or 1
BITS: tuple[Score, ...] = ("bits", "smoothed")  # lower is better; printed per byte
DIGITS = 3  # decimals of a log-likelihood in nats: finer than bfloat16's rounding


@dataclass(frozen=True)
class TaskScores:
    """Results of one model on one task, item by item.

    Attributes:
        metric: the suite's metric, whose `values` are accuracies from 0 to 1; empty for tasks with
            a single answer per item.
        primary: the score used for retention by default.
        chance: expected accuracy of guessing; 0 if there is no accuracy.
        gold: index of each item's right choice.
        loglikelihoods, bytes: for every choice of every item, in nats and in UTF-8 bytes; empty if
            the model generated its answers.
        baselines: this model's log-likelihoods without the question, if it is a dense model.
        unigram: log-likelihood in nats of each right answer under a unigram code.
        answers: the generated answers, if any; `ended` is 0 for those that were cut.
        prompts: what a user's own prompts ask; empty for other tasks.
        properties: of their answers: what is expected of each, and whether it is so
            (`prompts.properties`).
    """

    name: str
    dimension: str
    metric: str
    primary: Score
    chance: float
    items: tuple[str, ...]
    values: tuple[float, ...] = ()
    gold: tuple[int, ...] = ()
    loglikelihoods: tuple[tuple[float, ...], ...] = ()
    bytes: tuple[tuple[int, ...], ...] = ()
    baselines: Annotated[
        tuple[tuple[float, ...], ...],
        Field(validation_alias=AliasChoices("baselines", "floors")),  # the name in older files
    ] = ()
    unigram: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    ended: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    properties: tuple[dict[str, bool], ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy; None for tasks with a single answer per item."""
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def written(self) -> bool:
        """Whether the model generated its answers, which a program checked."""
        return bool(self.values) and self.metric in WRITTEN

    @property
    def chosen(self) -> bool:
        """Whether its answers were chosen from given options."""
        return bool(self.values) and not self.written

    @property
    def likely(self) -> bool:
        """Whether its retention is measured by likelihood."""
        return self.primary not in RIGHT_OR_WRONG

    @property
    def consistent(self) -> bool:
        """Whether all parts have one length, those needed by likelihood scores are present, and
        every gold index is valid."""
        tables = [t for t in (self.loglikelihoods, self.bytes, self.baselines) if t]
        likely = self.loglikelihoods or self.likely
        needed = (self.gold, self.bytes, self.loglikelihoods) if likely else ()
        parts: tuple[Sequence[Any], ...] = (self.values, self.gold, self.unigram, *tables)
        parts += self.answers, self.ended, self.prompts, self.properties
        choices = [len(row) for row in tables[0]] if tables else []
        return (
            all(len(part) == len(self.items) for part in (*needed, *filter(None, parts)))
            and all([len(row) for row in table] == choices for table in tables)
            and all(0 <= at < count for at, count in zip(self.gold, choices, strict=False))
        )


TaskPair = tuple[TaskScores, TaskScores]  # of the dense and the smaller model


def rounded(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Round log-likelihoods as they are stored."""
    return tuple(tuple(round(float(value), DIGITS) for value in row) for row in rows)


@dataclass(frozen=True)
class Parts:
    """One task under two models, item by item: retention is `kept.sum() / whole.sum()`. `dense`,
    `pruned` and `baseline` (if the measure has one) are the mean scores as printed."""

    score: Score
    kept: Array
    whole: Array
    dense: float = math.nan
    pruned: float = math.nan
    baseline: float | None = None

    @property
    def retention(self) -> float:
        """Retention of the task; nan if the dense model is not above the baseline."""
        whole = float(self.whole.sum())
        return float(self.kept.sum()) / whole if whole > 0 else math.nan


def judged(pairs: Sequence[TaskPair], measure: Ratio) -> list[TaskPair]:
    """Return what a measure judges: for `right` the generated answers pooled by ability, for
    accuracy and flips the tasks with right and wrong answers, else all but answers that one of the
    models was not asked for."""
    answered = [both for both in pairs if both[0].values and both[1].values]
    if measure == "right":
        sides = zip(*(both for both in answered if both[0].written), strict=True)
        return [*zip(*map(pool_tasks, sides), strict=True)]
    if measure in ("accuracy", "flips"):
        return answered
    return [both for both in pairs if both[0].metric not in WRITTEN or both in answered]


def pool_tasks(tasks: Sequence[TaskScores]) -> list[TaskScores]:
    """Return one task per ability, which holds the right and wrong answers of all its tasks."""
    members: dict[str, list[TaskScores]] = {}
    for task in tasks:
        members.setdefault(task.dimension, []).append(task)
    return [
        TaskScores(
            name,
            name,
            some[0].metric,
            "right",
            0.0,
            tuple(f"{one.name}/{item}" for one in some for item in one.items),
            tuple(chain.from_iterable(one.values for one in some)),
        )
        for name, some in members.items()
    ]


def score_of(task: TaskScores, measure: Ratio) -> Score:
    """Return the score of a task under a measure; its primary one if that does not apply (a
    generated answer has no log-likelihood)."""
    if measure == "right":
        return "right"
    if measure in ("accuracy", "ratio", "flips"):
        return "accuracy" if task.values else "bits"
    if measure == "primary" or not task.loglikelihoods:
        return task.primary
    return measure  # type: ignore[return-value]


def item_scores(task: TaskScores, score: Score) -> Array:
    """Return the score of each item, shape (items,). Bits are -l_g in bits, neither per byte nor
    smoothed yet."""
    if score in RIGHT_OR_WRONG:
        return np.asarray(task.values, dtype=float)
    return -of_right_choices(task, task.loglikelihoods) / LN2


def of_right_choices(task: TaskScores, rows: Sequence[Sequence[float]]) -> Array:
    """Return the values of each item's right choice, shape (items,), from those of all choices."""
    return np.array([row[at] for row, at in zip(rows, task.gold, strict=True)], dtype=float)


def baseline_scores(dense: TaskScores, score: Score) -> Array:
    """Return the baseline score of each item, shape (items,); an `InputError` if it is missing."""
    if score in RIGHT_OR_WRONG:
        return np.full(len(dense.items), dense.chance)
    if not dense.unigram:
        raise InputError(
            f"the dense model's scores of task {dense.name} lack the baseline without task "
            "knowledge: evaluate the dense model without --against, or use --measure accuracy"
        )
    codes = -np.asarray(dense.unigram) / LN2
    if not dense.baselines:
        return codes
    return np.minimum(codes, -of_right_choices(dense, dense.baselines) / LN2)


def parts(dense: TaskScores, pruned: TaskScores, measure: Ratio = "primary") -> Parts:
    """Return the terms of retention, `kept` and `whole`, for each item."""
    score = score_of(dense, measure)
    before, after = item_scores(dense, score), item_scores(pruned, score)
    anchored = measure not in ("right", "ratio", "flips")
    anchored = anchored and (measure != "accuracy" or score not in BITS)
    baseline = baseline_scores(dense, score) if anchored else None
    # As printed: a mean, or bits per byte over all answers.
    count = of_right_choices(dense, dense.bytes).sum() if score in BITS else len(before)
    shown = (
        float(before.sum() / count),
        float(after.sum() / count),
        None if baseline is None else float(baseline.sum() / count),
    )
    if measure == "flips":
        return Parts(score, np.abs(after - before), np.ones_like(before), *shown)
    if score == "kept":
        return Parts(score, before * after, before, *shown)
    if baseline is None:
        retained, whole = (before, after) if score in BITS else (after, before)
        return Parts(score, retained, whole, *shown)
    if score == "smoothed":
        # Bits under an even mixture of the model and the baseline code.
        before, after = (1.0 - np.logaddexp2(-bits, -baseline) for bits in (before, after))
    sign = -1.0 if score in BITS else 1.0
    return Parts(score, sign * (after - baseline), sign * (before - baseline), *shown)


def task_weights(dense: Sequence[TaskScores], measure: Ratio = "primary") -> list[float]:
    """Return each task's weight in its dimension: 1, or, if all scores of the dimension are 0 or 1,
    the sum of `whole`, which pools the items of its tasks."""
    if measure in ("ratio", "flips"):
        return [1.0] * len(dense)
    tasks = [task for task in dense if has_signal(task, measure)]
    mixed = {task.dimension for task in tasks if score_of(task, measure) not in RIGHT_OR_WRONG}
    pooled = {
        task.name: float(parts(task, task, measure).whole.sum())
        for task in tasks
        if task.dimension not in mixed
    }
    return [pooled.get(task.name, 1.0) for task in dense]


def noise(whole: Array) -> float:
    """Return the noise floor of a mean over items (ours): half the width of its 95 % interval."""
    return float(Z * whole.std(ddof=1) / math.sqrt(len(whole))) if len(whole) > 1 else math.inf


def has_signal(dense: TaskScores, measure: Ratio = "primary") -> bool:
    """Whether the dense model is above the baseline by more than its noise (ours); for `right`,
    whether it gets at least `FEW` answers right. Flips have no baseline."""
    if measure == "right":
        return sum(dense.values) >= FEW
    if measure == "flips":
        return True
    anchored = "accuracy" if measure == "ratio" else measure
    if anchored == "accuracy" and not dense.values:
        return measure == "ratio"  # the paper's ratio of bits per byte has no baseline
    whole = parts(dense, dense, anchored).whole
    return float(whole.mean()) > noise(whole)
