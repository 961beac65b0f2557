"""The cells of a study: calibration sets x seeds x quantities, one table a condition.

A *condition* is all that a trial asks for apart from the calibration set and the seed. Only sets
under the same condition are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from calmix.analysis.statistics import Array
from calmix.errors import InputError, nearest
from calmix.evaluation.measures import TaskScores, has_signal, parts, task_weights
from calmix.evaluation.retention import check_paired, nan_mean
from calmix.options import Measure
from calmix.specs import printed, target_of
from calmix.study.results import StudyResults, Trial

TOTAL, WORST = "total", "worst"


@dataclass(frozen=True)
class Condition:
    """What the trials of one table share; `sparsity` is the one asked for."""

    model: str
    method: str
    sparsity: float
    pattern: str
    propagation: str | None
    rows: int
    length: int
    suite: str
    label: str = ""  # names what differs within the study
    series: str = ""  # the label without the pattern


@dataclass(frozen=True)
class Task:
    """One task: its dense model's score under the measure, whether that is a signal, and what it
    counts in its dimension."""

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
    then the tasks. Values are nan where there is no trial or no signal."""

    condition: Condition
    made: tuple[Trial, ...]  # a trial of each set, in the study's order
    seeds: tuple[int, ...]
    dimensions: tuple[str, ...]
    tasks: tuple[Task, ...]
    trials: tuple[tuple[str, int], ...]  # set and seed of each
    items: dict[int, tuple[Array, Array]]  # by task with signal: what every trial keeps of each
    # item, shape (trials, items), and the whole of it; retention is kept.sum() / whole.sum()
    means: Array  # retention, mean over the seeds that are there, shape (sets, quantities)
    accuracy: Array  # retention of accuracy (the paper's), mean over seeds
    # To the dense model: kl in nats a token, top1, flips; of seeds' mean.
    distance: dict[str, Array]
    metrics: tuple[str, ...]
    information: Array  # the metrics, mean over seeds, shape (sets, metrics)

    @property
    def sets(self) -> tuple[str, ...]:
        """The calibration sets."""
        return tuple(one.calibration for one in self.made)

    @property
    def quantities(self) -> tuple[str, ...]:
        """The total and the dimensions."""
        return (TOTAL, *self.dimensions)

    @cached_property
    def weights(self) -> Array:
        """How every quantity is made of the tasks with signal, shape (quantities, tasks)."""
        known = [task.signal for task in self.tasks]
        unit = np.where(known, np.eye(len(self.tasks)), np.nan)
        return np.nan_to_num(rolled_up(unit, self.tasks, self.dimensions).T)

    def of(self, strategy: str) -> list[int]:
        """Return the positions of the sets made in one way."""
        return [at for at, one in enumerate(self.made) if one.strategy == strategy]


def rolled_up(values: Array, tasks: Sequence[Task], dimensions: Sequence[str]) -> Array:
    """Return all quantities from those of the tasks alone, shape (..., tasks), nan left out."""
    weights = np.array([task.weight for task in tasks])
    places = [[at for at, task in enumerate(tasks) if task.dimension == name]
              for name in dimensions]  # fmt: skip
    stacked = np.stack([nan_mean(values[..., at], -1, weights[at]) for at in places], -1)
    return np.concatenate([nan_mean(stacked, -1)[..., None], stacked, values], -1)


def dimensions_of(results: StudyResults) -> tuple[str, ...]:
    """Return the dimensions' names, in the suite's order where the study has it."""
    met = dict.fromkeys(name for trial in results.trials for name in trial.dimensions)
    ordered = [name for name in results.suite.get("dimensions", ()) if name in met]
    return tuple(dict.fromkeys([*ordered, *met]))


def select(
    results: StudyResults, *, method: str | None = None, sparsity: str | None = None
) -> tuple[Trial, ...]:
    """Return the finished trials of one method, sparsity or pattern (`0.6`, `60%`, `2:4`)."""
    trials = results.trials
    if not trials:
        failed = f", {len(results.failed)} failed" if results.failed else ""
        raise InputError(
            f"study {results.name} has no finished trials ({results.planned} planned{failed}): "
            "run it first"
        )
    pattern = None if sparsity is None else printed(target_of(sparsity))
    for name, field, asked, wanted in (
        ("method", "method", method, method), ("sparsity", "pattern", sparsity, pattern)
    ):  # fmt: skip
        known = sorted({getattr(trial, field) for trial in trials})
        if wanted is not None:
            if wanted not in known:
                line = f"no finished trial has the {name} '{asked}': {nearest(wanted, known)}"
                raise InputError(line)
            trials = tuple(trial for trial in trials if getattr(trial, field) == wanted)
    return trials


def tables(results: StudyResults, trials: Sequence[Trial], measure: Measure) -> list[Cells]:
    """Return one table a condition, by method, sparsity, and what else differs."""
    groups: dict[Condition, list[Trial]] = {}
    for trial in trials:
        key = Condition(
            trial.model, trial.method, target_of(trial.pattern).sparsity or trial.sparsity,
            trial.pattern, trial.propagation, trial.rows, trial.length, trial.suite,
        )  # fmt: skip
        groups.setdefault(key, []).append(trial)
    ordered = sorted(groups, key=lambda at: ["" if one is None else one for one in astuple(at)])
    labels = _labels(list(groups))
    return [_cells(labels[key], groups[key], results, measure) for key in ordered]


