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

from calmix.errors import MissingExtraError

Array = NDArray[np.float64]

LEVEL = 0.95
Z = 1.959963984540054  # normal quantile of a two-sided 95 % interval
EXACT = 8  # all 40,320 orders of 8 values are counted; those of more are sampled
EXACT_FLIPS = 12
LEAST = 4  # fewer sets than this cannot be correlated: even rho = 1 would have p >= 0.33
PERMUTATIONS = 19_999
RESAMPLES = 2_000
ROUNDING = 1e-12  # two rank correlations closer than this are one


def scipy_stats() -> Any:
    """Return `scipy.stats`.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        return importlib.import_module("scipy.stats")
    except ImportError:
        raise MissingExtraError("the analysis of a study", "report") from None


def unit_ranks(values: Array) -> Array:
    """Return ranks along the last axis, centred and of length 1; nan where all values tie.

    The product of two such rows is Spearman's rho. Ties share their mean rank.
    """
    ranks = scipy_stats().rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


def spearman(x: Array, y: Array) -> float:
    """Return Spearman's rho of two rows; nan where either does not vary."""
    return float(unit_ranks(x) @ unit_ranks(y))


@lru_cache(maxsize=16)
def orders(n: int, count: int, seed: int) -> NDArray[np.intp]:
    """Return orders of n things, one a row: all of them up to 8, else `count` seeded draws."""
    if n <= EXACT:
        return np.array(list(itertools.permutations(range(n))), dtype=np.intp)
    rng = np.random.default_rng([seed, n])
    return rng.permuted(np.tile(np.arange(n, dtype=np.intp), (count, 1)), axis=1)


def permutation_p(
    x: Array, y: Array, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, bool]:
    """Return the two-sided p of Spearman's rho, and whether it is exact.

    The share of pairings of x and y whose |rho| is at least the observed one: of all pairings
    up to 8 values, of seeded draws (the observed one among them) beyond. nan without variation.
    """
    a, b = unit_ranks(x), unit_ranks(y)
    observed = abs(float(a @ b))
    if math.isnan(observed):
        return math.nan, len(x) <= EXACT
    drawn = orders(len(x), permutations, seed)
    extreme = int((np.abs(a[drawn] @ b) >= observed - ROUNDING).sum())
    if len(x) <= EXACT:
        return extreme / len(drawn), True
    return (extreme + 1) / (len(drawn) + 1), False


def least_p(n: int, permutations: int = PERMUTATIONS) -> float:
    """Return the smallest two-sided p that n values without ties can give."""
    return 2 / math.factorial(n) if n <= EXACT else 1 / (permutations + 1)


def bootstrap_interval(
    x: Array, y: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of rho over resampled pairs.

    None if fewer than half of the resamples vary in both x and y.
    """
    drawn = np.random.default_rng([seed, len(x)]).integers(len(x), size=(resamples, len(x)))
    found = (unit_ranks(x[drawn]) * unit_ranks(y[drawn])).sum(-1)
    found = found[~np.isnan(found)]
    if 2 * len(found) < resamples:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return max(-1.0, float(low)), min(1.0, float(high))


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for the false discovery rate over the family they make."""
    if not p:
        return []
    return [float(value) for value in scipy_stats().false_discovery_control(p, method="bh")]


def sign_flip_p(
    differences: Array, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, bool]:
    """Return the two-sided p of a mean of 0 under flipped signs, and whether it is exact.

    Exact (all flips counted) up to 12 differences, else over seeded draws.
    """
    count = len(differences)
    exact = count <= EXACT_FLIPS
    if exact:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        rng = np.random.default_rng([seed, count])
        signs = rng.choice((1.0, -1.0), size=(permutations, count))
    observed = abs(differences.sum())
    scale = ROUNDING * max(1.0, float(np.abs(differences).sum()))
    extreme = int((np.abs(signs @ differences) >= observed - scale).sum())
    return (extreme / len(signs), True) if exact else ((extreme + 1) / (len(signs) + 1), False)


def t_quantile(freedom: float) -> float:
    """Return the two-sided 95 % quantile of Student's t."""
    return float(scipy_stats().t.ppf((1 + LEVEL) / 2, freedom))


def t_below(value: float, freedom: float) -> float:
    """Return the probability of Student's t below a value."""
    return float(scipy_stats().t.cdf(value, freedom))


def f_above(value: float, freedom: float, within: float) -> float:
    """Return the probability of Fisher's F above a value."""
    return float(scipy_stats().f.sf(value, freedom, within))
