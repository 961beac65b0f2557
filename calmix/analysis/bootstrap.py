"""How sure a retention or a difference is: one joint bootstrap over items and draws (ours).

Two things would come out otherwise if the work were done again:

* **items**: other test items. Each resample draws items with replacement, task by task, the same
  ones for every calibration set (`capability.retention.item_weights`): differences are paired.
* **draws**: other calibration rows, under other seeds. What a trial is off its set's mean is a
  vector over tasks; over all sets with two draws or more these vectors are pooled, and each
  resample adds to a set of k draws a normal vector of their covariance over k. One factor
  sqrt(df / chi-squared) for all sets of a resample makes that Student's t. Where no set has two
  draws this part is unknown: intervals are then about items alone.

A resample has both. What is chance of an item under one draw is seen by both parts; it is
estimated from items and draws, and taken out of the items' part where the two meet.

Everything asked is a *contrast*: a sum of quantities of sets with coefficients. Pure functions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from calmix.analysis.cells import Cells, rolled_up
from calmix.analysis.statistics import LEVEL, Array, two_sided_p
from calmix.evaluation.retention import item_weights
from calmix.study.results import StudyResults


@dataclass(frozen=True)
class Estimate:
    """A retention or a difference of retentions, with 95 % intervals; None where not known.

    Attributes:
        value: over the draws at hand.
        low, high: for other items and other draws; for other items where draws are unknown.
        item_low, item_high: for other items, with these very pruned models.
        draw_low, draw_high: for other draws, on these very items.
        draws: trials averaged; of a difference, of the side with fewer.
        deviation: standard deviation over the set's own draws.
        p, draw_p: two-sided p of a difference of 0, in the first and the last reading.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    item_low: float | None = None
    item_high: float | None = None
    draw_low: float | None = None
    draw_high: float | None = None
    draws: int = 0
    deviation: float | None = None
    p: float | None = None
    draw_p: float | None = None

    def __neg__(self) -> Estimate:
        """Return a difference seen from its other side."""

        def minus(value: float | None) -> float | None:
            return None if value is None else -value

        return replace(
            self,
            value=minus(self.value),
            low=minus(self.high), high=minus(self.low),
            item_low=minus(self.item_high), item_high=minus(self.item_low),
            draw_low=minus(self.draw_high), draw_high=minus(self.draw_low),
        )  # fmt: skip

    @property
    def clear(self) -> bool:
        """Whether the interval of a difference is known and leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def sure(self) -> float | None:
        """Probability of a difference above 0, for other items and draws; None untested."""
        if self.p is None or self.value is None:
            return None
        return 1 - self.p / 2 if self.value > 0 else self.p / 2


@dataclass(frozen=True)
class Sample:
    """A contrast's resamples, as deviations from its value, and its variances.

    Attributes:
        item, draw: shape (resamples,); each is what one doubt alone does.
        variances: by items; by draws; what of the items' is in the draws' too.
        freedom: degrees of freedom of the draws' part; 0 where it is unknown.
    """

    item: Array
    draw: Array
    variances: tuple[float, float, float]
    freedom: int

    @property
    def joint(self) -> Array:
        """Both doubts, what is in both counted once."""
        by_items, _, both = self.variances
        return self.item * math.sqrt(1 - both / by_items if by_items else 1) + self.draw

    @property
    def error(self) -> float:
        """Standard error, both doubts together."""
        by_items, by_draws, both = self.variances
        return math.sqrt(by_items - both + by_draws)

    def __sub__(self, other: Sample) -> Sample:
        """Return the difference of contrasts under two conditions, resample by resample.

        Its draws' variance takes them for unrelated; its resamples do not.
        """
        pairs = zip(self.variances, other.variances, strict=True)
        by_draws, both = [one + two for one, two in pairs][1:]
        item = self.item - other.item
        by_items = float(np.nanvar(item))
        freedom = min(self.freedom, other.freedom)
        return Sample(
            item, self.draw - other.draw, (by_items, by_draws, min(both, by_items)), freedom
        )

    def estimate(
        self, value: float, draws: int, deviation: float | None = None, *, test: bool = False
    ) -> Estimate:
        """Return the contrast's estimate; with p-values of 0 where `test`."""
        if math.isnan(value):
            return Estimate(None)
        by_items, by_draws, both = self.variances
        items, joint = _ends(value, self.item), _ends(value, self.joint)
        if not self.freedom:
            p = two_sided_p(value, math.sqrt(by_items), math.inf) if test else None
            return Estimate(value, *items, *items, None, None, draws, deviation, p)
        p = draw_p = None
        if test:
            # Satterthwaite: the items' part has many degrees of freedom, the draws' has few.
            known = by_items - both
            freedom = self.freedom * (1 + known / by_draws) ** 2 if by_draws else math.inf
            p = two_sided_p(value, self.error, freedom)
            draw_p = two_sided_p(value, math.sqrt(by_draws), self.freedom)
        return Estimate(
            value, *joint, *items, *_ends(value, self.draw), draws, deviation, p, draw_p
        )


