"""Behaviour kept after pruning: generated answers checked by a program, and correct choices.

Items are counted in pairs with the dense model's. Intervals are Wilson's (1927), which do not
collapse when all or none of a few items are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from calmix.errors import InputError
from calmix.evaluation.measures import RIGHT_OR_WRONG, TaskScores, Z, has_signal
from calmix.evaluation.retention import Estimate, Retention, check_paired, retention
from calmix.evaluation.scores import CapabilityScores, check_same_form, check_same_suite
from calmix.evaluation.suites import WRITTEN

FEW = 5  # an ability is judged only if the dense model gets at least this many items right
Pair = tuple[CapabilityScores, CapabilityScores]  # dense, pruned
TaskPair = tuple[TaskScores, TaskScores]


@dataclass(frozen=True)
class Counted:
    """Number of items `asked`, and of those right under the `dense` model, the `pruned` one and
    both (`kept`); `chance` is the accuracy of guessing."""

    name: str
    asked: int
    dense: int
    pruned: int
    kept: int
    chance: float = 0.0

    @property
    def gained(self) -> int | None:
        """Items right under the pruned model only; None if the dense model gets all right."""
        return self.pruned - self.kept if self.asked > self.dense else None

    @property
    def share(self) -> Estimate:
        """Fraction of the dense model's right answers that stay right."""
        return proportion(self.kept, self.dense)

    @property
    def accuracy(self) -> tuple[Estimate, Estimate]:
        """Accuracy of the dense and of the pruned model."""
        return proportion(self.dense, self.asked), proportion(self.pruned, self.asked)


@dataclass(frozen=True)
class Behaviour:
    """Counts of generated `answers`, pooled and by ability, and of `choices`, pooled over tasks
    where the dense model beats chance; None without items. `at_chance` and `not_run` name the
    other tasks; `form` is that of `CapabilityScores`."""

    answers: Counted | None
    abilities: tuple[Counted, ...]
    choices: Counted | None
    at_chance: tuple[str, ...]
    not_run: tuple[str, ...]
    form: str

    @property
    def worst(self) -> Counted | None:
        """The ability with the lowest kept fraction; None unless several can be judged."""
        known = [one for one in self.abilities if one.dense >= FEW]
        return min(known, key=lambda one: one.kept / one.dense) if len(known) > 1 else None


def behaviour(*pairs: Pair) -> Behaviour:
    """Count which answers and choices survive pruning, from scores of both models on one or more
    suites. A task that occurs in several is taken from the one with the most items."""
    written, chosen = held(pairs, answered), held(pairs, chosen_from)
    above_chance = [both for both in chosen if has_signal(both[0], "accuracy")]
    abilities = dict.fromkeys(dense.dimension for dense, _ in written)
    counts = (counted(name, [both for both in written if both[0].dimension == name])
              for name in abilities)  # fmt: skip
    return Behaviour(
        counted("all", written),
        tuple(one for one in counts if one),
        counted("choices", above_chance),
        tuple(both[0].name for both in chosen if both not in above_chance),
        not_run(pairs),
        next((pruned.form for _, pruned in pairs if pruned.form), ""),
    )


def answered(task: TaskScores) -> bool:
    """Whether a task's answers were generated and checked by a program."""
    return bool(task.values) and task.metric in WRITTEN


def chosen_from(task: TaskScores) -> bool:
    """Whether a task's answers were chosen from given options."""
    return bool(task.values) and task.metric not in WRITTEN


def likely(task: TaskScores) -> bool:
    """Whether retention of a task is measured by likelihood."""
    return task.primary not in RIGHT_OR_WRONG


def not_run(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return the tasks that every suite left out because they run generated code."""
    run = {task.name for dense, _ in pairs for task in dense.tasks if task.values}
    return tuple(dict.fromkeys(name for _, pruned in pairs for name in pruned.not_run
                               if name not in run))  # fmt: skip


def held(pairs: Sequence[Pair], fits: Callable[[TaskScores], bool]) -> list[TaskPair]:
    """Return both models' scores of the tasks that fit, each from the suite where it has the most
    items. With `right_only` scores, only the items that the dense model gets right remain, if there
    are any. An `InputError` unless both models were given the same items in the same form."""
    found: dict[tuple[str, ...], tuple[int, TaskPair]] = {}
    for dense, pruned in pairs:
        check_same_suite(pruned.suite, dense.suite)
        check_paired(dense.tasks, pruned.tasks)
        check_same_form(dense.form, pruned.form)
        part = pruned.right_only and any(any(one.values) for one in dense.tasks if answered(one))
        for before, after in zip(dense.tasks, pruned.tasks, strict=True):
            if not fits(before):
                continue
            # Tasks of two suites are the same if their items are of one data set.
            key = before.name, before.dimension, before.items[0].partition("/")[0]
            if (count := len(before.items)) <= found.get(key, (0,))[0]:
                continue
            if part and answered(before):
                right = before.values
                before, after = (
                    replace(one, items=tuple(compress(one.items, right)),
                            values=tuple(compress(one.values, right)), answers=(), ended=())
                    for one in (before, after)
                )  # fmt: skip
            found[key] = count, (before, after)
    return [both for _, both in found.values()]


def counted(name: str, tasks: Sequence[TaskPair]) -> Counted | None:
    """Count the items of several tasks together; None if there are none."""
    items = [both for before, after in tasks
             for both in zip(before.values, after.values, strict=True)]  # fmt: skip
    if not items:
        return None
    dense, pruned = (sum(map(round, values)) for values in zip(*items, strict=True))
    chance = math.fsum(before.chance * len(before.items) for before, _ in tasks) / len(items)
    return Counted(name, len(items), dense, pruned, sum(round(a * b) for a, b in items), chance)


def proportion(right: int, of: int) -> Estimate:
    """Return a proportion with Wilson's 95 % interval."""
    if not of:
        return Estimate(None)
    share, z = right / of, Z**2 / of
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def likelihood(dense: CapabilityScores, pruned: CapabilityScores) -> Retention | None:
    """Return the retention of the tasks scored by likelihood; None if there are none, or if the
    dense model's baselines were not stored."""
    check_same_suite(pruned.suite, dense.suite)
    tasks = [both for both in zip(dense.tasks, pruned.tasks, strict=True) if likely(both[0])]
    try:
        return retention(*zip(*tasks, strict=True)) if tasks else None
    except InputError:
        return None
