"""Which information metric goes with which dimension's retention, and the trade-offs among them.

Method section 5. A calibration set is one point; its draws are averaged first, since draws of
one source are not independent points. By default only single sources count: a mix is made of
them, and would count its parts twice. Correlations within kinds of text (prose, code, math) are
ours: over all sources a metric may only tell code from prose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from calmix.analysis.cells import Cells
from calmix.analysis.statistics import (
    ALPHA,
    LEAST,
    ROUNDING,
    Array,
    Strata,
    benjamini_hochberg,
    bootstrap_intervals,
    one_stratum,
    permutation_p,
    unit_ranks,
)

Over = Literal["single", "all"]
Among = Literal["sources", "kinds"]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of one metric with the retention of one quantity under one condition.

    Attributes:
        metric: stands for its `aliases` too, which order the sets alike; `-` before one that
            orders them the other way round.
        quantity: `total`, a dimension, or a task.
        task: whether it is a task.
        among: all `sources` at once, or within `kinds` of source: ranks and permutations within
            each, pooled.
        n: calibration sets counted.
        rho: None where metric or retention do not vary.
        low, high: 95 % bootstrap interval over the sets.
        p: two-sided; `exact` if all orders were counted.
        p_corrected: after Benjamini-Hochberg over its family: one `among`, all conditions, tasks
            by themselves. None where rho is.
    """

    condition: str
    metric: str
    aliases: tuple[str, ...]
    quantity: str
    task: bool
    among: Among
    n: int
    rho: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    exact: bool = False
    p_corrected: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it survives correction at 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA

    @property
    def family(self) -> tuple[Among, bool]:
        """What it is corrected with."""
        return self.among, self.task


@dataclass(frozen=True)
class TradeOff:
    """A metric that goes up with one dimension and down with another, both surviving
    correction."""

    condition: str
    metric: str
    among: Among
    rises: str
    rho_rises: float
    p_rises: float
    falls: str
    rho_falls: float
    p_falls: float


def counted(cells: Cells, over: Over) -> list[int]:
    """Return the positions of the calibration sets that count as points."""
    return cells.of("single") if over == "single" else list(range(len(cells.sets)))


def kinds_of(cells: Cells) -> list[list[int]]:
    """Return the positions of the single sources by kind, kinds with two or more; empty if there
    is but one such kind, or fewer than four sources in them."""
    known = dict.fromkeys(cells.kinds[at] for at in cells.of("single") if cells.kinds[at])
    groups = [[at for at in cells.of("single") if cells.kinds[at] == kind] for kind in known]
    told = [group for group in groups if len(group) > 1]
    return told if len(told) > 1 and sum(map(len, told)) >= LEAST else []


def distinct(cells: Cells, chosen: Sequence[int]) -> list[tuple[int, tuple[str, ...]]]:
    """Return the metrics that order the chosen sets differently, with the names of the others.

    At a fixed budget some metrics are functions of one another; they would be one test made
    several times. A metric that is the same for all sets is left out.
    """
    found: list[tuple[int, list[str]]] = []
    ranks: list[Array] = []
    for column, name in enumerate(cells.metrics):
        values = cells.information[list(chosen), column]
        known = ~np.isnan(values)
        own = np.full(len(values), np.nan)
        own[known] = unit_ranks(values[known]) if known.any() else np.nan
        if np.isnan(own).all():
            continue
        for (_, aliases), other in zip(found, ranks, strict=True):
            same = np.array_equal(np.isnan(own), np.isnan(other))
            rho = float(np.nansum(own * other))
            if same and abs(rho) >= 1 - ROUNDING:
                aliases.append(name if rho > 0 else f"-{name}")
                break
        else:
            found.append((column, []))
            ranks.append(own)
    return [(column, tuple(aliases)) for column, aliases in found]