def _ends(value: float, sample: Array) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(sample, [tail, 1 - tail])
    return value + float(low), value + float(high)


@dataclass(frozen=True)
class Joint:
    """The joint bootstrap of one condition. Quantities are those of `Cells.values`.

    Attributes:
        values: mean over draws, shape (sets, quantities); nan where unknown.
        counts: draws of each set, shape (sets,).
        deviations: over each set's own draws, shape (sets, quantities); nan from one.
        item, draw: deviations of the resamples, shape (sets, quantities, resamples).
        weights: of the tasks in each quantity, shape (quantities, tasks).
        by_items: covariance of the sets' means over items, shape (tasks, sets, sets).
        by_draws: covariance of one draw on these items, shape (tasks, tasks).
        both: variance of one draw that is chance of the items, shape (tasks,).
        freedom: degrees of freedom of `by_draws`.
    """

    values: Array
    counts: Array
    deviations: Array
    item: Array = field(repr=False)
    draw: Array = field(repr=False)
    weights: Array = field(repr=False)
    by_items: Array = field(repr=False)
    by_draws: Array = field(repr=False)
    both: Array = field(repr=False)
    freedom: int

    def sample(self, coefficients: Array) -> Sample:
        """Return a contrast's resamples.

        Args:
            coefficients: shape (sets, quantities).
        """
        used = coefficients != 0
        weight = coefficients[used]
        return Sample(
            weight @ self.item[used], weight @ self.draw[used],
            self.variances(coefficients), self.freedom,
        )  # fmt: skip

    def variances(self, coefficients: Array) -> tuple[float, float, float]:
        """Return a contrast's variance by items, by draws, and what is in both."""
        c = coefficients @ self.weights
        by_items = float(np.einsum("st,tsu,ut->", c, self.by_items, c))
        share = 1 / np.maximum(self.counts, 1)
        by_draws = float(((c @ self.by_draws) * c).sum(1) @ share)
        both = float(share @ c**2 @ self.both)
        return by_items, by_draws, min(both, by_draws, by_items)

    def estimate(
        self, coefficients: Array, value: float | None = None, *, test: bool = False
    ) -> Estimate:
        """Return the estimate of a contrast; of its own value unless another is given."""
        used = coefficients != 0
        if value is None:
            value = float(coefficients[used] @ self.values[used])
        sets = np.flatnonzero(used.any(1))
        if math.isnan(value) or not len(sets):
            return Estimate(None)
        draws, deviation = int(self.counts[sets].min()), None
        if used.sum() == 1 and not test and not math.isnan(own := self.deviations[used][0]):
            deviation = float(own)
        return self.sample(coefficients).estimate(value, draws, deviation, test=test)

    def one(self, at: int, quantity: int) -> Estimate:
        """Return the estimate of one set's quantity, by position."""
        return self.estimate(self.mean([at], quantity))

    def mean(self, sets: Sequence[int], quantity: int) -> Array:
        """Return the coefficients of the mean over some sets of one quantity."""
        found = np.zeros(self.values.shape)
        found[list(sets), quantity] = 1 / len(sets)
        return found

    def alone(self, quantity: int) -> Array:
        """Return the weights that take one quantity alone, shape (quantities,)."""
        return np.eye(self.values.shape[1])[quantity]


