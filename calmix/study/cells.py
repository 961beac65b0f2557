"""The cells of a study: calibration sets x seeds x quantities, one table per condition.

A *condition* is everything that defines a trial except its calibration set and seed. Only sets
under the same condition are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from calmix.errors import InputError, nearest
from calmix.evaluation.measures import (
    Array,
    Ratio,
    TaskPair,
    has_signal,
    judged,
    parts,
    task_weights,
)
from calmix.evaluation.retention import rolled_up, task_pairs
from calmix.options import Measure, Settings
from calmix.pruning.requests import target_of
from calmix.study.results import StudyResults, Trial

TOTAL, WORST = "total", "worst"


@dataclass(frozen=True)
class Condition:
    """The settings that the trials of a table share; `sparsity` is the requested one."""

    model: str
    method: str
    sparsity: float
    pattern: str
    propagation: str | None
    rows: int
    length: int
    suite: str
    label: str = ""  # method, pattern, and other settings that vary within the study
    series: str = ""  # the label without the pattern


CONDITION_FIELDS = "model", "method", "pattern", "propagation", "rows", "length", "suite"
shared = attrgetter(*CONDITION_FIELDS)  # what identifies a condition, or that of a trial


@dataclass(frozen=True)
class Task:
    """A task with the dense model's score under the measure, whether that is a signal, and the
    task's weight in its dimension."""

    name: str
    dimension: str
    score: str
    items: int
    dense: float
    signal: bool
    weight: float = 1.0


@dataclass(frozen=True)
class Cells:
    """All trials of one condition, as tables of sets by *quantities*: the total, the dimensions,
    then the tasks. Values are nan without a trial or without signal."""

    condition: Condition
    per_set: tuple[Trial, ...]  # one trial of each set, in the study's order
    dimensions: tuple[str, ...]
    tasks: tuple[Task, ...]
    trials: tuple[tuple[str, int], ...]  # (set, seed) of each trial
    # For each task with signal `kept`, shape (trials, items), and `whole`, shape (items,);
    # retention is kept.sum() / whole.sum().
    items: dict[int, tuple[Array, Array]]
    means: Array  # retention, mean over available seeds, shape (sets, quantities)
    accuracy: Array  # retention of accuracy (the paper's), mean over seeds
    distance: dict[str, Array]  # to the dense model, mean over seeds: kl (nats), top1, flips

    @property
    def sets(self) -> tuple[str, ...]:
        """The calibration sets."""
        return tuple(one.calibration for one in self.per_set)

    @property
    def seeds(self) -> list[int]:
        """All seeds of any set."""
        return sorted({seed for _, seed in self.trials})

    @property
    def quantities(self) -> tuple[str, ...]:
        """The total and the dimensions."""
        return (TOTAL, *self.dimensions)

    @cached_property
    def weights(self) -> Array:
        """Weights of the tasks with signal in each quantity, shape (quantities, tasks)."""
        known = [task.signal for task in self.tasks]
        unit = np.where(known, np.eye(len(self.tasks)), np.nan)
        return np.nan_to_num(all_quantities(unit, self.tasks, self.dimensions).T)

    def of(self, strategy: str) -> list[int]:
        """Return the positions of the sets made by a strategy."""
        return [at for at, one in enumerate(self.per_set) if one.strategy == strategy]


def all_quantities(values: Array, tasks: Sequence[Task], dimensions: Sequence[str]) -> Array:
    """Compute all quantities from values of the tasks, shape (..., tasks), ignoring nan."""
    weights, of = [task.weight for task in tasks], [task.dimension for task in tasks]
    return rolled_up(values, weights, of, dimensions)


def dimensions_of(results: StudyResults) -> tuple[str, ...]:
    """Return the names of the dimensions, in the suite's order if the study records it."""
    names = dict.fromkeys(name for trial in results.trials for name in trial.dimensions)
    ordered = [name for name in results.suite.get("dimensions", ()) if name in names]
    return tuple(dict.fromkeys([*ordered, *names]))


def left_out(results: StudyResults, settings: Settings) -> set[str]:
    """Return the tasks that are not analysed: those the study excludes, and those left out now."""
    known = {task.name for tasks in results.dense.values() for task in tasks}
    for name in settings.without:
        if name not in known:
            raise InputError(f"--without: the study has no task '{name}': {nearest(name, known)}")
    out = {*results.declaration.exclude, *settings.without}
    if not known - out:
        raise InputError("--without leaves no task: keep at least one")
    return out


def measure_of(results: StudyResults, measure: Measure | None = None) -> Measure:
    """Return the measure that is analysed, by default the study's primary one."""
    if measure is None:
        written = any(task.written for tasks in results.dense.values() for task in tasks)
        measure = "right" if written else "primary"
        if results.declarations:
            measure = results.declaration.primary
    return measure


def tables(
    results: StudyResults, measure: Measure | None = None, without: Collection[str] = ()
) -> list[Cells]:
    """Return one table per condition, ordered by model, method, sparsity and so on, of all tasks
    but some."""
    groups: dict[Condition, list[Trial]] = {}
    for trial in results.trials:
        settings = dict(zip(CONDITION_FIELDS, shared(trial), strict=True))
        key = Condition(sparsity=target_of(trial.pattern).sparsity, **settings)
        groups.setdefault(key, []).append(trial)
    ordered = sorted(groups, key=lambda key: ["" if one is None else one for one in astuple(key)])
    how = results, measure_of(results, measure), without
    return [_cells(_labelled(key, groups), groups[key], *how) for key in ordered]


