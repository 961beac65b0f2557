"""Power: how small a difference of two calibration sets so many draws and items can tell.

A difference of two means of k draws each has, of the draws and of the items, the variance

    2 s^2 / k + v^2

s the standard deviation of one draw, pooled over sets, and v that of the paired difference over
other items; v^2 falls with the number of items. Two readings: on these items (v = 0), and for
other items too. A difference counts as told if its two-sided 95 % interval by Student's t leaves
out 0; *detectable* is what is told in 80 % of studies (noncentral t). The degrees of freedom are
those of s, and Satterthwaite's where items are part of the error. The s at hand is taken for the
true one, and its freedom as given: draws still to come would add some (ours: the safe side).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from calmix.analysis.statistics import LEVEL, Z, scipy_stats

POWER = 0.80
Z_POWER = 0.8416212335729143  # normal quantile of it
MOST = 1_000_000  # draws beyond which none are counted; freedom beyond which t is normal


@dataclass(frozen=True)
class Needed:
    """What tells a difference.

    Attributes:
        difference: a share, as retention is (0.01 is a point).
        draws: of each set, for other draws on these items.
        draws_items: for other items too; None where no number of draws is enough.
        items: times the items at hand that are needed at the least, with however many draws.
    """

    difference: float
    draws: int
    draws_items: int | None
    items: float


def detectable(draws: int, draw: float, freedom: float, item: float = 0.0) -> float:
    """Return the difference that so many draws of each set tell in 80 % of studies.

    Args:
        draws: k, at least 1.
        draw: s, with its degrees of `freedom` (above 0).
        item: v; 0 for other draws on these items.
    """
    drawn = draw * math.sqrt(2 / draws)
    error = math.hypot(drawn, item)
    if error == 0:
        return 0.0
    share = (drawn / error) ** 2  # of the variance
    return _noncentrality(freedom / share**2 if share > 0 else math.inf) * error


def _noncentrality(freedom: float) -> float:
    """Return how many standard errors are told in 80 % of studies: 2.8 with much freedom."""
    if freedom >= MOST:
        return Z + Z_POWER
    stats = scipy_stats()
    critical = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    low, high = 0.0, 4 * critical  # freedom far below 1 would need more
    for _ in range(50):
        middle = (low + high) / 2
        enough = stats.nct.sf(critical, freedom, middle) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def needed(difference: float, draw: float, freedom: float, item: float) -> Needed:
    """Return the draws and items that tell a difference (above 0); arguments as `detectable`."""
    on_these = 2 * (_noncentrality(freedom) * draw / difference) ** 2
    times = ((Z + Z_POWER) * item / difference) ** 2
    return Needed(
        difference,
        max(1, math.ceil(on_these * (1 - 1e-12))),
        None if times >= 1 else _draws(difference, draw, freedom, item),
        times,
    )


def _draws(difference: float, draw: float, freedom: float, item: float) -> int | None:
    """Return the least k at which a difference is detectable; what is falls with k."""
    low, high = 0, 1
    while detectable(high, draw, freedom, item) > difference:
        low, high = high, 2 * high
        if low > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if detectable(middle, draw, freedom, item) > difference:
            low = middle
        else:
            high = middle
    return high
