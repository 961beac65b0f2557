"""How sure a mean retention is: the items it was scored on and the draws it was calibrated on.

Two things would come out otherwise if the work were done again, and they are told apart:

* **items**: other test items. Every trial of a suite is scored on the same items, so this part
  does not shrink with more seeds; it is the mean half-width of the trials' own intervals.
* **draws**: other calibration rows, under other seeds. Its standard deviation is pooled over the
  calibration sets of one condition, because the two or three seeds of one set tell little.

Both together: the half-widths add in quadrature. All of this is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calmix.analysis.cells import nan_mean
from calmix.analysis.statistics import Array, Z, t_below, t_quantile


@dataclass(frozen=True)
class Estimate:
    """A mean retention over seeds with 95 % intervals; None where something cannot be told.

    Attributes:
        value: mean over seeds.
        low, high: items and draws together; items alone where the draws are unknown.
        item_low, item_high: items alone.
        draw_low, draw_high: draws alone.
        seeds: number of seeds averaged.
        deviation: standard deviation over this set's own seeds.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    item_low: float | None = None
    item_high: float | None = None
    draw_low: float | None = None
    draw_high: float | None = None
    seeds: int = 0
    deviation: float | None = None


@dataclass(frozen=True)
class Lead:
    """By how much one mean is ahead of another, with 95 % intervals.

    Attributes:
        value: the difference.
        draw_low, draw_high, draw_sure: for other draws, on these very items; `sure` is the
            probability of a difference above 0 under Student's t.
        low, high, sure: for other items too. The two sets are taken as scored on items of their
            own, though they share them: too wide rather than too narrow.
    """

    value: float
    draw_low: float | None
    draw_high: float | None
    draw_sure: float | None
    low: float | None
    high: float | None
    sure: float | None


@dataclass(frozen=True)
class Estimates:
    """Estimates of one quantity for every calibration set of a condition.

    Attributes:
        deviation: standard deviation over seeds, pooled over the sets; None from single seeds.
        freedom: degrees of freedom of that.
    """

    sets: tuple[Estimate, ...]
    deviation: float | None
    freedom: int

    def lead(self, ahead: int, behind: int) -> Lead | None:
        """Return by how much one set is ahead of another; None where either has no value."""
        a, b = self.sets[ahead], self.sets[behind]
        if a.value is None or b.value is None:
            return None
        difference = a.value - b.value
        draw = None
        if self.deviation is not None:
            draw = self.deviation * math.sqrt(1 / a.seeds + 1 / b.seeds)
        item_a, item_b = _item_error(a), _item_error(b)
        item = None if item_a is None or item_b is None else math.hypot(item_a, item_b)
        return Lead(difference, *_judge(difference, draw, 0.0, self.freedom),
                    *_judge(difference, draw, item, self.freedom))  # fmt: skip


def _item_error(estimate: Estimate) -> float | None:
    if estimate.item_low is None or estimate.item_high is None:
        return None
    return (estimate.item_high - estimate.item_low) / (2 * Z)


def _judge(
    difference: float, draw: float | None, item: float | None, freedom: int
) -> tuple[float | None, float | None, float | None]:
    if draw is None or item is None:
        return None, None, None
    error = math.hypot(draw, item)
    if error == 0:
        return difference, difference, 0.5 if difference == 0 else float(difference > 0)
    half = math.hypot(t_quantile(freedom) * draw, Z * item)
    sure = t_below(difference / error, freedom if draw > 0 else math.inf)
    return difference - half, difference + half, sure


def estimate(values: Array, below: Array, above: Array) -> Estimates:
    """Return mean and intervals of every calibration set.

    Args:
        values: shape (sets, seeds); nan where there is no trial.
        below, above: distances to the ends of each trial's interval over items, same shape.
    """
    known = ~np.isnan(values)
    counts = known.sum(1)
    means = nan_mean(values, 1)
    squares = np.where(known, (values - means[:, None]) ** 2, 0.0).sum(1)
    freedom = int(np.maximum(counts - 1, 0).sum())
    pooled = math.sqrt(float(squares.sum()) / freedom) if freedom else None
    item_below, item_above = nan_mean(below, 1), nan_mean(above, 1)
    made = []
    for at, count in enumerate(counts.tolist()):
        if not count:
            made.append(Estimate(None))
            continue
        value = float(means[at])
        own = math.sqrt(float(squares[at]) / (count - 1)) if count > 1 else None
        item = _ends(value, item_below[at], item_above[at])
        draw = None
        if pooled is not None:
            half = t_quantile(freedom) * pooled / math.sqrt(count)
            draw = value - half, value + half
        ends = item or draw
        if item is not None and draw is not None:
            ends = (
                value - math.hypot(half, float(item_below[at])),
                value + math.hypot(half, float(item_above[at])),
            )
        low, high = ends or (None, None)
        item_low, item_high = item or (None, None)
        draw_low, draw_high = draw or (None, None)
        made.append(
            Estimate(value, low, high, item_low, item_high, draw_low, draw_high, count, own)
        )
    return Estimates(tuple(made), pooled, freedom)


def _ends(value: float, below: float, above: float) -> tuple[float, float] | None:
    if math.isnan(below) or math.isnan(above):
        return None
    return value - float(below), value + float(above)