def method_name(method: str) -> str:
    """Return a method's display name, followed by its options and recovery."""
    from calmix.pruning.methods import methods

    first = re.split("[ ,]", method, maxsplit=1)[0]
    known = methods().get(first)
    return ((known and known.title) or first) + method.removeprefix(first)


def _labelled(key: Condition, every: Collection[Condition]) -> Condition:
    """Label a condition by method, pattern, and any other setting that varies within the study."""
    calibrated = [one for one in every if one.rows] if key.rows else []
    parts: dict[str, set[Any]] = {
        key.model: {one.model for one in every},
        f"{key.propagation} propagation": {one.propagation for one in calibrated},
        f"{key.rows} x {key.length}": {(one.rows, one.length) for one in calibrated},
        f"suite {key.suite}": {one.suite for one in every},
    }
    name = method_name(key.method)
    rest = "".join(f", {part}" for part, distinct in parts.items() if len(distinct) > 1)
    return replace(key, label=f"{name} {key.pattern}{rest}", series=name + rest)


def _cells(
    condition: Condition,
    trials: Sequence[Trial],
    results: StudyResults,
    measure: Measure,
    without: Collection[str],
) -> Cells:
    import pandas as pd  # takes half a second

    dimensions = dimensions_of(results)
    order = list(dict.fromkeys(one.calibration for one in results.trials))
    trials = sorted(trials, key=lambda one: (order.index(one.calibration), one.seed))
    for before, trial in pairwise(trials):
        if (before.calibration, before.seed) == (trial.calibration, trial.seed):
            raise InputError(
                f"the analysis cannot distinguish two trials of {trial.calibration} at seed "
                f"{trial.seed} ({condition.label}; one is {trial.id})"
            )
    first = tuple(next(same) for _, same in groupby(trials, key=lambda one: one.calibration))
    dense = results.dense[condition.model]
    pairs = [
        [both for both in task_pairs(dense, results.scores[one.id]) if both[0].name not in without]
        for one in trials
    ]
    tasks, items, values = _measured(pairs, measure)
    names = [trial.calibration for trial in trials]
    measured = [trial.distance for trial in trials]
    alike = len({one["texts"] for one in measured if one}) == 1  # else distances are not comparable
    divergences = [
        {**one["dimensions"], TOTAL: one["total"]} if alike and one else {} for one in measured
    ]

    def averaged(rows: Any) -> Array:
        """Average rows of trials over the seeds of each set."""
        return pd.DataFrame(rows).groupby(names, sort=False).mean().to_numpy()

    def averaged_by(other: Ratio) -> Array:
        """Return the means of all quantities by another measure."""
        each, _, ratios = _measured(pairs, other)
        return averaged(all_quantities(ratios, each, dimensions))

    distance = {}
    for key, field in (("kl", "kl_mean"), ("top1", "top1")):
        rows = [
            [each.get(name, {}).get(field, math.nan) for name in (TOTAL, *dimensions)]
            for each in divergences
        ]
        distance[key] = averaged(rows)
    return Cells(
        condition,
        first,
        dimensions,
        tasks,
        tuple((trial.calibration, trial.seed) for trial in trials),
        items,
        averaged(all_quantities(values, tasks, dimensions)),
        averaged_by("accuracy"),
        distance | {"flips": averaged_by("flips")},
    )


def _measured(
    trials: Sequence[Sequence[TaskPair]], measure: Ratio
) -> tuple[tuple[Task, ...], dict[int, tuple[Array, Array]], Array]:
    """Return the tasks (for `right`, the abilities), the items of those with signal, and retention,
    shape (trials, tasks)."""
    columns = [*zip(*(judged(pairs, measure) for pairs in trials), strict=True)]
    if measure == "right" and not columns:
        raise InputError("no task has generated answers: use another --measure")
    dense = [column[0][0] for column in columns]
    tasks, items = [], {}
    values = np.full((len(trials), len(dense)), np.nan)
    for at, (before, weight) in enumerate(zip(dense, task_weights(dense, measure), strict=True)):
        signal = has_signal(before, measure)
        measured = [parts(before, after, measure) for _, after in columns[at]]
        tasks.append(
            Task(
                before.name,
                before.dimension,
                measured[0].score,
                len(before.items),
                measured[0].dense,
                signal,
                weight,
            )
        )
        if signal:
            # In the paper's ratio for bits per byte, dense over pruned, `whole` differs by trial.
            # Rewrite `kept` for a `common` one with the same ratio and item derivatives.
            common = parts(before, before, measure).whole
            rescaled = np.stack(
                [
                    each.retention * common
                    + (each.kept - each.retention * each.whole) * (common.sum() / each.whole.sum())
                    for each in measured
                ]
            )
            items[at] = rescaled, common
            values[:, at] = [each.retention for each in measured]
    return tuple(tasks), items, values
