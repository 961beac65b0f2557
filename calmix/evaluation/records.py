"""What was measured of a model on a task: every choice's log-likelihood, item by item.

Scores, retention and intervals are computed from these records, so that a file answers later
questions without the model. Log-likelihoods are in nats, kept to 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calmix.evaluation.suites import Score

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
        """Whether all parts are of one length, and the right choice is one of the choices."""
        tables = [t for t in (self.loglikelihoods, self.bytes, self.floors) if t]
        needed = (self.gold, self.bytes) if self.loglikelihoods else ()
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
