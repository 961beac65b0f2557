"""Retention: what share of each capability a pruned model has kept, and how sure that is.

Pure functions over per-item scores of the same items by two models. The definitions are those
of `docs/evaluation.md`; which tasks carry no signal, the noise floor and the bootstrap are ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calmix.errors import InputError

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959963984540054  # normal quantile of a two-sided 95 % interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TaskScores:
    """The scores of one model on one task, item by item.

    Attributes:
        kind: `accuracy` (higher is better) or `bits_per_byte` (lower is better).
        chance: expected accuracy of a guess; 0 for bits per byte.
        items: identifiers of the items.
        values: accuracy of each item (0 to 1), or its negative log-likelihood in nats.
        bytes: UTF-8 bytes of each item's answer; empty for an accuracy.
    """

    name: str
    dimension: str
    metric: str
    kind: Literal["accuracy", "bits_per_byte"]
    chance: float
    items: tuple[str, ...]
    values: tuple[float, ...]
    bytes: tuple[int, ...] = ()

    @property
    def score(self) -> float:
        """Mean accuracy, or bits per byte over all items together."""
        if self.kind == "accuracy":
            return math.fsum(self.values) / len(self.values)
        return math.fsum(self.values) / math.log(2) / sum(self.bytes)

    @property
    def noise(self) -> float:
        """Noise floor (ours): half the width of the score's own 95 % interval, in its unit.

        Normal approximation over items; for bits per byte that of a ratio of means.
        """
        values = np.asarray(self.values)
        count = len(values)
        if count < 2:
            return math.inf
        if self.kind == "accuracy":
            return float(Z * values.std(ddof=1) / math.sqrt(count))
        sizes = np.asarray(self.bytes, dtype=float)
        bits = values / math.log(2)
        residual = bits - self.score * sizes
        return float(Z * residual.std(ddof=1) / math.sqrt(count) / sizes.mean())

    @property
    def signal(self) -> bool:
        """Whether the score is beyond its own noise of chance (bits per byte always is)."""
        if self.kind == "bits_per_byte":
            return True
        # With every item alike the estimated noise is 0, whichever score that is.
        return self.score - self.chance > self.noise


@dataclass(frozen=True)
class Estimate:
    """A retention with its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TaskRetention:
    """What of one task is kept.

    `raw` is s1 / s0, `corrected` max(0, s1 - c) / (s0 - c); both are b0 / b1 for bits per
    byte. `corrected` has no value where the dense model shows no signal.
    """

    name: str
    dimension: str
    metric: str
    items: int
    chance: float
    dense: float
    pruned: float
    noise: float
    signal: bool
    raw: Estimate
    corrected: Estimate


@dataclass(frozen=True)
class DimensionRetention:
    """Mean retention over a dimension's tasks, `raw` over all and `corrected` over those with
    signal; `without_signal` names the others."""

    name: str
    tasks: int
    without_signal: tuple[str, ...]
    raw: Estimate
    corrected: Estimate


@dataclass(frozen=True)
class Retention:
    """Retention per task, per dimension, in total (mean over dimensions) and at its worst."""

    tasks: tuple[TaskRetention, ...]
    dimensions: tuple[DimensionRetention, ...]
    raw: Estimate
    corrected: Estimate
    worst: str | None
    resamples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        return asdict(self)


