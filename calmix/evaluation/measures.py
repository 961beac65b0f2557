"""What a model did on a task, item by item, and measures of it: the score of an item, and what
share of it a pruned model has kept. Pure functions of records, so that a file answers later
questions without the model.

Every measure of retention is a ratio of two sums over items, `sum(kept) / sum(whole)`, so that
one bootstrap serves them all. With l the log-likelihoods of an item's choices, g the right one:

    probability   exp(l_g) / sum_i exp(l_i)
    margin        (l_g - max over the others) / (bytes of the right one), in bits
    bits          -l_g, in bits per byte of all the answers together
    smoothed      the same of (exp(l_g) + exp(u_g)) / 2, u_g by a code of single tokens
    accuracy      whether the answer is right: 0 or 1
    kept          the same, of the items that the dense model gets right (kept = s1 s0, whole = s0):
                  paired, so that what two models get right by luck is no noise; gains do not count

Ours count from a floor f, what a model without the knowledge scores: kept = s1 - f, whole =
s0 - f (bits negatively), nothing clipped. f is the dense model's own score without the question,
a code of single tokens for bits, chance for an accuracy. Smoothed bits (interpolation after
Jelinek and Mercer; ours) lose at most one bit on an answer, or a few short ones would decide a
task. Measures `accuracy` and `ratio` are the paper's figures as they read: (s1 - c) / (s0 - c)
and s1 / s0 of accuracies, b0 / b1 of bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calmix.errors import InputError
from calmix.evaluation.suites import Measure, Score

Array = NDArray[np.float64]

Z = 1.959963984540054  # normal quantile of a two-sided 95 % interval
LN2 = math.log(2)
RIGHT_OR_WRONG: tuple[Score, ...] = ("accuracy", "kept")  # scores of answers that are either
BITS: tuple[Score, ...] = ("bits", "smoothed")  # the less the better; per byte as they are printed
DIGITS = 3  # decimals of a log-likelihood in nats; bfloat16 moves them by more


@dataclass(frozen=True)
class TaskScores:
    """What one model did on one task, item by item.

    Attributes:
        metric: the suite's, which `values` are: accuracies from 0 to 1, none
            for a task of single answers.
        primary: the score that retention of this task is about, unless another is asked for.
        chance: expected accuracy of a guess; 0 where there is no accuracy.
        gold: index of each item's right choice.
        loglikelihoods, bytes: of every choice of every item, in nats and in UTF-8; none where
            the model wrote its answers.
        floor: what the choices score without the knowledge: what this model gives them without
            the question (`context-free`, in `floors`), all the same (`uniform`), or `none`.
        unigram: log-likelihood in nats of each right answer under a code of single tokens.
        answers: what the model wrote, of a task that is asked; `ended` is 0 where one was cut.
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
    floor: Literal["context-free", "uniform", "none"] = "none"
    floors: tuple[tuple[float, ...], ...] = ()
    unigram: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    ended: tuple[int, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy; None for a task of single answers."""
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def consistent(self) -> bool:
        """Whether all parts are of one length, those there that a score by likelihood needs, and
        the right choice is one of the choices."""
        tables = [t for t in (self.loglikelihoods, self.bytes, self.floors) if t]
        likely = self.loglikelihoods or self.primary not in RIGHT_OR_WRONG
        needed = (self.gold, self.bytes, self.loglikelihoods) if likely else ()
        parts = (self.values, self.gold, self.unigram, self.answers, self.ended, *tables)
        choices = [len(row) for row in tables[0]] if tables else []
        return (
            all(len(part) == len(self.items) for part in (*needed, *filter(None, parts)))
            and all([len(row) for row in table] == choices for table in tables)
            and all(0 <= at < count for at, count in zip(self.gold, choices, strict=False))
        )


def rounded(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Return log-likelihoods as they are kept."""
    return tuple(tuple(round(float(value), DIGITS) for value in row) for row in rows)


@dataclass(frozen=True)
class Parts:
    """One task of two models, item by item: retention is `kept.sum() / whole.sum()`; the scores of
    both and their floor, if the measure has one, as they are printed."""

    score: Score
    kept: Array
    whole: Array
    dense: float = math.nan
    pruned: float = math.nan
    floor: float | None = None

    @property
    def retention(self) -> float:
        """The task's retention; nan where the dense model has nothing to keep."""
        whole = float(self.whole.sum())
        return float(self.kept.sum()) / whole if whole > 0 else math.nan


def score_of(task: TaskScores, measure: Measure) -> Score:
    """Return by which score a task is judged under a measure: its primary one where it lacks that
    (a single answer has no probability among choices, a written one no log-likelihood)."""
    if measure in ("accuracy", "ratio"):
        return "accuracy" if task.values else "bits"
    if measure == "primary" or not task.loglikelihoods:
        return task.primary
    if measure not in BITS and all(len(row) < 2 for row in task.loglikelihoods):
        return task.primary
    return measure  # type: ignore[return-value]


def item_scores(task: TaskScores, score: Score) -> Array:
    """Return the score of each item, shape (items,); bits as -l_g in bits, not yet per byte nor
    smoothed."""
    if score in RIGHT_OR_WRONG:
        return np.asarray(task.values, dtype=float)
    values = task.loglikelihoods
    right = np.array([row[gold] for row, gold in zip(values, task.gold, strict=True)])
    if score in BITS:
        return -right / LN2
    table = np.array(list(zip_longest(*values, fillvalue=-np.inf))).T
    if score == "probability":
        top = table.max(1)
        return np.exp(right - top) / np.exp(table - top[:, None]).sum(1)
    table[np.arange(len(values)), list(task.gold)] = -np.inf
    return (right - table.max(1)) / LN2 / _sizes(task)


def _sizes(task: TaskScores) -> Array:
    """Return the bytes of each right answer, shape (items,)."""
    return np.array([row[at] for row, at in zip(task.bytes, task.gold, strict=True)], dtype=float)


def floor_scores(dense: TaskScores, score: Score) -> Array:
    """Return what each item scores without the knowledge, shape (items,).

    An `InputError` says where the scores hold no floors.
    """
    count, ignorant = len(dense.items), replace(dense, loglikelihoods=dense.floors)
    if score in RIGHT_OR_WRONG:
        return np.full(count, dense.chance)
    if score in BITS and dense.unigram:
        codes = -np.asarray(dense.unigram) / LN2
        return np.minimum(codes, item_scores(ignorant, score)) if dense.floors else codes
    if score not in BITS and dense.floors:
        return item_scores(ignorant, score)
    if score not in BITS and dense.floor == "uniform":
        share = [1 / len(row) for row in dense.loglikelihoods]
        return np.array(share) if score == "probability" else np.zeros(count)
    raise InputError(
        f"the scores of task {dense.name} hold no score without the knowledge, which a dense "
        "model's need: evaluate it without --against, or ask for --measure accuracy"
    )


def parts(dense: TaskScores, pruned: TaskScores, measure: Measure = "primary") -> Parts:
    """Return what of each item is kept, and the whole of it."""
    score = score_of(dense, measure)
    before, after = item_scores(dense, score), item_scores(pruned, score)
    anchored = measure != "ratio" and (measure != "accuracy" or score not in BITS)
    floor = floor_scores(dense, score) if anchored else None
    # As they are printed: a mean, or bits per byte of all answers.
    count = _sizes(dense).sum() if score in BITS else len(before)
    shown = (float(before.sum() / count), float(after.sum() / count),
             None if floor is None else float(floor.sum() / count))  # fmt: skip
    if score == "kept":
        return Parts(score, before * after, before, *shown)
    if floor is None:
        kept, whole = (before, after) if score in BITS else (after, before)
        return Parts(score, kept, whole, *shown)
    if score == "smoothed":
        # Bits under the even mixture of the model and the floor's code.
        before, after = (1.0 - np.logaddexp2(-bits, -floor) for bits in (before, after))
    sign = -1.0 if score in BITS else 1.0
    return Parts(score, sign * (after - floor), sign * (before - floor), *shown)


def task_weights(dense: Sequence[TaskScores], measure: Measure = "primary") -> list[float]:
    """Return what each task counts in its dimension: 1, or where all of a dimension's tasks are
    right or wrong what the dense model has to keep of it, which pools their items."""
    known = [task for task in dense if measure != "ratio" and has_signal(task, measure)]
    mixed = {task.dimension for task in known if score_of(task, measure) not in RIGHT_OR_WRONG}
    pooled = {task.name: float(parts(task, task, measure).whole.sum())
              for task in known if task.dimension not in mixed}  # fmt: skip
    return [pooled.get(task.name, 1.0) for task in dense]


def noise(whole: Array) -> float:
    """Return the noise floor of a mean over items (ours): half its 95 % interval."""
    return float(Z * whole.std(ddof=1) / math.sqrt(len(whole))) if len(whole) > 1 else math.inf


def has_signal(dense: TaskScores, measure: Measure = "primary") -> bool:
    """Whether the dense model is beyond its own noise of knowing nothing (ours)."""
    judged = "accuracy" if measure == "ratio" else measure
    if judged == "accuracy" and not dense.values:
        return measure == "ratio"  # the paper's ratio of bits per byte of a text has no floor
    whole = parts(dense, dense, judged).whole
    return float(whole.mean()) > noise(whole)
