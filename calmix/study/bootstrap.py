"""Uncertainty of retentions and differences: one joint bootstrap over items and seeds (ours).

A repetition of the study would differ in two respects:

* **items**: other test items. Each resample draws items with replacement, task by task, the same
  ones for every calibration set (`evaluation.retention.item_weights`), so differences are paired.
* **seeds**: other calibration rows, drawn with other seeds. The deviation of a trial from its set's
  mean is a vector over tasks. These vectors are pooled over all sets of a condition with two or
  more seeds; each resample adds to a set with k seeds a normal vector with their covariance divided
  by k. A common factor sqrt(df / chi-squared) for all sets of a resample turns this into Student's
  t. A condition with fewer than four degrees of freedom uses the vectors of all conditions of the
  model. If no set has two seeds, this part is unknown and intervals cover items only.

A resample combines both parts. The interaction of item and seed is contained in both; it is
estimated separately and removed from the items' part when the two are combined.

Every estimate is a *contrast*: a linear combination of quantities of calibration sets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calmix.errors import InputError, nearest
from calmix.evaluation import retention
from calmix.evaluation.measures import ALPHA, Array, Z
from calmix.evaluation.retention import LEVEL
from calmix.options import Settings
from calmix.study.cells import Cells, all_quantities, left_out, shared, tables
from calmix.study.results import StudyResults, Trial

TAILS = (1 - LEVEL) / 2, (1 + LEVEL) / 2  # of the resamples
OWN_FREEDOM = 4  # degrees of freedom from which a condition's own spread over seeds is used
ROUNDING = 1e-12  # rank correlations or totals closer than this are equal


@dataclass(frozen=True)
class Interval(retention.Estimate):
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

    @property
    def clear(self) -> bool:
        """Whether the interval of a difference is known and excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


class Testable:
    """A `gap` with its p, and `p_corrected` over all declared, or all exploratory, tests."""

    gap: Interval
    p_corrected: float | None

    @property
    def p(self) -> float | None:
        """p against a difference of 0, for other items and seeds."""
        return self.gap.p

    @property
    def significant(self) -> bool:
        """Whether the corrected p is at most 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


@dataclass(frozen=True)
class Contrast:
    """A linear combination of sets' quantities: its value (nan if unknown) and, for each condition
    involved, the coefficients, shape (sets, quantities)."""

    value: float
    parts: dict[Joint, Array]

    def __add__(self, other: Contrast) -> Contrast:
        parts = dict(self.parts)
        for joint, more in other.parts.items():
            parts[joint] = parts.get(joint, 0.0) + more
        return Contrast(self.value + other.value, parts)

    def __mul__(self, factor: float) -> Contrast:
        return Contrast(factor * self.value, {one: factor * c for one, c in self.parts.items()})

    def __sub__(self, other: Contrast) -> Contrast:
        return self + other * -1.0

    def estimate(self, *, test: bool = False) -> Interval:
        """Return the estimate, with p-values against 0 if `test`.

        Across two conditions, equal seeds are paired in the interval but independent in the
        p-value.
        """
        parts = [(one, c, c != 0) for one, c in self.parts.items() if c.any()]
        if math.isnan(self.value) or not parts:
            return Interval(None)
        item = sum(c[used] @ one.item[used] for one, c, used in parts)
        draw = sum(c[used] @ one.draw[used] for one, c, used in parts)
        by_items, by_draws, both = np.sum([one.variances(c) for one, c, _ in parts], 0).tolist()
        if len(parts) > 1:
            # By quantiles: a resample of few items may have next to nothing that can be retained.
            by_items = float(np.ptp(np.nanquantile(item, TAILS)) / (2 * Z)) ** 2
            both = min(both, by_items)
        freedom = min(one.freedom for one, _, _ in parts)
        if not freedom:  # the study has one seed of each set: the interval is about items alone
            by_draws = both = 0.0
        each = np.concatenate([one.deviations[used] for one, _, used in parts]).tolist()
        fields: dict[str, Any] = {
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
            fields |= {f"{head}low": self.value + low, f"{head}high": self.value + high}
        if test:
            # Satterthwaite: the items' part has many degrees of freedom, the seeds' part few.
            items_only = by_items - both
            pooled = freedom * (1 + items_only / by_draws) ** 2 if by_draws else math.inf
            fields["p"] = two_sided_p(self.value, math.sqrt(items_only + by_draws), pooled)
        return Interval(self.value, **fields)


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
    freedom: int  # degrees of freedom of `by_draws`; 0 if unknown
    pooled: bool = False  # whether `by_draws` is pooled over all conditions of the model

    def variances(self, coefficients: Array) -> tuple[float, float, float]:
        """Return a contrast's variance from items, from seeds, and from their interaction, which
        both contain."""
        c = coefficients @ self.cells.weights
        by_items = max(0.0, float(np.einsum("st,tsu,ut->", c, self.by_items, c)))
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


@dataclass(frozen=True)
class Seeds:
    """Deviations of trials from the mean of their set, shape (trials, tasks), the item-seed
    interaction by task as a sum of squares, and the degrees of freedom of both."""

    residuals: Array
    both: Array
    freedom: int

    @classmethod
    def of(cls, cells: Cells) -> Seeds:
        """Return the deviations of one condition's trials."""
        mean_of, counts = _members(cells)
        freedom = int(np.maximum(counts - 1, 0).sum())
        residuals, both = (
            np.zeros((len(cells.trials), len(cells.tasks))),
            np.zeros(len(cells.tasks)),
        )
        for at, (each, whole) in cells.items.items():
            residual = (each - (mean_of @ each)[mean_of.argmax(0)]) / whole.sum()
            residuals[:, at] = residual.sum(1)
            residual -= residuals[:, [at]] * whole / whole.sum()
            both[at] = _unbiased(whole) * float((residual**2).sum())
        return cls(residuals, both, freedom)

    def __add__(self, other: Seeds) -> Seeds:
        residuals = np.concatenate([self.residuals, other.residuals])
        return Seeds(residuals, self.both + other.both, self.freedom + other.freedom)


