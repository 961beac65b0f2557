"""The cells of a study: calibration sets x seeds x quantities, one table a condition.

A *condition* is all that a trial asks for apart from the calibration set and the seed: model,
method, pattern and so on. Only sets under the same condition are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from calmix.analysis.statistics import Array
from calmix.errors import InputError, nearest
from calmix.study.results import Interval, StudyResults, Trial

Measure = Literal["corrected", "raw"]
TOTAL = "total"
WORST = "worst"
METHOD_NAMES = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "magnitude": "Magnitude"}


@dataclass(frozen=True)
class Condition:
    """What the trials of one table share; `label` names what differs within the study.

    `sparsity` is the one asked for: what a trial reached differs from it by rounding.
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

    @property
    def unstructured(self) -> bool:
        """Whether the pattern is a share of each group, not N:M."""
        return self.pattern.endswith("%")


@dataclass(frozen=True)
class Cells:
    """All trials of one condition.

    Attributes:
        sets, strategies: calibration sets in the study's order, and how each was made.
        quantities: `total`, then the dimensions.
        values: retention, shape (sets, seeds, quantities); nan where there is none.
        below, above: distance from the value to the ends of its interval over items.
        metrics, information: names, and their means over seeds, shape (sets, metrics).
    """

    condition: Condition
    sets: tuple[str, ...]
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    quantities: tuple[str, ...]
    values: Array
    below: Array
    above: Array
    metrics: tuple[str, ...]
    information: Array

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The quantities but the total."""
        return self.quantities[1:]

    @property
    def means(self) -> Array:
        """Mean over the seeds that are there, shape (sets, quantities)."""
        return nan_mean(self.values, 1)

    @property
    def worst(self) -> Array:
        """The lowest dimension of each trial, shape (sets, seeds)."""
        dimensions = self.values[:, :, 1:]
        known = ~np.isnan(dimensions)
        low = np.where(known, dimensions, np.inf).min(2, initial=np.inf)
        return np.where(known.any(2), low, np.nan)

    def of(self, strategy: str) -> list[int]:
        """Return the positions of the sets made in one way."""
        return [at for at, made in enumerate(self.strategies) if made == strategy]


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
        InputError: two trials of one condition, calibration set and seed.
    """
    dimensions = dimensions_of(results)
    names = tuple(dict.fromkeys(trial.calibration for trial in results.trials))
    keys = dict.fromkeys(_key(trial) for trial in trials)
    conditions = _conditions(list(keys))
    made = []
    for key in sorted(keys, key=_order):
        members = [trial for trial in trials if _key(trial) == key]
        made.append(_cells(conditions[key], members, names, dimensions, measure))
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
    known = list(METHOD_NAMES)
    place = known.index(method) if method in known else len(known)
    return model, place, method, sparsity, pattern, propagation or "", rows, length, suite


def _conditions(keys: list[_Key]) -> dict[_Key, Condition]:
    """Name every condition by method and pattern, and by what else is not the same throughout."""
    calibrated = [key for key in keys if key[1] != "magnitude"] or keys

    def differs(at: int) -> bool:
        return len({key[at] for key in calibrated}) > 1

    found = {}
    for key in keys:
        model, method, pattern, _, propagation, rows, length, suite = key
        label = f"{METHOD_NAMES.get(method, method)} {pattern}"
        if len({key[0] for key in keys}) > 1:
            label += f", {model}"
        if differs(4) and propagation is not None:
            label += f", {propagation} propagation"
        if method != "magnitude" and (differs(5) or differs(6)):
            label += f", {rows} x {length}"
        if len({key[7] for key in keys}) > 1:
            label += f", suite {suite}"
        found[key] = Condition(*key, label=label)
    return found


def _cells(
    condition: Condition,
    trials: Sequence[Trial],
    names: Iterable[str],
    dimensions: tuple[str, ...],
    measure: Measure,
) -> Cells:
    present = {trial.calibration: trial.strategy for trial in trials}
    sets = tuple(name for name in names if name in present)
    seeds = tuple(sorted({trial.seed for trial in trials}))
    quantities = (TOTAL, *dimensions)
    shape = (len(sets), len(seeds), len(quantities))
    values, below, above = (np.full(shape, np.nan) for _ in range(3))
    seen: set[tuple[int, int]] = set()
    for trial in trials:
        at = sets.index(trial.calibration), seeds.index(trial.seed)
        if at in seen:
            raise InputError(
                f"two trials of {trial.calibration} at seed {trial.seed} ({condition.label}) "
                f"differ in nothing the analysis knows (one is {trial.id})"
            )
        seen.add(at)
        retention = _retention(trial, dimensions, measure)
        for number, quantity in enumerate(quantities):
            value, low, high = retention[quantity]
            values[at][number], below[at][number], above[at][number] = value, low, high
    metrics = tuple(dict.fromkeys(name for trial in trials for name in trial.information))
    known = np.full((*shape[:2], len(metrics)), np.nan)
    for trial in trials:
        at = sets.index(trial.calibration), seeds.index(trial.seed)
        known[at] = [trial.information.get(name, math.nan) for name in metrics]
    return Cells(
        condition, sets, tuple(present[name] for name in sets), seeds, quantities,
        values, below, above, metrics, nan_mean(known, 1),
    )  # fmt: skip


_Ends = tuple[float, float, float]  # value, distance to its low end, distance to its high end
_NONE: _Ends = (math.nan, math.nan, math.nan)


def _retention(trial: Trial, dimensions: tuple[str, ...], measure: Measure) -> dict[str, _Ends]:
    if measure == "corrected":
        found = {name: _ends(trial.dimensions.get(name)) for name in dimensions}
        return {TOTAL: _ends(trial.total)} | found
    found = {
        name: _mean([_ends(task.raw) for task in trial.tasks if task.dimension == name])
        for name in dimensions
    }
    return {TOTAL: _mean(list(found.values()))} | found


def _ends(value: Interval | None) -> _Ends:
    if value is None or value.value is None:
        return _NONE
    below = math.nan if value.low is None else max(0.0, value.value - value.low)
    above = math.nan if value.high is None else max(0.0, value.high - value.value)
    return value.value, below, above


def _mean(parts: Sequence[_Ends]) -> _Ends:
    """Return the mean of independent values; distances add in quadrature."""
    known = [part for part in parts if not math.isnan(part[0])]
    if not known:
        return _NONE
    count = len(known)
    return (
        math.fsum(part[0] for part in known) / count,
        math.hypot(*(part[1] for part in known)) / count,
        math.hypot(*(part[2] for part in known)) / count,
    )