def joint(
    cells: Cells, *, resamples: int, seed: int, layout: Sequence[tuple[str, int]] | None = None
) -> Joint:
    """Return the joint bootstrap of one condition.

    Args:
        layout: (set, seed) of all trials of the study, so that what a draw does under two
            conditions that both have it stays together.
    """
    names = [(cells.sets[at], cells.seeds[number]) for at, number in cells.trials]
    layout = layout or names
    of = np.array([at for at, _ in cells.trials])
    count = len(cells.sets)
    counts = np.bincount(of, minlength=count).astype(float)
    freedom = int(np.maximum(counts - 1, 0).sum())
    tasks = len(cells.tasks)
    retention = np.full((len(of), tasks), np.nan)
    sampled = np.full((count, resamples, tasks), np.nan)
    by_items, both = np.zeros((tasks, count, count)), np.zeros(tasks)
    mean_of = (of[None] == np.arange(count)[:, None]) / counts[:, None]
    for each in cells.items:
        size, whole = len(each.whole), float(each.whole.sum())
        unbiased = size / max(1, size - 1)  # a resample of n items varies by (n - 1) / n of theirs
        times = item_weights(each.task, size, resamples=resamples, seed=seed)
        kept = mean_of @ each.kept
        retention[:, each.at] = each.kept.sum(1) / whole
        drawn = times @ each.whole
        point = kept.sum(1, keepdims=True) / whole
        moved = np.divide(
            kept @ times.T, drawn, out=np.full((count, resamples), np.nan), where=drawn > 0
        )
        sampled[:, :, each.at] = point + (moved - point) * math.sqrt(unbiased)
        # By how much each item moves the ratio; summed squares are its variance.
        moved = (kept - point * each.whole) / whole
        by_items[each.at] = unbiased * moved @ moved.T
        own = each.kept - kept[of]
        own = (own - own.sum(1, keepdims=True) / whole * each.whole) / whole
        both[each.at] = unbiased * float((own**2).sum()) / max(freedom, 1)
    means = mean_of @ retention
    residuals = np.nan_to_num(retention - means[of])
    values = rolled_up(means, cells.tasks, cells.dimensions)
    item = rolled_up(sampled, cells.tasks, cells.dimensions) - values[:, None]
    spread = residuals @ cells.weights.T
    squares = np.zeros(values.shape)
    np.add.at(squares, of, spread**2)
    own_freedom = np.maximum(counts - 1, 1)[:, None]
    deviations = np.where(counts[:, None] > 1, np.sqrt(squares / own_freedom), np.nan)
    draw = _draws(cells.sets, counts, spread, freedom, resamples, seed,
                  [layout.index(name) for name in names], len(layout))  # fmt: skip
    return Joint(
        values, counts, deviations, item.transpose(0, 2, 1), draw, cells.weights, by_items,
        residuals.T @ residuals / max(freedom, 1), both, freedom,
    )  # fmt: skip


def joints(results: StudyResults, made: Sequence[Cells], resamples: int, seed: int) -> list[Joint]:
    """Return the joint bootstrap of some conditions of a study, the same whichever are asked."""
    layout = sorted({(trial.calibration, trial.seed) for trial in results.trials})
    return [joint(cells, resamples=resamples, seed=seed, layout=layout) for cells in made]


def _draws(
    sets: Sequence[str], counts: Array, spread: Array, freedom: int, resamples: int, seed: int,
    columns: Sequence[int], width: int,
) -> Array:  # fmt: skip
    """Return what other draws would do to each set, shape (sets, quantities, resamples).

    A normal vector of the pooled covariance is the residual vectors' sum with normal factors.
    """
    found = np.zeros((len(sets), spread.shape[1], resamples))
    if not freedom:
        return found
    scale = np.sqrt(freedom / np.random.default_rng([seed, 1]).chisquare(freedom, resamples))
    for at, name in enumerate(sets):
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        factors = np.random.default_rng([seed, key]).standard_normal((resamples, width))
        normal = factors[:, columns] @ spread
        found[at] = (normal * scale[:, None] / math.sqrt(freedom * max(counts[at], 1))).T
    return found
