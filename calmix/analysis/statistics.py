"""Rank correlation, permutations, bootstrap, false discovery: pure functions of arrays.

Spearman's rho, the permutation test and the correction are those of method section 5; which
sizes are exact, the resampling and the numbers of draws are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = TypeVar("Row", bound=Any)

LEVEL, ALPHA = 0.95, 0.05
EXACT = 40_320  # orders of 8 values: no more than these are counted, more are sampled
LEAST = 4  # fewer sets than this cannot be correlated: even rho = 1 would have p >= 0.33
PERMUTATIONS = 19_999
RESAMPLES = 2_000
ROUNDING = 1e-12  # two rank correlations closer than this are one


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


def corrected(rows: Iterable[Row], **columns: Callable[[Row], float | None]) -> list[Row]:
    """Return dataclass rows with p-values corrected for the false discovery rate (Benjamini and
    Hochberg), one for each column; None stays and counts for nothing."""
    from scipy.stats import false_discovery_control

    made = list(rows)
    for name, p in columns.items():
        known = [at for at, one in enumerate(made) if p(one) is not None]
        adjusted = false_discovery_control([p(made[at]) for at in known]).tolist() if known else []
        for at, value in zip(known, adjusted, strict=True):
            made[at] = replace(made[at], **{name: value})
    return made


def two_sided_p(value: float, error: float, freedom: float) -> float:
    """Return the two-sided p of 0 under Student's t; the normal's with infinite freedom."""
    from scipy.stats import t

    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * t.sf(abs(value) / error, freedom))
