"""What goes with what a set keeps: metrics of its text, its KL, and one dimension with another.

Method section 5. A calibration set is one point; its seeds are averaged first, since they are not
independent points. Only single sources count: a mix is made of them, and would count its parts
twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calmix.analysis.cells import TOTAL, Cells
from calmix.analysis.statistics import (
    ALPHA,
    LEAST,
    ROUNDING,
    Array,
    bootstrap_intervals,
    corrected,
    least_p,
    permutation_p,
    unit_ranks,
)
from calmix.options import Settings

METRIC = "perplexity"


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of one metric with the retention of one quantity under one condition."""

    condition: str
    metric: str
    aliases: tuple[str, ...]  # that order the sets alike; `-` before one that turns the order round
    quantity: str
    n: int  # sets counted: single sources; of KL all
    rho: float | None = None  # None where metric or retention do not vary
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided; exact if all orders were counted
    exact: bool = False
    least_p: float | None = None  # that so many points without ties can give
    p_corrected: float | None = None  # over all metrics of all conditions

    @property
    def significant(self) -> bool:
        """Whether it survives correction at 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA

    @property
    def agrees(self) -> bool:
        """Whether less of it goes with more retention beyond chance, not corrected."""
        return (self.rho or 0) < 0 and self.p is not None and self.p <= ALPHA


@dataclass(frozen=True)
class Spread:
    """How far apart the single sources are in the total or in one dimension.

    Sets that differ much in every dimension can look alike in the mean over dimensions, where
    gains in one cancel losses in another.
    """

    condition: str
    quantity: str
    n: int
    lowest: str
    highest: str
    range: float
    p_cancel: float | None  # one-sided p of so close totals, dimensions dealt anew (ours)


def distinct(cells: Cells, chosen: Sequence[int]) -> list[tuple[int, tuple[str, ...]]]:
    """Return the metrics that order the chosen sets differently, with the names of the others.

    At a fixed budget some metrics are functions of one another; they would be one test made
    several times. A metric that is the same for all sets is left out. Perplexity comes first, to
    go by its own name.
    """
    found: list[tuple[int, list[str], Array]] = []
    for column in sorted(range(len(cells.metrics)), key=lambda at: cells.metrics[at] != METRIC):
        name, values = cells.metrics[column], cells.information[list(chosen), column]
        known = ~np.isnan(values)
        own = np.full(len(values), np.nan)
        own[known] = unit_ranks(values[known]) if known.any() else np.nan
        if np.isnan(own).all():
            continue
        for _, aliases, other in found:
            rho = float(np.nansum(own * other))
            if np.array_equal(np.isnan(own), np.isnan(other)) and abs(rho) >= 1 - ROUNDING:
                aliases.append(name if rho > 0 else f"-{name}")
                break
        else:
            found.append((column, [], own))
    return [(column, tuple(aliases)) for column, aliases, _ in found]


def correlate(conditions: Sequence[Cells], settings: Settings) -> list[Correlation]:
    """Correlate every metric with every quantity under each condition; with fewer than four sets
    there is nothing."""
    made = []
    for cells in conditions:
        chosen = cells.of("single")
        for column, aliases in distinct(cells, chosen) if len(chosen) >= LEAST else ():
            x = cells.information[:, column]
            known = [at for at in chosen if not np.isnan(x[at])]
            head = cells.condition.label, cells.metrics[column], aliases
            made += _correlated(head, cells, x, cells.quantities, known, settings)
    return corrected(made, p_corrected=lambda one: one.p)


def agreements(cells: Cells, settings: Settings) -> list[Correlation]:
    """Correlate KL to the dense model with retention over all sets, in total and by dimension
    (ours); quantities with fewer than four sets are left out."""
    made = []
    for at, name in enumerate(cells.quantities):
        x = cells.distance["kl"][:, at]
        known = np.flatnonzero(~np.isnan(x + cells.means[:, at])).tolist()
        if len(known) >= LEAST:
            head = cells.condition.label, "kl", ()
            made += _correlated(head, cells, x, [name], known, settings)
    return made


def _correlated(
    head: tuple[str, str, tuple[str, ...]],
    cells: Cells,
    x: Array,
    quantities: Sequence[str],
    own: Sequence[int],
    settings: Settings,
) -> list[Correlation]:
    """Correlate x, shape (sets,), with quantities over its `own` sets; `rho` is None where x or the
    quantity do not vary, or of fewer than four sets."""
    y = cells.means[own][:, [cells.quantities.index(name) for name in quantities]].T
    known = np.flatnonzero(~np.isnan(y).any(1)).tolist() if len(own) >= LEAST else []
    found: dict[int, dict[str, Any]] = {}
    if known:
        x, y = x[own], y[known]
        rho = (unit_ranks(y) @ unit_ranks(x)).tolist()
        p, exact = permutation_p(x, y, permutations=settings.permutations, seed=settings.seed)
        ends = bootstrap_intervals(x, y, resamples=settings.resamples, seed=settings.seed)
        low, high = (np.where(np.isnan(end), None, end) for end in ends.T)
        found = {
            at: {"rho": rho[n], "low": low[n], "high": high[n], "p": float(p[n]), "exact": exact}
            for n, at in enumerate(known) if not math.isnan(rho[n])
        }  # fmt: skip
    least = least_p(len(own), settings.permutations)
    return [Correlation(*head, name, len(own), least_p=least, **found.get(at, {}))
            for at, name in enumerate(quantities)]  # fmt: skip


def cancellation(parts: Array, *, permutations: int, seed: int) -> float:
    """Return the one-sided p of so small a deviation of the mean over dimensions were they
    unrelated, from retention of shape (sets, dimensions)."""
    drawn = np.tile(parts.T, (permutations, 1, 1))
    dealt = np.random.default_rng([seed, len(parts)]).permuted(drawn, axis=2).mean(1).std(1)
    return float(((dealt <= parts.mean(1).std() + ROUNDING).sum() + 1) / (permutations + 1))


def spreads(cells: Cells, settings: Settings) -> list[Spread]:
    """Return the spread of total and dimensions over single sources, of two or more."""
    found, chosen = [], cells.of("single")
    means = cells.means[chosen][:, : len(cells.quantities)]
    parts = means[:, 1:][:, ~np.isnan(means[:, 1:]).any(0)]
    for quantity, values in zip(cells.quantities, means.T, strict=True):
        if len(chosen) < 2 or np.isnan(values).any():
            continue
        p = None
        if quantity == TOTAL and len(chosen) >= LEAST and parts.shape[1] > 1:
            p = cancellation(parts, permutations=settings.resamples, seed=settings.seed)
        low, high = (cells.sets[chosen[int(at)]] for at in (values.argmin(), values.argmax()))
        found.append(Spread(cells.condition.label, quantity, len(chosen), low, high,
                            float(values.max() - values.min()), p))  # fmt: skip
    return found
