"""Correlations of retention with metrics of the calibration text and with KL.

Method section 5. A calibration set is one point; its seeds are averaged first, since they are not
independent points. Only single sources count, since a mix would count its sources twice. The
limit of exact tests, the resampling and the numbers of samples are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from calmix.analysis.bootstrap import ALPHA, ROUNDING, TAILS
from calmix.analysis.cells import Cells
from calmix.evaluation.measures import Array
from calmix.evaluation.retention import RESAMPLES
from calmix.options import Settings

METRIC = "perplexity"
EXACT = 40_320  # 8!: enumerate up to this many permutations, sample if there are more
FEWEST_SETS = 4  # fewest sets to correlate: with fewer, even rho = 1 has p >= 0.33
PERMUTATIONS = 19_999


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho between a metric and the retention of a quantity under one condition."""

    condition: str
    metric: str
    aliases: tuple[str, ...]  # metrics that rank the sets alike, or in reverse (`-` before them)
    quantity: str
    n: int  # number of sets: single sources, or for KL all
    rho: float | None = None  # None if metric or retention does not vary
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided; exact if all permutations were enumerated
    exact: bool = False
    least_p: float | None = None  # smallest p possible with this many points and no ties
    p_corrected: float | None = None  # over all exploratory tests of the analysis

    @property
    def significant(self) -> bool:
        """Whether the corrected p is at most 0.05."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


def unit_ranks(values: Array) -> Array:
    """Return ranks along the last axis, centred and of norm 1; nan where all values are tied.

    The dot product of two such rows is Spearman's rho.
    """
    from scipy.stats import rankdata  # takes a second to import

    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


@lru_cache(maxsize=16)
def orders(size: int, count: int, seed: int) -> NDArray[np.intp]:
    """Return permutations of `size` items as rows: all of them up to `EXACT`, else `count` random
    ones."""
    items = np.arange(size, dtype=np.intp)
    if math.factorial(size) <= EXACT:
        return np.array([*itertools.permutations(items)])
    return np.random.default_rng([seed, size]).permuted(np.tile(items, (count, 1)), axis=1)


def permutation_p(
    x: Array, y: Array, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[Array, bool]:
    """Return the two-sided p of Spearman's rho (nan without variation), and whether it is exact.

    p is the fraction of permutations whose |rho| is at least the observed one, among all
    permutations of up to 8 values, else among random ones plus the observed one. x has shape (n,),
    y (..., n); each row is tested separately.
    """
    exact = math.factorial(len(x)) <= EXACT
    a, b = unit_ranks(x), unit_ranks(y)
    observed = np.abs(b @ a)
    permuted = np.abs(a[orders(len(x), permutations, seed)] @ b.T)
    extreme = (permuted >= observed - ROUNDING).sum(0)
    p = extreme / len(permuted) if exact else (extreme + 1) / (len(permuted) + 1)
    return np.where(np.isnan(observed), np.nan, p), exact


def least_p(size: int, permutations: int = PERMUTATIONS) -> float:
    """Return the smallest two-sided p possible with `size` values without ties."""
    count = math.factorial(size)
    return 2 / count if count <= EXACT else 1 / (permutations + 1)


def bootstrap_intervals(x: Array, y: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Return the 95 % percentile interval of rho over resampled pairs, shape (..., 2).

    nan if x or y is constant in more than half of the resamples. x has shape (n,), y (..., n).
    """
    picks = np.random.default_rng([seed, len(x)]).integers(len(x), size=(resamples, len(x)))
    rho = (unit_ranks(x[picks]) * unit_ranks(y[..., picks])).sum(-1)
    few = 2 * (~np.isnan(rho)).sum(-1) < resamples
    ends = np.nanquantile(np.where(few[..., None], 0.0, rho), TAILS, axis=-1)
    return np.where(few[..., None], np.nan, np.clip(np.moveaxis(ends, 0, -1), -1.0, 1.0))


def distinct(cells: Cells, chosen: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Return the metrics that rank the chosen sets differently, each with its aliases.

    With a fixed token budget some metrics are functions of others and would repeat the same test.
    Constant metrics are left out. Perplexity comes first, so that it is never an alias.
    """
    values = cells.information.iloc[list(chosen)]
    values = values.loc[:, values.nunique() > 1]
    known, rho, aliases = values.notna(), values.corr("spearman"), dict[str, tuple[str, ...]]()
    for name in sorted(values, key=lambda name: name != METRIC):
        for other in aliases:
            if known[name].equals(known[other]) and abs(rho.loc[name, other]) >= 1 - ROUNDING:
                aliases[other] += (name if rho.loc[name, other] > 0 else f"-{name}",)
                break
        else:
            aliases[name] = ()
    return aliases


def correlate(conditions: Sequence[Cells], settings: Settings) -> list[Correlation]:
    """Correlate every metric with every quantity under each condition with at least four single
    sources."""
    rows = []
    for cells in conditions:
        chosen = cells.of("single")
        if len(chosen) < FEWEST_SETS:
            continue
        for metric, aliases in distinct(cells, chosen).items():
            x = cells.information[metric].to_numpy()
            known = [at for at in chosen if not np.isnan(x[at])]
            head = cells.condition.label, metric, aliases
            rows += _correlated(head, cells, x, range(len(cells.quantities)), known, settings)
    return rows


def agreements(cells: Cells, settings: Settings) -> list[Correlation]:
    """Correlate KL to the dense model with retention over all sets, in total and by dimension
    (ours). Quantities with fewer than four sets are left out."""
    rows = []
    for at, x in enumerate(cells.distance["kl"].T):
        known = np.flatnonzero(~np.isnan(x + cells.means[:, at])).tolist()
        if len(known) >= FEWEST_SETS:
            head = cells.condition.label, "kl", ()
            rows += _correlated(head, cells, x, [at], known, settings)
    return rows


def _correlated(
    head: tuple[str, str, tuple[str, ...]],
    cells: Cells,
    x: Array,
    quantities: Sequence[int],
    sets: Sequence[int],
    settings: Settings,
) -> list[Correlation]:
    """Correlate x with quantities over some sets, both by position. `rho` is None with fewer than
    four sets, or if x or the quantity is constant or unknown."""
    rows = np.full((len(quantities), 4), np.nan)
    exact, least = False, least_p(len(sets), settings.permutations)
    if len(sets) >= FEWEST_SETS:
        x, y = x[sets], cells.means[sets][:, quantities].T
        chance, exact = permutation_p(x, y, permutations=settings.permutations, seed=settings.seed)
        ends = bootstrap_intervals(x, y, resamples=settings.resamples, seed=settings.seed)
        rows = np.column_stack([unit_ranks(y) @ unit_ranks(x), ends, chance])
    correlations = []
    for at, row in zip(quantities, rows.tolist(), strict=True):
        rho, low, high, p = (None if math.isnan(value) else value for value in row)
        known = exact and rho is not None
        name = cells.quantities[at]
        correlations.append(Correlation(*head, name, len(sets), rho, low, high, p, known, least))
    return correlations
