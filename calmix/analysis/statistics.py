"""Rank correlation, permutations, bootstrap, false discovery: pure functions of arrays.

Spearman's rho, the permutation test and the correction are those of method section 5; which
sizes are exact, the resampling and the numbers of draws are ours.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Strata = tuple[tuple[int, ...], ...]  # positions of things that belong together

LEVEL, ALPHA = 0.95, 0.05
EXACT = 40_320  # orders of 8 values: no more than these are counted, more are sampled
LEAST = 4  # fewer sets than this cannot be correlated: even rho = 1 would have p >= 0.33
PERMUTATIONS = 19_999
RESAMPLES = 2_000
ROUNDING = 1e-12  # two rank correlations closer than this are one


def scipy_stats() -> Any:
    """Return `scipy.stats`, which takes a second to import."""
    return importlib.import_module("scipy.stats")


def unit_ranks(values: Array, strata: Strata | None = None) -> Array:
    """Return ranks along the last axis, centred and of length 1; nan where all values tie.

    The product of two such rows is Spearman's rho. Ties share their mean rank. With strata, ranks
    are within each, all scaled together: the product is rho within strata, pooled (ours).
    """
    ranks = np.empty(values.shape)
    for members in strata or one_stratum(values.shape[-1]):
        own = scipy_stats().rankdata(values[..., list(members)], axis=-1)
        ranks[..., list(members)] = own - own.mean(-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


def one_stratum(count: int) -> Strata:
    """Return the positions of so many things as one stratum."""
    return (tuple(range(count)),)


def spearman(x: Array, y: Array, strata: Strata | None = None) -> float:
    """Return Spearman's rho of two rows; nan where either does not vary."""
    return float(unit_ranks(x, strata) @ unit_ranks(y, strata))


def orders_count(strata: Strata) -> int:
    """Return how many orders there are within strata."""
    return math.prod(math.factorial(len(members)) for members in strata)


@lru_cache(maxsize=16)
def orders(strata: Strata, count: int, seed: int) -> NDArray[np.intp]:
    """Return orders of things within strata, one a row: all up to 8!, else seeded draws."""
    n = sum(map(len, strata))
    if orders_count(strata) <= EXACT:
        own = [list(itertools.permutations(members)) for members in strata]
        found = np.empty((orders_count(strata), n), dtype=np.intp)
        for row, parts in enumerate(itertools.product(*own)):
            for members, part in zip(strata, parts, strict=True):
                found[row, list(members)] = part
        return found
    rng = np.random.default_rng([seed, n])
    found = np.tile(np.arange(n, dtype=np.intp), (count, 1))
    for members in strata:
        found[:, list(members)] = rng.permuted(found[:, list(members)], axis=1)
    return found


def permutation_p(
    x: Array,
    y: Array,
    strata: Strata | None = None,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> tuple[Array, bool]:
    """Return the two-sided p of Spearman's rho, and whether it is exact.

    The share of pairings of x and y, within strata, whose |rho| is at least the observed one: of
    all pairings where they are no more than those of 8 values, of seeded draws (the observed one
    among them) beyond. nan without variation.

    Args:
        x: shape (n,).
        y: shape (..., n), each row tested by itself.
    """
    whole = strata or one_stratum(len(x))
    exact = orders_count(whole) <= EXACT
    a, b = unit_ranks(x, whole), unit_ranks(y, whole)
    observed = np.abs(b @ a)
    drawn = np.abs(a[orders(whole, permutations, seed)] @ b.T)
    extreme = (drawn >= observed - ROUNDING).sum(0)
    p = extreme / len(drawn) if exact else (extreme + 1) / (len(drawn) + 1)
    return np.where(np.isnan(observed), np.nan, p), exact


def least_p(strata: Strata, permutations: int = PERMUTATIONS) -> float:
    """Return the smallest two-sided p that values without ties can give within strata."""
    count = orders_count(strata)
    return 2 / count if count <= EXACT else 1 / (permutations + 1)


def bootstrap_intervals(
    x: Array,
    y: Array,
    strata: Strata | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Array:
    """Return the 95 % percentile interval of rho over resampled pairs, shape (..., 2).

    Pairs are drawn within strata. nan if fewer than half of the resamples vary in both.

    Args:
        x: shape (n,).
        y: shape (..., n), each row by itself.
    """
    rng = np.random.default_rng([seed, len(x)])
    drawn = np.empty((resamples, len(x)), dtype=np.intp)
    for members in strata or one_stratum(len(x)):
        own = rng.integers(len(members), size=(resamples, len(members)))
        drawn[:, list(members)] = np.asarray(members)[own]
    found = (unit_ranks(x[drawn], strata) * unit_ranks(y[..., drawn], strata)).sum(-1)
    few = 2 * (~np.isnan(found)).sum(-1) < resamples
    tail = (1 - LEVEL) / 2
    ends = np.nanquantile(np.where(few[..., None], 0.0, found), [tail, 1 - tail], axis=-1)
    return np.where(few[..., None], np.nan, np.clip(np.moveaxis(ends, 0, -1), -1.0, 1.0))


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for the false discovery rate over the family they make."""
    if not p:
        return []
    return [float(value) for value in scipy_stats().false_discovery_control(p, method="bh")]


def two_sided_p(value: float, error: float, freedom: float) -> float:
    """Return the two-sided p of 0 under Student's t; the normal's with infinite freedom."""
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * scipy_stats().t.sf(abs(value) / error, freedom))
