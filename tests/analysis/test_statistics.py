"""The statistics against scipy's own, against known truth, and in noise.

`tests/test_properties.py` has what must hold for any input.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from calmix.analysis.correlations import (
    bootstrap_intervals,
    least_p,
    permutation_p,
    unit_ranks,
)


def test_perfect_orders_and_what_does_not_vary():
    for n in (4, 8):
        assert permutation_p(np.arange(n), -np.arange(n))[0] == pytest.approx(least_p(n))
    for sign, n in itertools.product((1, -1), range(4, 30, 5)):  # no bound is beyond 1
        x = np.random.default_rng(n).standard_normal(n)
        assert np.max(sign * bootstrap_intervals(x, sign * x, resamples=40)) == 1.0
    same = np.ones(6)
    assert np.isnan(unit_ranks(same)).all()
    assert math.isnan(permutation_p(same, np.arange(6.0))[0])
    assert np.isnan(bootstrap_intervals(same, np.arange(6.0))).all()


def test_the_bootstrap_is_a_plain_one():
    """One resample at a time, some of them constant, up to half or more."""

    x, rows = np.array([1.0, 1, 1, 1, 5]), np.array([[3.0, 1, 4, 1.5, 9], [2, 9, 2, 2, 2], [2] * 5])
    counts = set()
    for seed in range(20):
        drawn = np.random.default_rng([seed, 5]).integers(5, size=(10, 5))
        ends = bootstrap_intervals(x, rows, resamples=10, seed=seed)
        for row, found in zip(rows, ends, strict=True):
            known = [stats.spearmanr(x[order], row[order]).statistic for order in drawn
                     if np.ptp(x[order]) and np.ptp(row[order])]  # fmt: skip
            counts.add(len(known))
            expected = [math.nan] * 2 if len(known) < 5 else np.quantile(known, [0.025, 0.975])
            assert found == pytest.approx(expected, nan_ok=True)
    assert {0, 4, 5} < counts
