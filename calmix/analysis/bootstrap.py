"""Uncertainty of retentions and differences: one joint bootstrap over items and seeds (ours).

A repetition of the study would differ in two respects:

* **items**: other test items. Each resample draws items with replacement, task by task, the same
  ones for every calibration set (`evaluation.retention.item_weights`), so differences are paired.
* **seeds**: other calibration rows, drawn with other seeds. The deviation of a trial from its set's
  mean is a vector over tasks. These vectors are pooled over all sets with two or more seeds; each
  resample adds to a set with k seeds a normal vector with their covariance divided by k. A common
  factor sqrt(df / chi-squared) for all sets of a resample turns this into Student's t. If no set
  has two seeds, this part is unknown and intervals cover items only.

A resample combines both parts. The interaction of item and seed is contained in both; it is
estimated separately and removed from the items' part when the two are combined.

Every estimate is a *contrast*: a linear combination of quantities of calibration sets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from calmix.analysis.cells import Cells, rolled_up, select, tables
from calmix.errors import InputError, nearest
from calmix.evaluation import retention
from calmix.evaluation.measures import Array
from calmix.evaluation.retention import LEVEL
from calmix.options import Settings
from calmix.study.results import StudyResults

TAILS = (1 - LEVEL) / 2, (1 + LEVEL) / 2  # of the resamples
ALPHA = 0.05
ROUNDING = 1e-12  # rank correlations or totals closer than this are equal
Row = TypeVar("Row", bound=Any)


@dataclass(frozen=True)
class Estimate(retention.Estimate):
    """A retention or a difference of retentions, with 95 % intervals; None where unknown.

    `low` to `high` covers other items and other seeds, or only items if seeds are unknown.
    """

    item_low: float | None = None  # for other items, with the same pruned models
    item_high: float | None = None
    draw_low: float | None = None  # for other seeds, on the same items
    draw_high: float | None = None
    draws: int = 0  # seeds averaged; for a difference, on the side with fewer
    deviation: float | None = None  # standard deviation over the set's own seeds
    p: float | None = None  # two-sided, against a difference of 0, for other items and seeds
    draw_p: float | None = None  # the same for other seeds

    def __neg__(self) -> Estimate:
        """Return value and interval with the opposite sign."""
        value, low, high = (None if end is None else -end
                            for end in (self.value, self.high, self.low))  # fmt: skip
        return Estimate(value, low, high)

    @property
    def clear(self) -> bool:
        """Whether the interval of a difference is known and excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Contrast:
    """A linear combination of sets' quantities: its value (nan if unknown) and, for each condition
    involved, the coefficients, shape (sets, quantities)."""

    value: float
    parts: dict[Joint, Array]

    def __sub__(self, other: Contrast) -> Contrast:
        parts = dict(self.parts)
        for found, less in other.parts.items():
            parts[found] = parts.get(found, 0.0) - less
        return Contrast(self.value - other.value, parts)

    def estimate(self, *, test: bool = False) -> Estimate:
        """Return the estimate, with p-values against 0 if `test`.

        Across two conditions, equal seeds are paired in the interval but independent in the
        p-value.
        """
        parts = [(one, c, c != 0) for one, c in self.parts.items() if c.any()]
        if math.isnan(self.value) or not parts:
            return Estimate(None)
        item = sum(c[used] @ one.item[used] for one, c, used in parts)
        draw = sum(c[used] @ one.draw[used] for one, c, used in parts)
        by_items, by_draws, both = np.sum([one.variances(c) for one, c, _ in parts], 0).tolist()
        if len(parts) > 1:
            by_items = float(np.nanvar(item))
            both = min(both, by_items)
        freedom = min(one.freedom for one, _, _ in parts)
        if not freedom:  # one condition has one seed: the interval is about items alone
            by_draws = both = 0.0
        each = np.concatenate([one.deviations[used] for one, _, used in parts]).tolist()
        found: dict[str, Any] = {
            "draws": min(int(one.counts[used.any(1)].min()) for one, _, used in parts),
            "deviation": each[0] if len(each) == 1 and not (test or math.isnan(each[0])) else None,
        }
        ends = {"item_": item, "": item}
        if freedom:
            share = math.sqrt(1 - both / by_items if by_items else 1)
            ends = {"item_": item, "draw_": draw, "": item * share + draw}
        moved = np.stack(list(ends.values()))
        quantile = np.nanquantile if np.isnan(moved).any() else np.quantile  # five times as fast
        for head, low, high in zip(ends, *quantile(moved, TAILS, axis=1).tolist(), strict=True):
            found |= {f"{head}low": self.value + low, f"{head}high": self.value + high}
        if test:
            # Satterthwaite: the items' part has many degrees of freedom, the seeds' part few.
            items_only = by_items - both
            pooled = freedom * (1 + items_only / by_draws) ** 2 if by_draws else math.inf
            found["p"] = two_sided_p(self.value, math.sqrt(items_only + by_draws), pooled)
            if freedom:
                found["draw_p"] = two_sided_p(self.value, math.sqrt(by_draws), freedom)
        return Estimate(self.value, **found)


