"""Behaviour of a smaller model: generated answers checked by a program, and correct choices.

Items are counted in pairs with the dense model's. The primary measure is the mean over abilities of
right answers relative to the dense model, with its bootstrap interval (`retention`). Intervals of
counts are Wilson's (1927), which do not collapse when all or none of a few items are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from calmix.errors import InputError
from calmix.evaluation.measures import (
    FEW,
    PRIMARY,
    TaskPair,
    Z,
    has_signal,
)
from calmix.evaluation.retention import Estimate, Retention, retention, task_pairs
from calmix.evaluation.scores import CapabilityScores, check_same_form, check_same_suite

Pair = tuple[CapabilityScores, CapabilityScores]  # dense, pruned


@dataclass(frozen=True)
class Counted:
    """Number of items `asked`, and of those right under the `dense` model, the `pruned` one and
    both (`kept`).

    Attributes:
        chance: accuracy of guessing.
        identical: items whose two answers are the same text; None if texts were not stored.
    """

    name: str
    asked: int
    dense: int
    pruned: int
    kept: int
    chance: float = 0.0
    identical: int | None = None

    @property
    def lost(self) -> int:
        """Items right under the dense model only."""
        return self.dense - self.kept

    @property
    def gained(self) -> int:
        """Items right under the pruned model only."""
        return self.pruned - self.kept

    @property
    def ratio(self) -> float | None:
        """Right answers relative to the dense model's; None if that gets too few right."""
        return self.pruned / self.dense if self.dense >= FEW else None

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p: a binomial test of losses against gains."""
        changed, fewer = self.lost + self.gained, min(self.lost, self.gained)
        tail = sum(math.comb(changed, count) for count in range(fewer + 1))
        return min(1.0, 2 * tail / 2**changed)

    @property
    def share(self) -> Estimate:
        """Fraction of the dense model's right answers that stay right."""
        return proportion(self.kept, self.dense)

    @property
    def same(self) -> float | None:
        """Fraction of answers that are the same text under both models."""
        return None if self.identical is None else self.identical / self.asked

    @property
    def accuracy(self) -> tuple[Estimate, Estimate]:
        """Accuracy of the dense and of the pruned model."""
        return proportion(self.dense, self.asked), proportion(self.pruned, self.asked)

    def to_dict(self) -> dict[str, Any]:
        """Return counts and what follows from them as JSON-serialisable data."""
        more = {name: getattr(self, name) for name in ("lost", "gained", "ratio", "p")}
        return asdict(self) | more | {"share": asdict(self.share)}


@dataclass(frozen=True)
class Behaviour:
    """What a smaller model does, beside a dense one.

    Attributes:
        right: the primary measure: right answers relative to the dense model, by ability and their
            mean as `total`. None if answers were not generated.
        answers, abilities: counts of generated answers, pooled and by ability.
        choices: counts of choices, pooled over tasks where the dense model beats chance.
        at_chance, not_run: names of the other tasks.
        form: as in `CapabilityScores`.
        repeat: the dense model against itself, with answers generated again in other batches: what
            rounding alone changes. None if not measured.
    """

    right: Retention | None
    answers: Counted | None
    abilities: tuple[Counted, ...]
    choices: Counted | None
    at_chance: tuple[str, ...]
    not_run: tuple[str, ...]
    form: str
    repeat: Behaviour | None = None

    @property
    def judged(self) -> tuple[Counted, ...]:
        """The abilities in which the dense model has enough right answers."""
        return tuple(one for one in self.abilities if one.dense >= FEW)

    @property
    def counts(self) -> Counted | None:
        """Answers of the judged abilities, which the primary measure is the mean of; of all
        abilities if none is."""
        return add_counts(self.judged) or self.answers

    @property
    def worst(self) -> Counted | None:
        """The ability with the lowest kept fraction; None unless several can be judged."""
        known = self.judged
        return min(known, key=lambda one: one.kept / one.dense) if len(known) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        counts = {
            name: one and one.to_dict()
            for name, one in (("answers", self.answers), ("choices", self.choices))
        }
        return {
            "measure": PRIMARY,
            "right": self.right and self.right.to_dict(),
            **counts,
            "abilities": [one.to_dict() for one in self.abilities],
            "at_chance": [*self.at_chance],
            "not_run": [*self.not_run],
            "form": self.form,
            "repeat": self.repeat and self.repeat.to_dict(),
        }


def behaviour(*pairs: Pair) -> Behaviour:
    """Count which answers and choices survive pruning, from scores of both models on one or more
    suites. A task that occurs in several is taken from the one with the most items."""
    written, chosen = common_tasks(pairs, "written"), common_tasks(pairs, "chosen")
    above_chance = [both for both in chosen if has_signal(both[0], "accuracy")]
    abilities, again = dict.fromkeys(dense.dimension for dense, _ in written), repeat_pairs(pairs)
    counts = (
        count_items(name, [both for both in written if both[0].dimension == name])
        for name in abilities
    )
    return Behaviour(
        retention(*zip(*written, strict=True), measure=PRIMARY) if written else None,
        count_items("all", written),
        tuple(one for one in counts if one),
        count_items("choices", above_chance),
        tuple(both[0].name for both in chosen if both not in above_chance),
        not_run(pairs),
        next((pruned.form for _, pruned in pairs if pruned.form), ""),
        behaviour(*again) if again else None,
    )


