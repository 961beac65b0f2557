"""The cells of a study: calibration sets x seeds x quantities, one table a condition.

A *condition* is all that a trial asks for apart from the calibration set and the seed: model,
method, pattern and so on. Only sets under the same condition are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from calmix.analysis.statistics import Array
from calmix.errors import InputError, nearest
from calmix.evaluation.measures import Measure, Parts, has_signal, mean_score, parts
from calmix.evaluation.records import TaskScores
from calmix.evaluation.retention import check_paired
from calmix.study.results import StudyResults, Trial

TOTAL = "total"
WORST = "worst"
APART = "apart"  # the total without the tasks whose benchmark either set holds a half of
DISTANCES = ("kl", "top1", "flips")  # KL in nats a token; shares of tokens and of items


@dataclass(frozen=True)
class Condition:
    """What the trials of one table share; `label` names what differs within the study.

    `sparsity` is the one asked for: what a trial reached differs from it by rounding. `series` is
    the label without the pattern: what conditions of several sparsities have in common. `way` is
    the label without the model.
    """

    model: str
    method: str
    pattern: str
    sparsity: float
    propagation: str | None
    rows: int
    length: int
    suite: str
    label: str
    series: str
    way: str

    @property
    def unstructured(self) -> bool:
        """Whether the pattern is a share of each group, not N:M."""
        return self.pattern.endswith("%")


@dataclass(frozen=True)
class Task:
    """One task: its dense model's score under the measure, and whether that is a signal."""

    name: str
    dimension: str
    score: str
    items: int
    dense: float
    signal: bool


@dataclass(frozen=True)
class Items:
    """What is kept of each item of one task with signal: `kept.sum() / whole.sum()`.

    Attributes:
        task: its name.
        at: position among all tasks.
        kept: shape (trials, items), trials in the order of `Cells.trials`.
        whole: shape (items,).
    """

    task: str
    at: int
    kept: Array
    whole: Array


@dataclass(frozen=True)
class Cells:
    """All trials of one condition.

    The last axis of `values` holds the total, the dimensions, then the tasks; nan where there is
    no trial or no signal.

    Attributes:
        sets, strategies, kinds: calibration sets in the study's order, how each was made, and
            what a single source leans to.
        halves: for each set the tasks that are the other half of a benchmark it was made of.
        mixes: for each set the shares of its sources; empty where it is made of none.
        trials: (set, seed) of every trial, by position.
        values: retention, shape (sets, seeds, 1 + dimensions + tasks).
        accuracy: retention of accuracy (the paper's), shape (sets, seeds, 1 + dimensions).
        distance: to the dense model by `DISTANCES`, each of that shape; nan where not measured.
        metrics, information: names, and their means over seeds, shape (sets, metrics).
    """

    condition: Condition
    sets: tuple[str, ...]
    strategies: tuple[str, ...]
    kinds: tuple[str, ...]
    halves: tuple[tuple[str, ...], ...]
    mixes: tuple[dict[str, float], ...]
    seeds: tuple[int, ...]
    dimensions: tuple[str, ...]
    tasks: tuple[Task, ...]
    trials: tuple[tuple[int, int], ...]
    items: tuple[Items, ...]
    values: Array
    accuracy: Array
    distance: dict[str, Array]
    metrics: tuple[str, ...]
    information: Array

    @property
    def quantities(self) -> tuple[str, ...]:
        """The total and the dimensions, in the order of the last axis of `values`."""
        return (TOTAL, *self.dimensions)

    @cached_property
    def weights(self) -> Array:
        """How every quantity is made of the tasks with signal, shape (quantities, tasks)."""
        signal = [task.signal for task in self.tasks]
        unit = np.where(signal, np.eye(len(self.tasks)), np.nan)
        return np.nan_to_num(rolled_up(unit, self.tasks, self.dimensions).T)

    @cached_property
    def means(self) -> Array:
        """Mean over the seeds that are there, shape (sets, 1 + dimensions + tasks)."""
        return nan_mean(self.values, 1)

    def of(self, strategy: str) -> list[int]:
        """Return the positions of the sets made in one way."""
        return [at for at, made in enumerate(self.strategies) if made == strategy]


def rolled_up(values: Array, tasks: Sequence[Task], dimensions: Sequence[str]) -> Array:
    """Return total, dimensions and tasks from the tasks alone.

    Args:
        values: shape (..., tasks); nan where a task has no value.
    """
    found = [
        nan_mean(values[..., [at for at, task in enumerate(tasks) if task.dimension == name]], -1)
        for name in dimensions
    ]
    stacked = np.stack(found, -1)
    return np.concatenate([nan_mean(stacked, -1)[..., None], stacked, values], -1)


