"""Answers of a smaller model to a user's prompts beside the dense model's, without right answers.

Pure functions over scores of a suite with tasks of kind `prompts`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, zip_longest
from typing import Any

from calmix.evaluation.behaviour import (
    Counted,
    Pair,
    common_tasks,
    item_pairs,
    paired,
    proportion,
    repeat_pairs,
)
from calmix.evaluation.measures import TaskPair
from calmix.evaluation.prompts import FAULTS
from calmix.evaluation.retention import Estimate, task_pairs
from calmix.evaluation.tasks import shared_start


@dataclass(frozen=True)
class Answers:
    """What changed in the answers to a user's prompts.

    Attributes:
        asked: prompts.
        identical: share of answers with the same text under both models; `repeat` is that share for
            the dense model's second answers, None if not measured.
        parted: words after which different answers part, the median; None if all are identical.
        right: right answers of the prompts that have a check; None if there are none.
        sound: answers without faults of the prompts without a check; None if there are none.
        faults: counts of answers without each fault, of those where it could be; `again` is the
            share of the dense model's second answers that have it.
    """

    asked: int
    identical: Estimate
    repeat: float | None
    parted: float | None
    right: Counted | None
    sound: Counted | None
    faults: tuple[Counted, ...]
    again: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        counted = {"right": self.right, "sound": self.sound}
        counts = {name: one and one.to_dict() for name, one in counted.items()}
        return asdict(self) | counts | {"faults": [one.to_dict() for one in self.faults]}


def compare_answers(pair: Pair) -> Answers | None:
    """Compare two models' answers to a user's prompts; None if their suite has none."""
    tasks, again = common_tasks([pair], "prompts"), common_tasks(repeat_pairs([pair]), "prompts")
    if not tasks:
        return None
    texts, second = item_pairs(tasks, "answers"), item_pairs(again, "answers")
    checked, values = item_pairs(tasks, "properties"), item_pairs(tasks, "values")
    sound = [both for both, (one, _) in zip(values, checked, strict=True) if "right" not in one]
    apart = [shared_start([one.split(), other.split()]) for one, other in texts if one != other]
    counts = [_counted(name, tasks) for name in FAULTS]
    known = {one.name: one for one in counts if one is not None}
    right = known.pop("right", None)
    repeated = [_counted(name, again) for name in known]
    return Answers(
        len(texts),
        proportion(len(texts) - len(apart), len(texts)),
        sum(one == other for one, other in second) / len(second) if second else None,
        statistics.median(apart) if apart else None,
        right,
        paired("sound", sound) if sound else None,
        tuple(known.values()),
        {one.name: 1 - one.pruned / one.asked for one in repeated if one},
    )


@dataclass(frozen=True)
class Turned:
    """An item of a suite that only one of two models answers rightly: the dense one if it was
    `lost`, else the smaller one. Both answers."""

    task: str
    item: str
    lost: bool
    dense: str
    small: str


def turned(pairs: Sequence[Pair], most: int) -> list[Turned]:
    """Return at most so many answers that were lost or gained, from each task in turn, those that
    were lost first."""
    by_task = []
    for dense, small in common_tasks(pairs, "answers"):
        if dense.prompts:
            continue
        both = zip(
            dense.items, dense.values, small.values, dense.answers, small.answers, strict=True
        )
        changes = [
            Turned(dense.name, item, before > after, one, other)
            for item, before, after, one, other in both
            if before != after
        ]
        by_task.append(sorted(changes, key=lambda one: not one.lost))
    in_turn = filter(None, chain.from_iterable(zip_longest(*by_task)))
    return sorted(islice(in_turn, most), key=lambda one: not one.lost)


def _counted(name: str, tasks: Sequence[TaskPair]) -> Counted | None:
    """Count the answers that have a property, of those where one of the two is expected to."""
    values = [
        (one.get(name, True), other.get(name, True))
        for one, other in item_pairs(tasks, "properties")
        if name in one or name in other
    ]
    return paired(name, values) if values else None


@dataclass(frozen=True)
class AnswerRow:
    """A prompt with the answers of the dense model and of smaller ones, and what is wrong with
    each; `kl` is each smaller model's distance on the dense model's answer, if known."""

    prompt: str
    answers: tuple[str, ...]
    faults: tuple[tuple[str, ...], ...]
    counts: tuple[bool, ...]
    kl: tuple[float | None, ...]

    @property
    def common(self) -> tuple[int, ...]:
        """Characters that each answer begins with like the dense model's."""
        return tuple(shared_start([self.answers[0], text]) for text in self.answers)

    @property
    def badness(self) -> tuple[float, ...]:
        """A key that is largest for the prompt on which the smaller models lose most."""
        lost = self.counts[0] * sum(not one for one in self.counts[1:])
        more = sum(len(set(one) - set(self.faults[0])) for one in self.faults[1:])
        changed = sum(text != self.answers[0] for text in self.answers[1:])
        return lost, more, changed, sum(one or 0.0 for one in self.kl)


def rows(pairs: Sequence[Pair]) -> list[AnswerRow]:
    """Return all prompts with the answers of the dense model and of each pair's smaller one, the
    worst first. The pairs have one dense model."""
    records = []
    models = [pairs[0][0], *(small for _, small in pairs)]
    tasks = [[task for task in one.tasks if task.prompts] for one in models]
    for each in tasks[1:]:
        task_pairs(tasks[0], each)
    distances = [(one.distance or {}).get("items") or {} for one in models[1:]]
    for several in zip(*tasks, strict=True):
        for at, item in enumerate(several[0].items):
            records.append(
                AnswerRow(
                    several[0].prompts[at],
                    tuple(task.answers[at] for task in several),
                    tuple(
                        tuple(FAULTS[name] for name, met in task.properties[at].items() if not met)
                        for task in several
                    ),
                    tuple(bool(task.values[at]) for task in several),
                    tuple(one.get(item) for one in distances),
                )
            )
    return sorted(records, key=lambda row: row.badness, reverse=True)