def retention(
    dense: Sequence[TaskScores],
    pruned: Sequence[TaskScores],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Retention:
    """Compare two models' scores on the same items (definitions: docs/evaluation.md).

    Intervals are from a paired bootstrap over items: each resample draws items with
    replacement, the same ones for both models, task by task, and recomputes every mean.

    Raises:
        InputError: the models were not scored on the same tasks and items.
    """
    check_paired(dense, pruned)
    draws: dict[str, tuple[Array, Array]] = {}
    tasks = []
    for before, after in zip(dense, pruned, strict=True):
        raw, corrected = bootstrap(before, after, resamples=resamples, seed=seed)
        point_raw, point_corrected = task_retention(before, after)
        if not before.signal:
            corrected, point_corrected = np.full(resamples, np.nan), math.nan
        draws[before.name] = (raw, corrected)
        tasks.append(
            TaskRetention(
                before.name,
                before.dimension,
                before.metric,
                len(before.items),
                before.chance,
                before.score,
                after.score,
                before.noise,
                before.signal,
                estimate(point_raw, raw),
                estimate(point_corrected, corrected),
            )
        )
    dimensions = []
    totals: list[tuple[float, Array, float, Array]] = []
    for name in dict.fromkeys(task.dimension for task in tasks):
        members = [task for task in tasks if task.dimension == name]
        point_raw = mean([_number(task.raw) for task in members])
        point_corrected = mean([_number(task.corrected) for task in members])
        raw = column_means([draws[task.name][0] for task in members])
        corrected = column_means([draws[task.name][1] for task in members])
        totals.append((point_raw, raw, point_corrected, corrected))
        silent = tuple(task.name for task in members if not task.signal)
        dimensions.append(
            DimensionRetention(
                name,
                len(members),
                silent,
                estimate(point_raw, raw),
                estimate(point_corrected, corrected),
            )
        )
    with_value = [d for d in dimensions if d.corrected.value is not None]
    return Retention(
        tuple(tasks),
        tuple(dimensions),
        estimate(mean([t[0] for t in totals]), column_means([t[1] for t in totals])),
        estimate(mean([t[2] for t in totals]), column_means([t[3] for t in totals])),
        min(with_value, key=_value).name if with_value else None,
        resamples,
        seed,
    )


def _value(dimension: DimensionRetention) -> float:
    return _number(dimension.corrected)


def _number(value: Estimate) -> float:
    return math.nan if value.value is None else value.value


def check_paired(dense: Sequence[TaskScores], pruned: Sequence[TaskScores]) -> None:
    """Refuse scores of different tasks or items.

    Raises:
        InputError: what differs, first.
    """
    names = [task.name for task in dense], [task.name for task in pruned]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1])) or names[1]
        raise InputError(f"the two models were scored on different tasks (first: {odd[0]})")
    for before, after in zip(dense, pruned, strict=True):
        if (before.items, before.bytes, before.metric) != (after.items, after.bytes, after.metric):
            raise InputError(
                f"the two models were scored on different items of task {before.name} "
                f"({len(before.items)} and {len(after.items)})"
            )


def task_retention(dense: TaskScores, pruned: TaskScores) -> tuple[float, float]:
    """Return raw and chance-corrected retention of one task; nan where it is not defined."""
    before, after = np.array([dense.score]), np.array([pruned.score])
    raw, corrected = ratios(before, after, dense.kind, dense.chance)
    return float(raw[0]), float(corrected[0])


def ratios(before: Array, after: Array, kind: str, chance: float) -> tuple[Array, Array]:
    """Return raw and chance-corrected retention from scores, shape of the scores.

    nan where the dense score is 0 (raw) or not above chance (corrected).
    """
    if kind == "bits_per_byte":
        value = np.divide(before, after, out=np.full_like(before, np.nan), where=after > 0)
        return value, value
    raw = np.divide(after, before, out=np.full_like(before, np.nan), where=before > 0)
    above = before - chance
    kept = np.maximum(0.0, after - chance)
    corrected = np.divide(kept, above, out=np.full_like(before, np.nan), where=above > 1e-12)
    return raw, corrected


def bootstrap(
    dense: TaskScores, pruned: TaskScores, *, resamples: int, seed: int
) -> tuple[Array, Array]:
    """Return raw and corrected retention of one task in each resample, shape (resamples,).

    The draws depend on the seed and the task's name, not on what else is in the suite.
    """
    count = len(dense.items)
    digest = hashlib.sha256(dense.name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    times = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    before, after = times @ np.asarray(dense.values), times @ np.asarray(pruned.values)
    if dense.kind == "bits_per_byte":
        sizes = times @ np.asarray(dense.bytes, dtype=float) * math.log(2)
        before, after = before / sizes, after / sizes
    else:
        before, after = before / count, after / count
    return ratios(before, after, dense.kind, dense.chance)


def mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are defined; nan if none is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def column_means(rows: Sequence[Array]) -> Array:
    """Return for each resample the mean of the rows that are defined there."""
    stack = np.stack(rows)
    known = ~np.isnan(stack)
    count = known.sum(0)
    total = np.where(known, stack, 0.0).sum(0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def estimate(value: float, draws: Array) -> Estimate:
    """Return a value with the central 95 % of its resamples."""
    if math.isnan(value):
        return Estimate(None, None, None)
    known = draws[~np.isnan(draws)]
    if not len(known):
        return Estimate(value, None, None)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def no_signal(tasks: Sequence[TaskScores]) -> dict[str, str]:
    """Return for each task without signal a line that says why."""
    return {
        task.name: f"{task.score:.3f} is within {task.noise:.3f} of chance {task.chance:.3f}"
        for task in tasks
        if not task.signal
    }


def from_mapping(value: Mapping[str, Any]) -> TaskScores:
    """Return task scores from the JSON form `dataclasses.asdict` gives."""
    fields: dict[str, Any] = {
        key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
    }
    return TaskScores(**fields)