def nan_mean(values: Array, axis: int) -> Array:
    """Return the mean of what is not nan along an axis; nan where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def dimensions_of(results: StudyResults) -> tuple[str, ...]:
    """Return the dimensions' names, in the suite's order where the study tells it."""
    met = dict.fromkeys(name for trial in results.trials for name in trial.dimensions)
    told = [name for name in results.suite.get("dimensions", ()) if name in met]
    return tuple(dict.fromkeys([*told, *met]))


def select(
    results: StudyResults, *, method: str | None = None, sparsity: str | None = None
) -> tuple[Trial, ...]:
    """Return the finished trials of one method, sparsity or pattern (`0.6`, `60%`, `2:4`).

    Raises:
        InputError: nothing has finished, or there is no such method or sparsity.
    """
    trials = results.trials
    if not trials:
        failed = f", {len(results.failed)} failed" if results.failed else ""
        raise InputError(
            f"study {results.name} has no finished trials ({results.planned} planned{failed}): "
            "run it first"
        )
    if method is not None:
        known = sorted({trial.method for trial in trials})
        if method not in known:
            raise InputError(
                f"no finished trial has the method '{method}': {nearest(method, known)}"
            )
        trials = tuple(trial for trial in trials if trial.method == method)
    if sparsity is not None:
        kept = tuple(trial for trial in trials if _is(trial, sparsity))
        if not kept:
            known = sorted({trial.pattern for trial in trials})
            raise InputError(
                f"no finished trial has the sparsity '{sparsity}': known: {', '.join(known)}"
            )
        trials = kept
    return trials


def _is(trial: Trial, sparsity: str) -> bool:
    asked = sparsity.strip()
    if asked == trial.pattern:
        return True
    if not trial.pattern.endswith("%") or not re.fullmatch(r"[0-9.]+%?", asked):
        return False
    try:
        share = float(asked.rstrip("%")) / (100 if asked.endswith("%") else 1)
    except ValueError:
        return False
    return math.isclose(share, asked_sparsity(trial), abs_tol=1e-9)


def asked_sparsity(trial: Trial) -> float:
    """Return the sparsity that a trial's pattern asks for: `60%` is 0.6, `2:4` is 0.5."""
    if found := re.fullmatch(r"([0-9.]+) ?%", trial.pattern):
        return float(found[1]) / 100
    if found := re.fullmatch(r"(\d+):(\d+)", trial.pattern):
        return 1 - int(found[1]) / int(found[2])
    return trial.sparsity


def tables(results: StudyResults, trials: Sequence[Trial], measure: Measure) -> list[Cells]:
    """Return one table a condition, by method, sparsity, and what else differs.

    Raises:
        InputError: two trials of one condition, calibration set and seed, or trials without
            items' scores.
    """
    dimensions = dimensions_of(results)
    names = tuple(dict.fromkeys(trial.calibration for trial in results.trials))
    keys = dict.fromkeys(_key(trial) for trial in trials)
    conditions = _conditions(list(keys))
    made = []
    for key in sorted(keys, key=_order):
        members = [trial for trial in trials if _key(trial) == key]
        made.append(_cells(conditions[key], members, results, names, dimensions, measure))
    return made


_Key = tuple[str, str, str, float, str | None, int, int, str]


def _key(trial: Trial) -> _Key:
    return (
        trial.model,
        trial.method,
        trial.pattern,
        asked_sparsity(trial),
        trial.propagation,
        trial.rows,
        trial.length,
        trial.suite,
    )


def _order(key: _Key) -> tuple[Any, ...]:
    model, method, pattern, sparsity, propagation, rows, length, suite = key
    return model, method, sparsity, pattern, propagation or "", rows, length, suite


def method_name(method: str) -> str:
    """Name a method as its papers do, with the options and the recovery that follow."""
    from calmix.pruning.methods import methods

    first = re.split("[ ,]", method, maxsplit=1)[0]
    known = methods().get(first)
    return ((known and known.title) or first) + method.removeprefix(first)


def _conditions(keys: list[_Key]) -> dict[_Key, Condition]:
    """Name every condition by method and pattern, and by what else is not the same throughout."""
    calibrated = [key for key in keys if key[5]] or keys

    def differs(at: int) -> bool:
        return len({key[at] for key in calibrated}) > 1

    found = {}
    for key in keys:
        model, method, pattern, _, propagation, rows, length, suite = key
        name, rest = method_name(method), ""
        which = f", {model}" if len({key[0] for key in keys}) > 1 else ""
        if differs(4) and propagation is not None:
            rest += f", {propagation} propagation"
        if rows and (differs(5) or differs(6)):
            rest += f", {rows} x {length}"
        if len({key[7] for key in keys}) > 1:
            rest += f", suite {suite}"
        found[key] = Condition(
            *key, label=f"{name} {pattern}{which}{rest}", series=f"{name}{which}{rest}",
            way=f"{name} {pattern}{rest}",
        )  # fmt: skip
    return found