def method_name(method: str) -> str:
    """Name a method as its papers do, with the options and the recovery that follow."""
    from calmix.pruning.methods import methods

    first = re.split("[ ,]", method, maxsplit=1)[0]
    known = methods().get(first)
    return ((known and known.title) or first) + method.removeprefix(first)


def _labels(keys: Sequence[Condition]) -> dict[Condition, Condition]:
    """Name every condition by method and pattern, and by what else is not the same throughout."""
    calibrated, found = [key for key in keys if key.rows] or keys, {}

    def differs(name: str, among: Sequence[Condition]) -> bool:
        return len({getattr(key, name) for key in among}) > 1

    for key in keys:
        name, model = method_name(key.method), f", {key.model}" if differs("model", keys) else ""
        rest = ""
        if differs("propagation", calibrated) and key.propagation is not None:
            rest += f", {key.propagation} propagation"
        if key.rows and (differs("rows", calibrated) or differs("length", calibrated)):
            rest += f", {key.rows} x {key.length}"
        if differs("suite", keys):
            rest += f", suite {key.suite}"
        series = f"{name}{model}{rest}"
        found[key] = replace(key, label=f"{name} {key.pattern}{model}{rest}", series=series)
    return found


def _cells(
    condition: Condition, trials: Sequence[Trial], results: StudyResults, measure: Measure
) -> Cells:
    dimensions = dimensions_of(results)
    first = {trial.calibration: trial for trial in reversed(trials)}
    names = [name for name in dict.fromkeys(one.calibration for one in results.trials)
             if name in first]  # fmt: skip
    seeds = tuple(sorted({trial.seed for trial in trials}))
    each = [(trial.calibration, trial.seed) for trial in trials]
    places = tuple(zip(*((names.index(name), seeds.index(seed)) for name, seed in each),
                       strict=True))  # fmt: skip
    for trial, own in zip(trials, each, strict=True):
        if each.count(own) > 1:
            raise InputError(
                f"two trials of {trial.calibration} at seed {trial.seed} ({condition.label}) "
                f"differ in nothing the analysis knows (one is {trial.id})"
            )
    dense = results.dense[condition.model]
    pruned = [results.scores[trial.id] for trial in trials]
    for scores in pruned:
        check_paired(dense, scores)
    tasks, items, values = _measured(dense, pruned, measure)
    accuracies = values if measure == "accuracy" else _measured(dense, pruned, "accuracy")[2]
    flips = np.array([
        [np.not_equal(before.values, after.values).mean() if before.values and after.values
         else math.nan for before, after in zip(dense, scores, strict=True)]
        for scores in pruned
    ])  # fmt: skip
    metrics = tuple(dict.fromkeys(name for trial in trials for name in trial.information))

    def table(rows: Any) -> Array:
        """Return the mean over each set's seeds of a row a trial."""
        found = np.full((len(names), len(seeds), len(rows[0])), np.nan)
        found[places] = rows
        return nan_mean(found, 1)

    def rolled(of_tasks: Array) -> Array:
        return table(rolled_up(of_tasks, tasks, dimensions))

    return Cells(
        condition, tuple(first[name] for name in names), seeds, dimensions, tasks, tuple(each),
        items, rolled(values), rolled(accuracies),
        {"kl": table(_distance(trials, dimensions, "kl_mean")),
         "top1": table(_distance(trials, dimensions, "top1")), "flips": rolled(flips)},
        metrics,
        table([[one.information.get(name, math.nan) for name in metrics] for one in trials]),
    )  # fmt: skip


def _distance(trials: Sequence[Trial], dimensions: Sequence[str], field: str) -> list[list[float]]:
    """Return a distance's total and dimensions by trial; nan if trials saw different texts."""
    same = len({trial.distance["texts"] for trial in trials if trial.distance}) == 1
    rows = []
    for trial in trials:
        known = trial.distance if same and trial.distance else {"total": {}, "dimensions": {}}
        each = [known["total"], *(known["dimensions"].get(name, {}) for name in dimensions)]
        rows.append([part.get(field, math.nan) for part in each])
    return rows


def _measured(
    dense: Sequence[TaskScores], pruned: Sequence[Sequence[TaskScores]], measure: Measure
) -> tuple[tuple[Task, ...], dict[int, tuple[Array, Array]], Array]:
    """Return the tasks, the items of those with signal, and retention, shape (trials, tasks)."""
    tasks, items = [], {}
    values = np.full((len(pruned), len(dense)), np.nan)
    for at, (before, weight) in enumerate(zip(dense, task_weights(dense, measure), strict=True)):
        signal = has_signal(before, measure)
        made = [parts(before, scores[at], measure) for scores in pruned]
        tasks.append(
            Task(before.name, before.dimension, made[0].score, len(before.items), made[0].dense,
                 signal, weight)
        )  # fmt: skip
        if signal:
            # Of bits per byte the paper's ratio is dense over pruned: its whole is the trial's own.
            # kept is put over one whole, with the same ratio and the same derivative by items.
            whole = parts(before, before, measure).whole
            kept = np.stack([
                each.retention * whole
                + (each.kept - each.retention * each.whole) * (whole.sum() / each.whole.sum())
                for each in made
            ])  # fmt: skip
            items[at] = kept, whole
            values[:, at] = [each.retention for each in made]
    return tuple(tasks), items, values
