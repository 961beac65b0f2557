"""The statistics against scipy's own, against known truth, and in noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from calmix.analysis.statistics import (
    benjamini_hochberg,
    bootstrap_intervals,
    least_p,
    one_stratum,
    permutation_p,
    spearman,
    two_sided_p,
    unit_ranks,
)


def pair(n: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n))
    return (np.round(x), np.round(y)) if ties else (x, y)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [4, 9, 40])
def test_rho_is_scipys(n: int, ties: bool) -> None:
    x, y = pair(n, n, ties)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [4, 5, 6])
def test_the_exact_p_is_scipys(n: int, ties: bool) -> None:
    x, y = pair(n, 10 + n, ties)
    theirs = stats.permutation_test(
        (x,),
        lambda x: abs(stats.spearmanr(x, y).statistic),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=np.inf,
    )
    ours, exact = permutation_p(x, y)
    assert exact
    assert ours == pytest.approx(theirs.pvalue, abs=1e-12)


def test_the_sampled_p_nears_the_t_approximation_and_is_seeded() -> None:
    x, y = pair(30, 3)
    y = y + 0.5 * x
    ours, exact = permutation_p(x, y)
    assert not exact
    assert ours == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.003)
    assert permutation_p(x, y) == permutation_p(x, y, seed=0) == (ours, exact)
    assert permutation_p(x, y, seed=1)[0] != ours


def test_the_least_p_is_that_of_a_perfect_order() -> None:
    for n in (4, 6, 8):
        assert permutation_p(np.arange(n), -np.arange(n))[0] == pytest.approx(
            least_p(one_stratum(n))
        )
    assert permutation_p(np.arange(20), np.arange(20), permutations=999)[0] == 1 / 1000
    assert least_p(one_stratum(20), 999) == 1 / 1000
    assert least_p(((0, 1), (2, 3, 4))) == 2 / 12


def test_what_does_not_vary_has_no_correlation() -> None:
    x = np.ones(6)
    assert math.isnan(spearman(x, np.arange(6.0)))
    assert math.isnan(permutation_p(x, np.arange(6.0))[0])
    assert np.isnan(bootstrap_intervals(x, np.arange(6.0))).all()


def test_the_p_of_noise_is_uniform() -> None:
    found = [permutation_p(*pair(12, seed), permutations=499)[0] for seed in range(400)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.025)
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, covered, trials = 6 / math.pi * math.asin(0.6 / 2), 0, 200
    rng = np.random.default_rng(5)
    for seed in range(trials):
        x, e = rng.standard_normal((2, 30))
        low, high = bootstrap_intervals(x, 0.6 * x + 0.8 * e, resamples=400, seed=seed)
        covered += low <= truth <= high
    assert 0.88 <= covered / trials <= 0.99


@pytest.mark.parametrize("strata", [None, ((0, 2, 4), (1, 3))])
def test_the_bootstrap_is_a_plain_one(strata: tuple[tuple[int, ...], ...] | None) -> None:
    """One resample after the other, among them such as have ties only, half of them or more."""
    whole = strata or (tuple(range(5)),)

    def ranks(values: np.ndarray) -> np.ndarray:
        own = np.empty(5)
        for members in whole:
            part = stats.rankdata(values[list(members)])
            own[list(members)] = part - part.mean()
        return own

    x, rows = np.array([1.0, 1, 1, 1, 5]), np.array([[3.0, 1, 4, 1.5, 9], [2, 9, 2, 2, 2], [2] * 5])
    counts = set()
    for seed in range(20):
        rng = np.random.default_rng([seed, 5])
        drawn = np.empty((10, 5), dtype=int)
        for members in whole:
            at = rng.integers(len(members), size=(10, len(members)))
            drawn[:, list(members)] = np.array(members)[at]
        ends = bootstrap_intervals(x, rows, strata, resamples=10, seed=seed)
        assert ends.dtype == float
        for row, told in zip(rows, ends, strict=True):
            pairs = [(ranks(x[order]), ranks(row[order])) for order in drawn]
            known = [
                (a @ b) / math.sqrt((a @ a) * (b @ b)) for a, b in pairs if a.any() and b.any()
            ]
            counts.add(len(known))
            few = len(known) < 5
            expected = [math.nan] * 2 if few else np.quantile(known, [0.025, 0.975])
            assert told == pytest.approx(expected, nan_ok=True)
    assert {0, 4, 5} < counts
    plain = bootstrap_intervals(x, rows, strata, resamples=10)
    again = bootstrap_intervals(x, rows, strata, resamples=10, seed=0)
    assert np.array_equal(plain, again, equal_nan=True)


def test_no_end_is_beyond_one() -> None:
    ends = [bootstrap_intervals(*pair(n, n)[:1] * 2, resamples=40) for n in range(4, 30)]
    assert np.max(ends) == 1.0
    ends = [bootstrap_intervals(x, -x, resamples=40) for x, _ in (pair(n, n) for n in range(4, 30))]
    assert np.min(ends) == -1.0


def test_correction_is_scipys_and_knows_an_empty_family() -> None:
    p = [0.001, 0.02, 0.03, 0.5]
    assert benjamini_hochberg(p) == pytest.approx([0.004, 0.04, 0.04, 0.5])
    assert benjamini_hochberg([]) == []


def test_within_strata_a_difference_between_them_counts_for_nothing() -> None:
    """Two clouds far apart: rho is high over all, nothing within."""
    rng = np.random.default_rng(6)
    strata = (tuple(range(5)), tuple(range(5, 12)))
    x, y = rng.standard_normal((2, 12))
    apart = np.repeat([0.0, 9.0], [5, 7])
    assert spearman(x + apart, y + apart) > 0.6
    assert spearman(x + apart, y + apart, strata) == pytest.approx(spearman(x, y, strata))
    ranks = [stats.rankdata(part) - (len(part) + 1) / 2 for part in (x[:5], x[5:])]
    assert unit_ranks(x, strata) == pytest.approx(
        np.concatenate(ranks) / np.linalg.norm(np.concatenate(ranks))
    )


def test_the_p_of_noise_within_strata_is_uniform_and_exact_where_few() -> None:
    rng = np.random.default_rng(7)
    strata = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10, 11))
    apart = np.repeat([0.0, 9.0], [5, 7])
    found = [
        permutation_p(x + apart, y + apart, strata, permutations=499)[0]
        for x, y in rng.standard_normal((400, 2, 12))
    ]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.025)
    few = ((0, 1, 2), (3, 4, 5))
    x = np.array([1.0, 2, 3, 11, 12, 13])
    assert permutation_p(x, x, few) == (pytest.approx(2 / 36), True)


def test_the_exact_p_within_strata_is_counted_out() -> None:
    """Values of the strata lie between one another: ranks over all would give another p."""
    strata = ((0, 1, 2), (3, 4, 5, 6))
    x, *rows = np.random.default_rng(9).standard_normal((5, 7))
    found, exact = permutation_p(x, np.stack(rows), strata)
    assert exact
    ways = itertools.product(*(itertools.permutations(members) for members in strata))
    drawn = [x[list(itertools.chain(*way))] for way in ways]
    for row, p in zip(rows, found, strict=True):
        reached = abs(spearman(x, row, strata)) - 1e-9
        assert p == pytest.approx(
            np.mean([abs(spearman(d, row, strata)) >= reached for d in drawn])
        )


def test_many_rows_are_tested_as_each_alone() -> None:
    x, *y = np.random.default_rng(8).standard_normal((4, 9))
    together = permutation_p(x, np.stack(y), permutations=99)[0]
    assert together == pytest.approx(
        [float(permutation_p(x, row, permutations=99)[0]) for row in y]
    )
    ends = bootstrap_intervals(x, np.stack(y), resamples=50)
    assert ends[1] == pytest.approx(bootstrap_intervals(x, y[1], resamples=50))


def test_a_pivots_p_is_students_and_knows_no_doubt_at_all() -> None:
    assert two_sided_p(-0.2, 0.1, 4) == pytest.approx(2 * stats.t.sf(2, 4))
    assert two_sided_p(0.196, 0.1, np.inf) == pytest.approx(0.05, abs=1e-4)
    assert (two_sided_p(0.0, 0.0, 3), two_sided_p(0.1, 0.0, 3)) == (1.0, 0.0)
