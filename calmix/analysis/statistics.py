"""Rank correlation, permutations, bootstrap, false discovery: pure functions of arrays.

Spearman's rho, the permutation test and the correction are those of method section 5; which
sizes are exact, the resampling and the numbers of draws are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Strata = Sequence[int]  # how many neighbours each belong together, e.g. (5, 3) of eight values
Row = TypeVar("Row", bound=Any)

LEVEL, ALPHA = 0.95, 0.05
EXACT = 40_320  # orders of 8 values: no more than these are counted, more are sampled
LEAST = 4  # fewer sets than this cannot be correlated: even rho = 1 would have p >= 0.33
PERMUTATIONS = 19_999
RESAMPLES = 2_000
ROUNDING = 1e-12  # two rank correlations closer than this are one


def unit_ranks(values: Array, strata: Strata | None = None) -> Array:
    """Return ranks along the last axis, centred and of length 1; nan where all values tie.

    The product of two such rows is Spearman's rho; with strata, rho within them, pooled (ours).
    """
    from scipy.stats import rankdata  # takes a second to import

    ranks = np.empty(values.shape)
    for run in _runs(strata or values.shape[-1:]):
        own = rankdata(values[..., run], axis=-1)
        ranks[..., run] = own - own.mean(-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


def _runs(strata: Strata) -> list[slice]:
    ends = itertools.accumulate(strata, initial=0)
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def spearman(x: Array, y: Array, strata: Strata | None = None) -> float:
    """Return Spearman's rho of two rows; nan where either does not vary."""
    return float(unit_ranks(x, strata) @ unit_ranks(y, strata))


def _count(strata: Strata) -> int:
    return math.prod(map(math.factorial, strata))


@lru_cache(maxsize=16)
def orders(strata: tuple[int, ...], count: int, seed: int) -> NDArray[np.intp]:
    """Return orders of things within strata, one a row: all up to 8!, else seeded draws."""
    things = np.arange(sum(strata), dtype=np.intp)
    if _count(strata) <= EXACT:
        own = (itertools.permutations(things[run].tolist()) for run in _runs(strata))
        return np.array([[*itertools.chain(*parts)] for parts in itertools.product(*own)])
    rng = np.random.default_rng([seed, len(things)])
    found = np.tile(things, (count, 1))
    for run in _runs(strata):
        found[:, run] = rng.permuted(found[:, run], axis=1)
    return found


def permutation_p(
    x: Array,
    y: Array,
    strata: Strata | None = None,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> tuple[Array, bool]:
    """Return the two-sided p of Spearman's rho, nan without variation, and whether it is exact.

    The share of pairings within strata whose |rho| is at least the observed one: of all pairings
    up to those of 8 values, beyond that of seeded draws, the observed one among them. x has shape
    (n,), y (..., n); each row is tested by itself.
    """
    whole = tuple(strata or x.shape)
    exact = _count(whole) <= EXACT
    a, b = unit_ranks(x, whole), unit_ranks(y, whole)
    observed = np.abs(b @ a)
    drawn = np.abs(a[orders(whole, permutations, seed)] @ b.T)
    extreme = (drawn >= observed - ROUNDING).sum(0)
    p = extreme / len(drawn) if exact else (extreme + 1) / (len(drawn) + 1)
    return np.where(np.isnan(observed), np.nan, p), exact


def least_p(strata: Strata, permutations: int = PERMUTATIONS) -> float:
    """Return the smallest two-sided p that values without ties can give within strata."""
    return 2 / _count(strata) if _count(strata) <= EXACT else 1 / (permutations + 1)


def bootstrap_intervals(
    x: Array, y: Array, strata: Strata | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Array:
    """Return the 95 % percentile interval of rho over resampled pairs, shape (..., 2).

    Pairs are drawn within strata; nan if fewer than half of the resamples vary in both. x has
    shape (n,), y (..., n).
    """
    rng = np.random.default_rng([seed, len(x)])
    drawn = np.concatenate([
        run.start + rng.integers(run.stop - run.start, size=(resamples, run.stop - run.start))
        for run in _runs(strata or x.shape)
    ], 1)  # fmt: skip
    found = (unit_ranks(x[drawn], strata) * unit_ranks(y[..., drawn], strata)).sum(-1)
    few = 2 * (~np.isnan(found)).sum(-1) < resamples
    tail = (1 - LEVEL) / 2
    ends = np.nanquantile(np.where(few[..., None], 0.0, found), [tail, 1 - tail], axis=-1)
    return np.where(few[..., None], np.nan, np.clip(np.moveaxis(ends, 0, -1), -1.0, 1.0))


def benjamini_hochberg(p: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for the false discovery rate; None stays and counts for nothing."""
    from scipy.stats import false_discovery_control

    known = [value for value in p if value is not None]
    adjusted = iter(false_discovery_control(known, method="bh").tolist() if known else [])
    return [None if value is None else next(adjusted) for value in p]


def corrected(
    rows: Sequence[Row], family: Callable[[Row], Hashable], **columns: Callable[[Row], float | None]
) -> list[Row]:
    """Return dataclass rows with p-values corrected family by family, one for each column."""
    made = list(rows)
    for own in dict.fromkeys(map(family, rows)):
        at = [number for number, one in enumerate(rows) if family(one) == own]
        for name, p in columns.items():
            adjusted = benjamini_hochberg([p(rows[number]) for number in at])
            for number, value in zip(at, adjusted, strict=True):
                made[number] = replace(made[number], **{name: value})
    return made


def two_sided_p(value: float, error: float, freedom: float) -> float:
    """Return the two-sided p of 0 under Student's t; the normal's with infinite freedom."""
    from scipy.stats import t

    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * t.sf(abs(value) / error, freedom))