def correlate(
    cells: Cells, over: Over, *, permutations: int, resamples: int, seed: int
) -> list[Correlation]:
    """Return every metric with every quantity of one condition, not corrected yet.

    Empty with fewer than four sets.
    """
    made = []
    every = counted(cells, over)
    told: list[tuple[Among, list[list[int]]]] = [("sources", [every]), ("kinds", kinds_of(cells))]
    for among, groups in told:
        chosen = [at for group in groups for at in group]
        if len(chosen) < LEAST:
            continue
        for column, aliases in distinct(cells, chosen):
            x = cells.information[:, column]
            strata = _strata([[at for at in group if not np.isnan(x[at])] for group in groups])
            points = [at for group in groups for at in group if not np.isnan(x[at])]
            made += _row(
                cells, cells.metrics[column], aliases, among, points, strata,
                x[points], permutations, resamples, seed,
            )  # fmt: skip
    return made


def _strata(groups: Sequence[Sequence[int]]) -> Strata:
    ends = np.cumsum([0, *map(len, groups)])
    return tuple(
        tuple(range(start, stop)) for start, stop in itertools.pairwise(ends)
        if stop > start
    )  # fmt: skip


def _row(
    cells: Cells, metric: str, aliases: tuple[str, ...], among: Among, points: list[int],
    strata: Strata, x: Array, permutations: int, resamples: int, seed: int,
) -> list[Correlation]:  # fmt: skip
    """Return one metric with every quantity."""
    names = [*cells.quantities, *(task.name for task in cells.tasks)]
    blank = [
        Correlation(cells.condition.label, metric, aliases, name,
                    at >= len(cells.quantities), among, len(points))
        for at, name in enumerate(names)
    ]  # fmt: skip
    y = cells.means[points].T
    told = [at for at in range(len(names)) if not np.isnan(y[at]).any()]
    if len(points) < LEAST or not told:
        return blank
    rho = unit_ranks(y[told], strata) @ unit_ranks(x, strata)
    p, exact = permutation_p(x, y[told], strata, permutations=permutations, seed=seed)
    ends = bootstrap_intervals(x, y[told], strata, resamples=resamples, seed=seed)
    for at, value, own_p, (low, high) in zip(told, rho, p, ends, strict=True):
        if not math.isnan(value):
            low, high = (None, None) if math.isnan(low) else (float(low), float(high))
            blank[at] = replace(
                blank[at], rho=float(value), low=low, high=high, p=float(own_p), exact=exact
            )
    return blank


def strata_of(cells: Cells, over: Over, among: Among) -> Strata:
    """Return the sets that are permuted among one another, as positions among those counted."""
    if among == "kinds":
        return _strata(kinds_of(cells))
    return one_stratum(len(counted(cells, over)))


def corrected(correlations: Sequence[Correlation]) -> list[Correlation]:
    """Return the correlations with p corrected, each family by itself."""
    made = list(correlations)
    for family in dict.fromkeys(one.family for one in made):
        at = [n for n, one in enumerate(made) if one.family == family and one.p is not None]
        adjusted = benjamini_hochberg([made[n].p or 0.0 for n in at])
        for n, p in zip(at, adjusted, strict=True):
            made[n] = replace(made[n], p_corrected=p)
    return made


def trade_offs(correlations: Sequence[Correlation], dimensions: Sequence[str]) -> list[TradeOff]:
    """Return every pair of dimensions that one metric moves in opposite directions."""
    found = []
    strong = [
        one for one in correlations
        if one.significant and not one.task and one.quantity in dimensions
    ]  # fmt: skip
    for up in strong:
        for down in strong:
            same = (up.condition, up.metric, up.among) == (down.condition, down.metric, down.among)
            if not same or up.rho is None or down.rho is None or not up.rho > 0 > down.rho:
                continue
            if up.p_corrected is not None and down.p_corrected is not None:
                found.append(
                    TradeOff(up.condition, up.metric, up.among, up.quantity, up.rho,
                             up.p_corrected, down.quantity, down.rho, down.p_corrected)
                )  # fmt: skip
    return found
