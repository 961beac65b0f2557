"""What goes with what a set keeps: metrics of its text, its KL, and one dimension with another.

Method section 5. A calibration set is one point; its seeds are averaged first, since they are not
independent points. Only single sources count: a mix is made of them, and would count its parts
twice. Correlations within kinds of text (prose, code, math) are ours: over all sources a
metric may only tell code from prose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from calmix.analysis.cells import TOTAL, Cells
from calmix.analysis.statistics import (
    ALPHA,
    LEAST,
    ROUNDING,
    Array,
    Strata,
    bootstrap_intervals,
    permutation_p,
    unit_ranks,
)
from calmix.options import Settings

Among = Literal["sources", "kinds", "sets"]
Over = Literal["single", "all"]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of one metric with the retention of one quantity under one condition."""

    condition: str
    metric: str
    aliases: tuple[str, ...]  # that order the sets alike; `-` before one that turns the order round
    quantity: str
    among: Among  # all sources; ranked and permuted within kinds of source; or all sets (KL)
    n: int  # sets counted
    rho: float | None = None  # None where metric or retention do not vary
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided; exact if all orders were counted
    exact: bool = False
    p_corrected: float | None = None  # over one `among` of all conditions

    @property
    def significant(self) -> bool:
        """Whether it survives correction at 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA

    @property
    def agrees(self) -> bool:
        """Whether less of it goes with more retention beyond chance, not corrected."""
        return (self.rho or 0) < 0 and self.p is not None and self.p <= ALPHA


@dataclass(frozen=True)
class TradeOff:
    """A metric that goes up with one dimension and down with another, both after correction."""

    condition: str
    metric: str
    among: Among
    rises: str
    rho_rises: float
    p_rises: float
    falls: str
    rho_falls: float
    p_falls: float


@dataclass(frozen=True)
class Spread:
    """How far apart the calibration sets are in the total or in one dimension.

    Sets that differ much in every dimension can look alike in the mean over dimensions, where
    gains in one cancel losses in another.
    """

    condition: str
    over: Over
    quantity: str
    n: int
    lowest: str
    highest: str
    range: float
    deviation: float
    if_independent: float | None  # of the total: its deviation were the dimensions unrelated (ours)
    p_cancel: float | None  # one-sided p of so small a deviation then, dimensions dealt anew (ours)


def points(cells: Cells) -> dict[Among, list[list[int]]]:
    """Return the positions of the sets that count, in the groups that are permuted by themselves.

    Without `kinds` if fewer than two kinds have two sources, or those are fewer than four sources.
    """
    singles = cells.of("single")
    kinds = dict.fromkeys(cells.kinds[at] for at in singles if cells.kinds[at])
    groups = [[at for at in singles if cells.kinds[at] == kind] for kind in kinds]
    groups = [group for group in groups if len(group) > 1]
    found: dict[Among, list[list[int]]] = {"sources": [singles]}
    if len(groups) > 1 and sum(map(len, groups)) >= LEAST:
        found["kinds"] = groups
    return found


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
            rho = float(np.nansum(own * other))
            if np.array_equal(np.isnan(own), np.isnan(other)) and abs(rho) >= 1 - ROUNDING:
                aliases.append(name if rho > 0 else f"-{name}")
                break
        else:
            found.append((column, []))
            ranks.append(own)
    return [(column, tuple(aliases)) for column, aliases in found]


def correlate(cells: Cells, settings: Settings) -> list[Correlation]:
    """Correlate every metric with every quantity of one condition, p not corrected yet; with fewer
    than four sets there is nothing."""
    made = []
    for among, every in points(cells).items():
        chosen = [at for group in every for at in group]
        for column, aliases in distinct(cells, chosen) if len(chosen) >= LEAST else ():
            x = cells.information[:, column]
            groups = [[at for at in group if not np.isnan(x[at])] for group in every]
            own, sizes = (
                [at for group in groups for at in group],
                [len(one) for one in groups if one],
            )
            kept = cells.means[own][:, : len(cells.quantities)]
            found = _rhos(x[own], kept.T, sizes, settings)
            made += [
                Correlation(cells.condition.label, cells.metrics[column], aliases, name, among,
                            len(own), **found.get(at, {}))
                for at, name in enumerate(cells.quantities)
            ]  # fmt: skip
    return made


def _rhos(x: Array, y: Array, strata: Strata, settings: Settings) -> dict[int, dict[str, Any]]:
    """Correlate x, shape (n,), with the rows of y, and return rho, interval and p by row; rows
    without a rho are left out."""
    known, seed = np.flatnonzero(~np.isnan(y).any(1)), settings.seed
    if len(x) < LEAST or not len(known):
        return {}
    y = y[known]
    rho = unit_ranks(y, strata) @ unit_ranks(x, strata)
    p, exact = permutation_p(x, y, strata, permutations=settings.permutations, seed=seed)
    ends = bootstrap_intervals(x, y, strata, resamples=settings.resamples, seed=seed)
    low, high = (np.where(np.isnan(end), None, end) for end in ends.T)
    return {
        at: {"rho": value, "low": low[n], "high": high[n], "p": float(p[n]), "exact": exact}
        for n, (at, value) in enumerate(zip(known.tolist(), rho.tolist(), strict=True))
        if not math.isnan(value)
    }


def trade_offs(correlations: Sequence[Correlation], dimensions: Sequence[str]) -> list[TradeOff]:
    """Return every pair of dimensions that one metric moves in opposite directions."""
    strong = [
        (one, one.rho, one.p_corrected) for one in correlations
        if one.rho is not None and one.p_corrected is not None and one.p_corrected <= ALPHA
        and one.quantity in dimensions
    ]  # fmt: skip
    return [
        TradeOff(up.condition, up.metric, up.among, up.quantity, rise, p, down.quantity, fall, q)
        for (up, rise, p), (down, fall, q) in itertools.product(strong, strong)
        if (up.condition, up.metric, up.among) == (down.condition, down.metric, down.among)
        and rise > 0 > fall
    ]


def agreements(cells: Cells, settings: Settings) -> list[Correlation]:
    """Correlate KL to the dense model with retention over all sets, in total and by dimension
    (ours); quantities with fewer than four sets are left out."""
    made = []
    for at, name in enumerate(cells.quantities):
        both = np.stack([cells.distance["kl"][:, at], cells.means[:, at]])
        x, y = both[:, ~np.isnan(both).any(0)]
        if len(x) >= LEAST:
            found = _rhos(x, y[None], [len(x)], settings).get(0, {})
            made.append(Correlation(cells.condition.label, "kl", (), name, "sets", len(x),
                                    **found))  # fmt: skip
    return made


def cancellation(parts: Array, *, permutations: int, seed: int) -> tuple[float, float]:
    """Return the deviation of the mean over unrelated dimensions, and the p of the observed one, of
    retention of shape (sets, dimensions)."""
    sets, dimensions = parts.shape
    unrelated = float(np.sqrt(parts.var(0, ddof=1).sum()) / dimensions)
    drawn = np.tile(parts.T, (permutations, 1, 1))
    dealt = np.random.default_rng([seed, sets]).permuted(drawn, axis=2).mean(1).std(1)
    as_small = int((dealt <= parts.mean(1).std() + ROUNDING).sum())
    return unrelated, (as_small + 1) / (permutations + 1)


def spreads(cells: Cells, settings: Settings) -> list[Spread]:
    """Return the spread of total and dimensions over single sources and over all sets, where there
    are two or more."""
    found = []
    for over in get_args(Over):
        chosen = cells.of("single") if over == "single" else list(range(len(cells.sets)))
        means = cells.means[chosen][:, : len(cells.quantities)]
        parts = means[:, 1:][:, ~np.isnan(means[:, 1:]).any(0)]
        for quantity, values in zip(cells.quantities, means.T, strict=True):
            if len(chosen) < 2 or np.isnan(values).any():
                continue
            unrelated = p = None
            if quantity == TOTAL and len(chosen) >= LEAST and parts.shape[1] > 1:
                unrelated, p = cancellation(
                    parts, permutations=settings.resamples, seed=settings.seed
                )
            low, high = (cells.sets[chosen[int(at)]] for at in (values.argmin(), values.argmax()))
            found.append(
                Spread(cells.condition.label, over, quantity, len(chosen), low, high,
                       float(values.max() - values.min()), float(values.std(ddof=1)), unrelated, p)
            )  # fmt: skip
    return found
