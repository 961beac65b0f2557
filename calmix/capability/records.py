"""What was measured of a model on a task: every choice's log-likelihood, item by item.

Scores, retention and intervals are computed from these records (`measures`, `retention`), so that
a file answers later questions without the model. Log-likelihoods are in nats, kept to 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calmix.capability.suites import WRITTEN, Score

DIGITS = 3  # decimals of a log-likelihood in nats; bfloat16 moves them by more

Floor = Literal["context-free", "uniform", "none"]


@dataclass(frozen=True)
class TaskScores:
    """What one model did on one task, item by item.

    Attributes:
        metric: lm-evaluation-harness's metric, which `values` are.
        primary: the score that retention of this task is about, unless another is asked for.
        chance: expected accuracy of a guess; 0 where there is no accuracy.
        items: identifiers of the items.
        values: accuracy of each item (0 to 1); empty for a task of single answers.
        gold: index of each item's right choice.
        loglikelihoods: of every choice of every item, in nats; empty where the model wrote its
            answers, and in files of format 1.
        bytes: UTF-8 bytes of every choice.
        floor: what the choices score without the knowledge: what this model gives them without
            the question (`context-free`, then `floors` holds it), all the same (`uniform`, where
            they have the answer in common and differ in what is before it), or `none`.
        floors: log-likelihoods in nats of the same choices without the question; empty where
            they were not asked for.
        unigram: log-likelihood in nats of each right answer under a code of single tokens;
            empty where it was not asked for.
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
    floor: Floor = "none"
    floors: tuple[tuple[float, ...], ...] = ()
    unigram: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy; None for a task of single answers."""
        return math.fsum(self.values) / len(self.values) if self.values else None


def rounded(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Return log-likelihoods as they are kept."""
    return tuple(tuple(round(float(value), DIGITS) for value in row) for row in rows)


def from_mapping(value: Mapping[str, Any]) -> TaskScores:
    """Return task scores from the JSON form `dataclasses.asdict` gives."""
    return TaskScores(**{key: _tuples(item) for key, item in value.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def from_old_mapping(value: Mapping[str, Any]) -> TaskScores:
    """Return a task of format 1: accuracies, or the answers' negative log-likelihoods."""
    items, values = tuple(value["items"]), tuple(map(float, value["values"]))
    head = value["name"], value["dimension"], value["metric"]
    if value["kind"] == "accuracy":
        primary: Score = "accuracy" if value["metric"] in WRITTEN else "probability"
        return TaskScores(*head, primary, value["chance"], items, values)
    return TaskScores(
        *head, "bits", 0.0, items, (), (0,) * len(items),
        tuple((-nats,) for nats in values), tuple((size,) for size in value["bytes"]),
    )  # fmt: skip
