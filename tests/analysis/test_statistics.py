"""The statistics against scipy's own, against known truth, and in noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from calmix.analysis.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    least_p,
    permutation_p,
    sign_flip_p,
    spearman,
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
@pytest.mark.parametrize("n", [4, 5, 6, 7])
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
    assert permutation_p(x, y) == (ours, exact)
    assert permutation_p(x, y, seed=1)[0] != ours


def test_the_least_p_is_that_of_a_perfect_order() -> None:
    for n in (4, 6, 8):
        assert permutation_p(np.arange(n), -np.arange(n))[0] == pytest.approx(least_p(n))
    assert permutation_p(np.arange(20), np.arange(20), permutations=999)[0] == 1 / 1000
    assert least_p(20, 999) == 1 / 1000


def test_what_does_not_vary_has_no_correlation() -> None:
    x = np.ones(6)
    assert math.isnan(spearman(x, np.arange(6.0)))
    assert math.isnan(permutation_p(x, np.arange(6.0))[0])
    assert bootstrap_interval(x, np.arange(6.0)) is None


def test_the_p_of_noise_is_uniform() -> None:
    found = [permutation_p(*pair(12, seed), permutations=499)[0] for seed in range(400)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.025)
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, covered, trials = 6 / math.pi * math.asin(0.6 / 2), 0, 200
    rng = np.random.default_rng(5)
    for seed in range(trials):
        x, e = rng.standard_normal((2, 30))
        low, high = bootstrap_interval(x, 0.6 * x + 0.8 * e, resamples=400, seed=seed) or (1, 1)
        covered += low <= truth <= high
    assert 0.88 <= covered / trials <= 0.99


def test_correction_is_scipys_and_knows_an_empty_family() -> None:
    p = [0.001, 0.02, 0.03, 0.5]
    assert benjamini_hochberg(p) == pytest.approx([0.004, 0.04, 0.04, 0.5])
    assert benjamini_hochberg([]) == []


def test_sign_flips_are_scipys_and_bounded_by_the_number_of_seeds() -> None:
    gaps = np.array([0.3, 0.1, 0.4, -0.05, 0.2])
    theirs = stats.permutation_test(
        (gaps,), lambda x: abs(x.mean()), permutation_type="samples", alternative="greater"
    )
    assert sign_flip_p(gaps) == (pytest.approx(theirs.pvalue), True)
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == (0.25, True)
    p, exact = sign_flip_p(np.full(14, 1.0), permutations=999)
    assert not exact
    assert p <= 0.01
