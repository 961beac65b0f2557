"""Calibration sets in order of what they keep, by total and by worst dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calmix.analysis.cells import TOTAL, Cells
from calmix.analysis.estimates import Estimate, Estimates, Lead, estimate


@dataclass(frozen=True)
class Ranked:
    """One calibration set under one condition.

    Attributes:
        rank, rank_worst: by total and by worst dimension, from 1; None without a value.
        worst: the dimension with the lowest mean.
        lowest: its estimate. The lowest of several noisy means lies somewhat too low.
        behind: how far the total is behind the best one's; None for the best.
    """

    condition: str
    calibration: str
    strategy: str
    rank: int | None
    rank_worst: int | None
    total: Estimate
    worst: str | None
    lowest: Estimate
    dimensions: dict[str, Estimate]
    behind: Lead | None


def quantity_estimates(cells: Cells) -> dict[str, Estimates]:
    """Return the estimates of every quantity of a condition."""
    return {
        name: estimate(cells.values[:, :, at], cells.below[:, :, at], cells.above[:, :, at])
        for at, name in enumerate(cells.quantities)
    }


def rank(cells: Cells) -> list[Ranked]:
    """Return the calibration sets of a condition, best total first."""
    found = quantity_estimates(cells)
    total = found[TOTAL]
    rows = []
    for at in range(len(cells.sets)):
        dimensions = {name: found[name].sets[at] for name in cells.dimensions}
        known = {name: one.value for name, one in dimensions.items() if one.value is not None}
        worst = min(known, key=lambda name: known[name]) if known else None
        rows.append((dimensions, worst))
    by_total = _places([total.sets[at].value for at in range(len(rows))])
    lows = [Estimate(None) if worst is None else dims[worst] for dims, worst in rows]
    by_worst = _places([low.value for low in lows])
    best = by_total.index(1) if 1 in by_total else None
    ranked = [
        Ranked(
            cells.condition.label, cells.sets[at], cells.strategies[at], by_total[at],
            by_worst[at], total.sets[at], worst, lows[at], dims,
            None if best is None or at == best else total.lead(best, at),
        )
        for at, (dims, worst) in enumerate(rows)
    ]  # fmt: skip
    return sorted(ranked, key=lambda one: np.inf if one.rank is None else one.rank)


def _places(values: Sequence[float | None]) -> list[int | None]:
    """Return each value's place, the highest first; equal values in the order given."""
    known = [at for at, value in enumerate(values) if value is not None]
    order = sorted(known, key=lambda at: -(values[at] or 0.0))
    places: list[int | None] = [None] * len(values)
    for place, at in enumerate(order, start=1):
        places[at] = place
    return places