def repeat_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the dense models' answers beside those they generated again in other batches."""
    repeated = []
    for dense in (dense for dense, _ in pairs if dense.repeat):
        names = {task.name for task in dense.repeat}
        once = tuple(task for task in dense.tasks if task.name in names)
        again = replace(dense, tasks=dense.repeat, repeat=())
        repeated.append((replace(again, tasks=once), again))
    return repeated


def not_run(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return the tasks that every suite left out because they run generated code."""
    run = {task.name for dense, _ in pairs for task in dense.tasks if task.values}
    return tuple(
        dict.fromkeys(name for _, pruned in pairs for name in pruned.not_run if name not in run)
    )


def common_tasks(pairs: Sequence[Pair], field: str) -> list[TaskPair]:
    """Return both models' scores of the tasks where both have a field (`written`, `chosen`,
    `likely`, `prompts`), each from the suite where it has the most items. An `InputError` unless
    both models were given the same items in the same form."""
    pairs_by_kind: dict[tuple[str, ...], TaskPair] = {}
    for dense, pruned in pairs:
        check_same_suite(pruned.suite, dense.suite)
        check_same_form(dense.form, pruned.form)
        for before, after in task_pairs(dense.tasks, pruned.tasks):
            if not (getattr(before, field) and getattr(after, field)):
                continue
            # Tasks of two suites are the same if their items are of one data set.
            key = before.name, before.dimension, before.items[0].partition("/")[0]
            if len(before.items) > len(pairs_by_kind[key][0].items if key in pairs_by_kind else ()):
                pairs_by_kind[key] = before, after
    return [*pairs_by_kind.values()]


def item_pairs(tasks: Sequence[TaskPair], field: str) -> list[tuple[Any, Any]]:
    """Return a field of both models' items, in pairs, without tasks where either lacks it."""
    both = ((getattr(one, field), getattr(two, field)) for one, two in tasks)
    return [*chain.from_iterable(zip(*rows, strict=True) for rows in both if all(rows))]


def count_items(name: str, tasks: Sequence[TaskPair]) -> Counted | None:
    """Count the items of several tasks together; None if there are none."""
    items, texts = item_pairs(tasks, "values"), item_pairs(tasks, "answers")
    if not items:
        return None
    chance = math.fsum(before.chance * len(before.items) for before, _ in tasks) / len(items)
    identical = sum(one == other for one, other in texts) if len(texts) == len(items) else None
    return replace(paired(name, items), chance=chance, identical=identical)


def add_counts(counts: Sequence[Counted]) -> Counted | None:
    """Add up the counts of several abilities; None if there are none."""
    if not counts:
        return None
    fields = ("asked", "dense", "pruned", "kept")
    return Counted("all", *(sum(getattr(one, field) for one in counts) for field in fields))


def paired(name: str, values: Sequence[tuple[float, float]]) -> Counted:
    """Count items by whether each of two models has them right."""
    both = [(bool(one), bool(other)) for one, other in values]
    dense, small = (sum(column) for column in zip(*both, strict=True))
    return Counted(name, len(both), dense, small, sum(one and other for one, other in both))


def proportion(right: int, of: int) -> Estimate:
    """Return a proportion with Wilson's 95 % interval."""
    if not of:
        return Estimate(None)
    share, z = right / of, Z**2 / of
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def deficit(counts: Counted) -> Estimate:
    """Return how far the second model's share of right answers is behind the first's, with its 95 %
    interval for paired proportions (Newcombe 1998, method 10)."""
    wrong = counts.asked - counts.dense, counts.asked - counts.pruned
    none = wrong[0] - counts.gained
    apart, margins = float(counts.kept * none - counts.lost * counts.gained), 1.0
    for count in (counts.dense, counts.pruned, *wrong):
        margins *= count
    if apart > 0:
        apart = max(0.0, apart - counts.asked / 2)
    phi = apart / math.sqrt(margins) if margins else 0.0
    ends = [tuple(v or 0.0 for v in (e.value, e.low, e.high)) for e in counts.accuracy]
    (p1, l1, u1), (p2, l2, u2) = ends

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return Estimate(p1 - p2, p1 - p2 - reach(p1 - l1, u2 - p2), p1 - p2 + reach(u1 - p1, p2 - l2))


def likelihood(dense: CapabilityScores, pruned: CapabilityScores) -> Retention | None:
    """Return the retention of the tasks scored by likelihood; None if there are none, or if the
    dense model's baselines were not stored."""
    tasks = common_tasks([(dense, pruned)], "likely")
    try:
        return retention(*zip(*tasks, strict=True)) if tasks else None
    except InputError:
        return None