@dataclass(frozen=True, eq=False)
class Joint:
    """The joint bootstrap of one condition; its quantities are those of `Cells`."""

    cells: Cells
    values: Array  # mean over seeds, shape (sets, quantities); nan where unknown
    counts: Array  # number of seeds of each set, shape (sets,)
    deviations: Array  # over each set's seeds, shape (sets, quantities); nan with one seed
    item: Array = field(repr=False)  # deviations of resamples, shape (sets, quantities, resamples)
    draw: Array = field(repr=False)  # the same over seeds
    by_items: Array = field(repr=False)  # covariance of sets' means, shape (tasks, sets, sets)
    by_draws: Array = field(repr=False)  # covariance of one seed, shape (tasks, tasks)
    both: Array = field(repr=False)  # item-seed interaction of one seed, shape (tasks,)
    freedom: int  # degrees of freedom of `by_draws`; 0 if no set has two seeds

    def variances(self, coefficients: Array) -> tuple[float, float, float]:
        """Return a contrast's variance from items, from seeds, and from their interaction, which
        both contain."""
        c = coefficients @ self.cells.weights
        by_items = float(np.einsum("st,tsu,ut->", c, self.by_items, c))
        share = 1 / np.maximum(self.counts, 1)
        by_draws = float(((c @ self.by_draws) * c).sum(1) @ share)
        both = float(share @ c**2 @ self.both)
        return by_items, by_draws, min(both, by_draws, by_items)

    def mean(self, sets: Sequence[int], quantity: int) -> Contrast:
        """Return the mean of one quantity over some sets, by position."""
        coefficients = np.zeros(self.values.shape)
        coefficients[list(sets), quantity] = 1 / len(sets)
        used = coefficients != 0
        return Contrast(float(coefficients[used] @ self.values[used]), {self: coefficients})


@lru_cache(maxsize=64)
def _times(task: str, size: int, resamples: int, seed: int) -> NDArray[np.uint8]:
    """Return `item_weights` as bytes; all conditions share them."""
    return retention.item_weights(task, size, resamples=resamples, seed=seed).astype(np.uint8)


