"""Which information metric goes with which dimension's retention, and the trade-offs among them.

Method section 5. A calibration set is one point: its seeds are averaged first, since draws of
one source are not independent points. By default only single sources count: a mix is made of
them, and would count its parts twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from calmix.analysis.cells import Cells
from calmix.analysis.statistics import (
    LEAST,
    benjamini_hochberg,
    bootstrap_interval,
    permutation_p,
    spearman,
)

Over = Literal["single", "all"]
ALPHA = 0.05


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of one metric with one dimension's retention under one condition.

    Attributes:
        dimension: or `total`.
        n: calibration sets counted.
        rho: None where metric or retention do not vary.
        low, high: 95 % bootstrap interval over the sets.
        p: two-sided; `exact` if all orders were counted.
        p_corrected: after Benjamini-Hochberg over the whole family; None where rho is.
    """

    condition: str
    metric: str
    dimension: str
    n: int
    rho: float | None
    low: float | None
    high: float | None
    p: float | None
    exact: bool
    p_corrected: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it survives correction at 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


@dataclass(frozen=True)
class TradeOff:
    """A metric that goes up with one dimension and down with another, both surviving
    correction."""

    condition: str
    metric: str
    rises: str
    rho_rises: float
    p_rises: float
    falls: str
    rho_falls: float
    p_falls: float


def counted(cells: Cells, over: Over) -> list[int]:
    """Return the positions of the calibration sets that count as points."""
    return cells.of("single") if over == "single" else list(range(len(cells.sets)))


def correlate(
    cells: Cells, over: Over, *, permutations: int, resamples: int, seed: int
) -> list[Correlation]:
    """Return every metric with every quantity of one condition, not corrected yet.

    A metric that is the same for all sets (a token count at a fixed budget) is left out. Empty
    with fewer than four sets.
    """
    chosen = counted(cells, over)
    if len(chosen) < LEAST:
        return []
    found = []
    retention = cells.means[chosen]
    for column, metric in enumerate(cells.metrics):
        x = cells.information[chosen, column]
        if len(np.unique(x[~np.isnan(x)])) < 2:
            continue
        for row, quantity in enumerate(cells.quantities):
            y = retention[:, row]
            known = ~np.isnan(x) & ~np.isnan(y)
            a, b = x[known], y[known]
            rho = spearman(a, b) if len(a) >= LEAST else math.nan
            if math.isnan(rho):
                found.append(Correlation(cells.condition.label, metric, quantity, len(a), None,
                                         None, None, None, exact=False))  # fmt: skip
                continue
            p, exact = permutation_p(a, b, permutations=permutations, seed=seed)
            low, high = bootstrap_interval(a, b, resamples=resamples, seed=seed) or (None, None)
            found.append(
                Correlation(
                    cells.condition.label, metric, quantity, len(a), rho, low, high, p, exact
                )
            )
    return found


def corrected(correlations: Sequence[Correlation]) -> list[Correlation]:
    """Return the correlations with p corrected over all of them as one family."""
    told = [found for found in correlations if found.p is not None]
    adjusted = iter(benjamini_hochberg([found.p for found in told if found.p is not None]))
    return [
        found if found.p is None else replace(found, p_corrected=next(adjusted))
        for found in correlations
    ]


def trade_offs(correlations: Sequence[Correlation], dimensions: Sequence[str]) -> list[TradeOff]:
    """Return every pair of dimensions that one metric moves in opposite directions."""
    found = []
    strong = [
        entry for entry in correlations if entry.significant and entry.dimension in dimensions
    ]
    for up in strong:
        for down in strong:
            same = (up.condition, up.metric) == (down.condition, down.metric)
            if not same or up.rho is None or down.rho is None or not up.rho > 0 > down.rho:
                continue
            if up.p_corrected is not None and down.p_corrected is not None:
                found.append(
                    TradeOff(up.condition, up.metric, up.dimension, up.rho, up.p_corrected,
                             down.dimension, down.rho, down.p_corrected)
                )  # fmt: skip
    return found
