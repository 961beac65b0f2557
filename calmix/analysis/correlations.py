"""What goes with what a set keeps: metrics of its text, its KL, and one dimension with another.

Method section 5. A calibration set is one point; its seeds are averaged first, since they are not
independent points. Only single sources count: a mix is made of them, and would count its parts
twice. Which sizes are exact, the resampling and the numbers of draws are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from calmix.analysis.bootstrap import ALPHA, ROUNDING, corrected
from calmix.analysis.cells import TOTAL, Cells
from calmix.evaluation.measures import Array
from calmix.evaluation.retention import LEVEL, RESAMPLES
from calmix.options import Settings

METRIC = "perplexity"
EXACT = 40_320  # orders of 8 values: no more than these are counted, more are sampled
LEAST = 4  # fewer sets than this cannot be correlated: even rho = 1 would have p >= 0.33
PERMUTATIONS = 19_999


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


def unit_ranks(values: Array) -> Array:
    """Return ranks along the last axis, centred and of length 1; nan where all values tie.

    The product of two such rows is Spearman's rho.
    """
    from scipy.stats import rankdata  # takes a second to import

    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


@lru_cache(maxsize=16)
def orders(size: int, count: int, seed: int) -> NDArray[np.intp]:
    """Return orders of so many things, one a row: all up to 8!, else seeded draws."""
    things = np.arange(size, dtype=np.intp)
    if math.factorial(size) <= EXACT:
        return np.array([*itertools.permutations(things)])
    return np.random.default_rng([seed, size]).permuted(np.tile(things, (count, 1)), axis=1)


def permutation_p(
    x: Array, y: Array, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[Array, bool]:
    """Return the two-sided p of Spearman's rho, nan without variation, and whether it is exact.

    The share of pairings whose |rho| is at least the observed one: of all pairings up to those of
    8 values, beyond that of seeded draws, the observed one among them. x has shape (n,), y
    (..., n); each row is tested by itself.
    """
    exact = math.factorial(len(x)) <= EXACT
    a, b = unit_ranks(x), unit_ranks(y)
    observed = np.abs(b @ a)
    drawn = np.abs(a[orders(len(x), permutations, seed)] @ b.T)
    extreme = (drawn >= observed - ROUNDING).sum(0)
    p = extreme / len(drawn) if exact else (extreme + 1) / (len(drawn) + 1)
    return np.where(np.isnan(observed), np.nan, p), exact


def least_p(size: int, permutations: int = PERMUTATIONS) -> float:
    """Return the smallest two-sided p that so many values without ties can give."""
    count = math.factorial(size)
    return 2 / count if count <= EXACT else 1 / (permutations + 1)


def bootstrap_intervals(x: Array, y: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Return the 95 % percentile interval of rho over resampled pairs, shape (..., 2).

    nan if fewer than half of the resamples vary in both. x has shape (n,), y (..., n).
    """
    drawn = np.random.default_rng([seed, len(x)]).integers(len(x), size=(resamples, len(x)))
    found = (unit_ranks(x[drawn]) * unit_ranks(y[..., drawn])).sum(-1)
    few = 2 * (~np.isnan(found)).sum(-1) < resamples
    tail = (1 - LEVEL) / 2
    ends = np.nanquantile(np.where(few[..., None], 0.0, found), [tail, 1 - tail], axis=-1)
    return np.where(few[..., None], np.nan, np.clip(np.moveaxis(ends, 0, -1), -1.0, 1.0))


def distinct(cells: Cells, chosen: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Return the metrics that order the chosen sets differently, with the names of the others.

    At a fixed budget some metrics are functions of one another; they would be one test made
    several times. A metric that is the same for all sets is left out. Perplexity comes first, to
    go by its own name.
    """
    values = cells.information.iloc[list(chosen)]
    values = values.loc[:, values.nunique() > 1]
    known, rho, found = values.notna(), values.corr("spearman"), dict[str, tuple[str, ...]]()
    for name in sorted(values, key=lambda name: name != METRIC):
        for other in found:
            if known[name].equals(known[other]) and abs(rho.loc[name, other]) >= 1 - ROUNDING:
                found[other] += (name if rho.loc[name, other] > 0 else f"-{name}",)
                break
        else:
            found[name] = ()
    return found


def correlate(conditions: Sequence[Cells], settings: Settings) -> list[Correlation]:
    """Correlate every metric with every quantity under each condition; with fewer than four sets
    there is nothing."""
    made = []
    for cells in conditions:
        chosen = cells.of("single")
        for metric, aliases in distinct(cells, chosen).items() if len(chosen) >= LEAST else ():
            x = cells.information[metric].to_numpy()
            known = [at for at in chosen if not np.isnan(x[at])]
            head = cells.condition.label, metric, aliases
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
    quantity do not vary or are not known, or of fewer than four sets."""
    rows = np.full((len(quantities), 4), np.nan)
    exact, least = False, least_p(len(own), settings.permutations)
    if len(own) >= LEAST:
        x, y = x[own], cells.means[own][:, [cells.quantities.index(name) for name in quantities]].T
        p, exact = permutation_p(x, y, permutations=settings.permutations, seed=settings.seed)
        ends = bootstrap_intervals(x, y, resamples=settings.resamples, seed=settings.seed)
        rows = np.column_stack([unit_ranks(y) @ unit_ranks(x), ends, p])
    found = []
    for name, row in zip(quantities, rows.tolist(), strict=True):
        rho, low, high, chance = (None if math.isnan(value) else value for value in row)
        told = exact and rho is not None
        found.append(Correlation(*head, name, len(own), rho, low, high, chance, told, least))
    return found


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