def joint(
    cells: Cells, *, resamples: int, seed: int, layout: Sequence[tuple[str, int]] | None = None
) -> Joint:
    """Return the joint bootstrap of one condition. `layout` lists (set, seed) of all trials of the
    study, so that a seed has the same random effect under every condition that has it."""
    of = np.array([cells.sets.index(name) for name, _ in cells.trials])
    count, tasks = len(cells.sets), len(cells.tasks)
    counts = np.bincount(of, minlength=count).astype(float)
    freedom = int(np.maximum(counts - 1, 0).sum())
    points = np.full((count, 1 + resamples, tasks), np.nan)  # the value, then the resamples
    residuals = np.zeros((len(of), tasks))
    by_items, both = np.zeros((tasks, count, count)), np.zeros(tasks)
    mean_of = (of[None] == np.arange(count)[:, None]) / counts[:, None]
    for at, (each, whole) in cells.items.items():
        size, total = len(whole), float(whole.sum())
        unbiased = size / max(1, size - 1)  # bootstrap variance is (n - 1) / n of the items' own
        times = _times(cells.tasks[at].name, size, resamples, seed).astype(float)
        kept, wholes = mean_of @ each, times @ whole
        point = kept.sum(1, keepdims=True) / total
        moved = np.divide(
            kept @ times.T, wholes, out=np.full((count, resamples), np.nan), where=wholes > 0
        )
        points[:, :, at] = np.hstack([point, point + (moved - point) * math.sqrt(unbiased)])
        # Influence of each item on the ratio; the sum of squares is the ratio's variance.
        moved = (kept - point * whole) / total
        by_items[at] = unbiased * moved @ moved.T
        residual = (each - kept[of]) / total
        residuals[:, at] = residual.sum(1)
        residual -= residuals[:, [at]] * whole / total
        both[at] = unbiased * float((residual**2).sum()) / max(freedom, 1)
    rolled = rolled_up(points, cells.tasks, cells.dimensions).transpose(0, 2, 1)
    values, spread = rolled[..., 0], residuals @ cells.weights.T
    squares = np.stack([(spread[of == at] ** 2).sum(0) for at in range(count)])
    several = np.where(counts > 1, counts - 1, np.nan)[:, None]
    draw = np.zeros((*values.shape, resamples))
    if freedom:
        # Residuals summed with normal factors are a normal vector with the pooled covariance.
        layout = layout or cells.trials
        columns = [layout.index(one) for one in cells.trials]
        scale = np.sqrt(freedom / np.random.default_rng([seed, 1]).chisquare(freedom, resamples))
        for at, name in enumerate(cells.sets):
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            rng = np.random.default_rng([seed, key])
            normal = rng.standard_normal((resamples, len(layout)))[:, columns] @ spread
            draw[at] = (normal * scale[:, None] / math.sqrt(freedom * max(counts[at], 1))).T
    return Joint(
        cells, values, counts, np.sqrt(squares / several), rolled[..., 1:] - values[..., None],
        draw, by_items, residuals.T @ residuals / max(freedom, 1), both, freedom,
    )  # fmt: skip


def joints(results: StudyResults, settings: Settings, **which: str | None) -> Iterator[Joint]:
    """Return the joint bootstrap of every condition, or of those that `cells.select` selects by
    `which`; each is computed when it is taken. The results for a condition do not depend on which
    others are selected."""
    trials = select(results, **which)
    known = {trial.calibration for trial in trials}
    if settings.default is not None and settings.default not in known:
        raise InputError(
            f"no finished trial has the calibration set '{settings.default}': "
            f"{nearest(settings.default, known)}"
        )
    layout = sorted({(trial.calibration, trial.seed) for trial in results.trials})

    def computed() -> Iterator[Joint]:  # what is wrong in a request is told before any work
        for cells in tables(results, trials, settings.measure):
            yield joint(cells, resamples=settings.resamples, seed=settings.seed, layout=layout)

    return computed()


def corrected(rows: Iterable[Row], **columns: Callable[[Row], float | None]) -> list[Row]:
    """Set fields of dataclass rows to p-values corrected for the false discovery rate (Benjamini
    and Hochberg). `columns` maps a field to its raw p; None is ignored."""
    from scipy.stats import false_discovery_control

    made = list(rows)
    for name, p in columns.items():
        known = [at for at, one in enumerate(made) if p(one) is not None]
        adjusted = false_discovery_control([p(made[at]) for at in known]).tolist() if known else []
        for at, value in zip(known, adjusted, strict=True):
            made[at] = replace(made[at], **{name: value})
    return made


def two_sided_p(value: float, error: float, freedom: float) -> float:
    """Return the two-sided p-value against 0 by Student's t (normal with infinite freedom)."""
    from scipy.stats import t

    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * t.sf(abs(value) / error, freedom))