def _cells(
    condition: Condition,
    trials: Sequence[Trial],
    results: StudyResults,
    names: Iterable[str],
    dimensions: tuple[str, ...],
    measure: Measure,
) -> Cells:
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.calibration, trial)
    sets = tuple(name for name in names if name in first)
    seeds = tuple(sorted({trial.seed for trial in trials}))
    places: dict[tuple[int, int], Trial] = {}
    for trial in trials:
        at = sets.index(trial.calibration), seeds.index(trial.seed)
        if at in places:
            raise InputError(
                f"two trials of {trial.calibration} at seed {trial.seed} ({condition.label}) "
                f"differ in nothing the analysis knows (one is {trial.id})"
            )
        places[at] = trial
    dense = _scores(results, results.dense, trials[0].model)
    pruned = [_scores(results, results.scores, trial.id) for trial in places.values()]
    for scores in pruned:
        check_paired(dense, scores)
    tasks, items, values = _measured(dense, pruned, measure)
    accuracies = values if measure == "accuracy" else _measured(dense, pruned, "accuracy")[2]
    far = _far(list(places.values()), dimensions)
    far["flips"] = rolled_up(_flipped(dense, pruned), tasks, dimensions)[:, : 1 + len(dimensions)]
    metrics = tuple(dict.fromkeys(name for trial in trials for name in trial.information))
    known = [[t.information.get(name, math.nan) for name in metrics] for t in places.values()]

    def table(rows: Any) -> Array:
        rows = np.asarray(rows, dtype=float)
        found = np.full((len(sets), len(seeds), rows.shape[-1]), np.nan)
        found[tuple(zip(*places, strict=True))] = rows
        return found

    return Cells(
        condition, sets, tuple(first[name].strategy for name in sets),
        tuple(first[name].kind for name in sets), tuple(first[name].halves for name in sets),
        tuple(first[name].mix for name in sets), seeds, dimensions, tasks, tuple(places), items,
        table(rolled_up(values, tasks, dimensions)),
        table(rolled_up(accuracies, tasks, dimensions)[:, : 1 + len(dimensions)]),
        {name: table(rows) for name, rows in far.items()}, metrics, nan_mean(table(known), 1),
    )  # fmt: skip


def _scores(results: StudyResults, kept: Any, name: str) -> tuple[TaskScores, ...]:
    if name not in kept:
        raise InputError(
            f"study {results.name} holds no items' scores of {name}: run or export it again"
        )
    return kept[name]


def _far(trials: Sequence[Trial], dimensions: Sequence[str]) -> dict[str, Array]:
    """Return KL and top-1, shape (trials, 1 + dimensions); nan if trials saw different texts."""
    same = len({trial.distance["texts"] for trial in trials if trial.distance}) == 1
    found = {}
    for name, field in (("kl", "kl_mean"), ("top1", "top1")):
        rows = []
        for trial in trials:
            known = trial.distance if same and trial.distance else {"total": {}, "dimensions": {}}
            parts = [known["total"], *(known["dimensions"].get(each, {}) for each in dimensions)]
            rows.append([part.get(field, math.nan) for part in parts])
        found[name] = np.array(rows)
    return found


def _flipped(dense: Sequence[TaskScores], pruned: Sequence[Sequence[TaskScores]]) -> Array:
    """Return the share of flips, shape (trials, tasks); nan for tasks without an accuracy."""
    return np.array([
        [np.not_equal(before.values, after.values).mean() if before.values and after.values
         else math.nan for before, after in zip(dense, scores, strict=True)]
        for scores in pruned
    ])  # fmt: skip


def _measured(
    dense: Sequence[TaskScores], pruned: Sequence[Sequence[TaskScores]], measure: Measure
) -> tuple[tuple[Task, ...], tuple[Items, ...], Array]:
    """Return the tasks, the items of those with signal, and retention, shape (trials, tasks)."""
    tasks, items = [], []
    values = np.full((len(pruned), len(dense)), np.nan)
    for at, before in enumerate(dense):
        signal = has_signal(before, measure)
        made: list[Parts] = [parts(before, scores[at], measure) for scores in pruned]
        score = made[0].score
        tasks.append(
            Task(before.name, before.dimension, score, len(before.items),
                 mean_score(before, score), signal)
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
            items.append(Items(before.name, at, kept, whole))
            values[:, at] = [each.retention for each in made]
    return tuple(tasks), tuple(items), values
