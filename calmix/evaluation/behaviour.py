"""What a pruned model still does: generated answers that a program checked, and right choices.

Counts of items, each paired with the dense model's; an interval is Wilson's (1927), which does not
collapse where all or none of a few items are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from calmix.errors import InputError
from calmix.evaluation.measures import RIGHT_OR_WRONG, TaskScores, Z, has_signal
from calmix.evaluation.retention import Estimate, Retention, check_paired, retention
from calmix.evaluation.scores import CapabilityScores, check_same_suite
from calmix.evaluation.suites import WRITTEN

FEW = 5  # items that the dense model gets right: with fewer no ability is called the worst
Pair = tuple[CapabilityScores, CapabilityScores]  # dense, pruned
TaskPair = tuple[TaskScores, TaskScores]


@dataclass(frozen=True)
class Counted:
    """Items `asked`, and those right under the `dense` model, the `pruned` one, both (`kept`);
    `chance` is the share that a guess gets right."""

    name: str
    asked: int
    dense: int
    pruned: int
    kept: int
    chance: float = 0.0

    @property
    def gained(self) -> int | None:
        """Items right under the pruned model alone; None where no other could be."""
        return self.pruned - self.kept if self.asked > self.dense else None

    @property
    def share(self) -> Estimate:
        """Of the items the dense model gets right, the share that is still right."""
        return proportion(self.kept, self.dense)

    @property
    def accuracy(self) -> tuple[Estimate, Estimate]:
        """The share of all items that is right, of the dense and of the pruned model."""
        return proportion(self.dense, self.asked), proportion(self.pruned, self.asked)


@dataclass(frozen=True)
class Behaviour:
    """Generated `answers`, pooled and by ability, and `choices`, pooled over the tasks on which the
    dense model is above chance; None where nothing was asked. Tasks `at_chance` and those `not_run`
    are named; `form` is that of `CapabilityScores`."""

    answers: Counted | None
    abilities: tuple[Counted, ...]
    choices: Counted | None
    at_chance: tuple[str, ...]
    not_run: tuple[str, ...]
    form: str

    @property
    def worst(self) -> Counted | None:
        """The ability of which least is kept, of several that the dense model has."""
        known = [one for one in self.abilities if one.dense >= FEW]
        return min(known, key=lambda one: one.kept / one.dense) if len(known) > 1 else None


def behaviour(*pairs: Pair) -> Behaviour:
    """Return what pruned models' scores say of behaviour, beside the dense model's on the same
    suites; a task that several hold counts where it has most items."""
    check_pairs(pairs)
    written, chosen = held(pairs, answered), held(pairs, chosen_from)
    known = [one for one in chosen if has_signal(one[0], "accuracy")]
    abilities = dict.fromkeys(before.dimension for before, _ in written)
    counts = (counted(name, [both for both in written if both[0].dimension == name])
              for name in abilities)  # fmt: skip
    return Behaviour(
        counted("all", written),
        tuple(one for one in counts if one),
        counted("choices", known),
        tuple(one[0].name for one in chosen if one not in known),
        not_run(pairs),
        next((pruned.form for _, pruned in pairs if pruned.form), ""),
    )


def answered(task: TaskScores) -> bool:
    """Whether a task's answers were generated, and checked."""
    return bool(task.values) and task.metric in WRITTEN


def chosen_from(task: TaskScores) -> bool:
    """Whether a task's answers were chosen from several."""
    return bool(task.values) and task.metric not in WRITTEN


def likely(task: TaskScores) -> bool:
    """Whether retention of a task is of likelihood."""
    return task.primary not in RIGHT_OR_WRONG


def not_run(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return the tasks that were left out in all suites, as they run code."""
    run = {task.name for dense, _ in pairs for task in dense.tasks if task.values}
    return tuple(dict.fromkeys(name for _, pruned in pairs for name in pruned.not_run
                               if name not in run))  # fmt: skip


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Refuse scores of two models that were not asked the same, with an `InputError`."""
    for dense, pruned in pairs:
        check_same_suite(pruned.suite, dense.suite)
        check_paired(dense.tasks, pruned.tasks)
        if dense.form and pruned.form and dense.form != pruned.form:
            raise InputError(
                "one model was asked in its chat template, the other by worked examples: give "
                "both the same tokenizer and template, and evaluate again"
            )


def held(pairs: Sequence[Pair], fits: Callable[[TaskScores], bool]) -> list[TaskPair]:
    """Return both models' scores of the tasks that fit, each from where it has most items; of those
    that were asked for what the dense model gets right, no others."""
    found: dict[str, tuple[TaskScores, TaskScores, bool]] = {}
    for dense, pruned in pairs:
        for before, after in zip(dense.tasks, pruned.tasks, strict=True):
            most = len(found[before.name][0].items) if before.name in found else 0
            if fits(before) and len(before.items) > most:
                found[before.name] = before, after, pruned.right_only and answered(before)
    return [(_right(before, before), _right(before, after)) if some else (before, after)
            for before, after, some in found.values()]  # fmt: skip


def _right(dense: TaskScores, task: TaskScores) -> TaskScores:
    """Return scores of the items that the dense model gets right alone."""
    some = [at for at, value in enumerate(dense.values) if value]
    items, values = tuple(task.items[at] for at in some), tuple(task.values[at] for at in some)
    return replace(task, items=items, values=values, answers=(), ended=())


def counted(name: str, tasks: Sequence[TaskPair]) -> Counted | None:
    """Return the items of several tasks, counted; None where there are none."""
    items = [both for before, after in tasks
             for both in zip(before.values, after.values, strict=True)]  # fmt: skip
    if not items:
        return None
    dense, pruned = (sum(map(round, some)) for some in zip(*items, strict=True))
    guessed = math.fsum(before.chance * len(before.items) for before, _ in tasks) / len(items)
    return Counted(name, len(items), dense, pruned, sum(round(a * b) for a, b in items), guessed)


def proportion(right: int, of: int) -> Estimate:
    """Return a share of items with Wilson's 95 % interval."""
    if not of:
        return Estimate(None)
    share, z = right / of, Z**2 / of
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def likelihood(dense: CapabilityScores, pruned: CapabilityScores) -> Retention | None:
    """Return the retention of the tasks scored by likelihood; None where there are none, or where
    the dense model's baselines were not kept."""
    check_same_suite(pruned.suite, dense.suite)
    own = [both for both in zip(dense.tasks, pruned.tasks, strict=True) if likely(both[0])]
    try:
        return retention(*zip(*own, strict=True)) if own else None
    except InputError:
        return None