def _members(cells: Cells) -> tuple[Array, Array]:
    """Return the matrix that averages trials by set, shape (sets, trials), and the seeds of each
    set."""
    names = [name for name, _ in cells.trials]
    of = np.array([[name == one for name in names] for one in cells.sets], dtype=float)
    return of / of.sum(1, keepdims=True), of.sum(1)


def _unbiased(whole: Array) -> float:
    """Return n / (n - 1): the bootstrap variance is (n - 1) / n of the items' own."""
    return len(whole) / max(1, len(whole) - 1)


def joint(
    cells: Cells,
    *,
    resamples: int,
    seed: int,
    layout: Sequence[tuple[str, int]] | None = None,
    pool: Seeds | None = None,
) -> Joint:
    """Return the joint bootstrap of one condition. `layout` lists (set, seed) of all trials of the
    study, so that a seed has the same random effect under every condition that has it. `pool` is
    used if the condition has too few degrees of freedom of its own."""
    mean_of, counts = _members(cells)
    count, tasks = len(cells.sets), len(cells.tasks)
    points = np.full((count, 1 + resamples, tasks), np.nan)  # the value, then the resamples
    by_items = np.zeros((tasks, count, count))
    for at, (each, whole) in cells.items.items():
        size, total = len(whole), float(whole.sum())
        times = _times(cells.tasks[at].name, size, resamples, seed).astype(float)
        sums, wholes = mean_of @ each, times @ whole
        point = sums.sum(1, keepdims=True) / total
        moved = np.divide(
            sums @ times.T, wholes, out=np.full((count, resamples), np.nan), where=wholes > 0
        )
        unbiased = _unbiased(whole)
        points[:, :, at] = np.hstack([point, point + (moved - point) * math.sqrt(unbiased)])
        # Influence of each item on the ratio; the sum of squares is the ratio's variance.
        moved = (sums - point * whole) / total
        by_items[at] = unbiased * moved @ moved.T
    rolled = all_quantities(points, cells.tasks, cells.dimensions).transpose(0, 2, 1)
    values, seeds = rolled[..., 0], Seeds.of(cells)
    squares = (mean_of > 0) @ (seeds.residuals @ cells.weights.T) ** 2
    several = np.where(counts > 1, counts - 1, np.nan)[:, None]
    pooled = pool is not None and seeds.freedom < min(OWN_FREEDOM, pool.freedom)
    if pool is not None and pooled:
        seeds = pool
    freedom, spread = seeds.freedom, seeds.residuals @ cells.weights.T
    draw = np.zeros((*values.shape, resamples))
    if freedom:
        # Residuals summed with normal factors are a normal vector with the pooled covariance.
        layout = layout or cells.trials
        columns = [layout.index(one) for one in cells.trials]
        width = len(spread) if pooled else len(layout)
        scale = np.sqrt(freedom / np.random.default_rng([seed, 1]).chisquare(freedom, resamples))
        for at, name in enumerate(cells.sets):
            # What is pooled is not paired between conditions: their covariance is unknown.
            text = f"{name} {cells.condition.label}" if pooled else name
            key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
            normal = np.random.default_rng([seed, key]).standard_normal((resamples, width))
            moved = (normal if pooled else normal[:, columns]) @ spread
            draw[at] = (moved * scale[:, None] / math.sqrt(freedom * max(counts[at], 1))).T
    return Joint(
        cells,
        values,
        counts,
        np.sqrt(squares / several),
        rolled[..., 1:] - values[..., None],
        draw,
        by_items,
        seeds.residuals.T @ seeds.residuals / max(freedom, 1),
        seeds.both / max(freedom, 1),
        freedom,
        pooled,
    )


def joints(results: StudyResults, settings: Settings) -> Iterator[Joint]:
    """Return the joint bootstrap of every condition; each is computed when it is taken."""
    if not results.trials:
        failed = f", {results.failed} failed" if results.failed else ""
        raise InputError(
            f"study {results.name} has no finished trials ({results.planned} planned{failed}): "
            "run it first"
        )
    known = {trial.calibration for trial in results.trials}
    if settings.default is not None and settings.default not in known:
        raise InputError(
            f"no finished trial has the calibration set '{settings.default}': "
            f"{nearest(settings.default, known)}"
        )
    return joined(tables(results, settings.measure, left_out(results, settings)), settings)


def joined(
    every: Sequence[Cells], settings: Settings, trials: Iterable[Trial] | None = None
) -> Iterator[Joint]:
    """Return the joint bootstraps of a study's conditions, or of those that have the `trials`; each
    is computed when it is taken."""
    wanted = None if trials is None else {shared(trial) for trial in trials}
    layout, pools = sorted({pair for cells in every for pair in cells.trials}), dict[Any, Seeds]()
    for cells in every:
        key, seeds = (cells.condition.model, cells.condition.suite), Seeds.of(cells)
        pools[key] = pools[key] + seeds if key in pools else seeds
    for cells in every:
        if wanted is None or shared(cells.condition) in wanted:
            yield joint(
                cells,
                resamples=settings.resamples,
                seed=settings.seed,
                layout=layout,
                pool=pools[cells.condition.model, cells.condition.suite],
            )


def corrected(*lists: Iterable[Any]) -> list[list[Any]]:
    """Set `p_corrected` of dataclass rows, which have a `p`, for the false discovery rate over all
    lists together (Benjamini and Hochberg). A p of None is ignored."""
    from scipy.stats import false_discovery_control

    copies = [list(rows) for rows in lists]
    known = [(rows, at) for rows in copies for at, one in enumerate(rows) if one.p is not None]
    adjusted = false_discovery_control([rows[at].p for rows, at in known]).tolist() if known else []
    for (rows, at), value in zip(known, adjusted, strict=True):
        rows[at] = replace(rows[at], p_corrected=value)
    return copies


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for all of them (Holm); None, of a test still to come, counts."""
    known = sorted((p, at) for at, p in enumerate(values) if p is not None)
    adjusted, least = list(values), 0.0
    for rank, (p, at) in enumerate(known):
        least = min(1.0, max(least, (len(values) - rank) * p))
        adjusted[at] = least
    return adjusted


def two_sided_p(value: float, error: float, freedom: float) -> float:
    """Return the two-sided p-value against 0 by Student's t (normal with infinite freedom)."""
    from scipy.stats import t

    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * t.sf(abs(value) / error, freedom))
