"""Planted noise is estimated, and detectable differences are detected in 80 % of studies."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from signal_to_noise import detectable, noise_of

from calmix.study.bootstrap import joint
from tests.analysis.test_coverage import Truth, made

pytestmark = pytest.mark.long


def test_noise_estimate_matches_planted_noise():
    rng = np.random.default_rng(5)
    results = []
    for _ in range(60):
        level = 0.5 + 0.05 * rng.standard_normal((8, 1))
        cells, _ = made(replace(Truth(), kept=level), rng)
        results.append({one.quantity: one for one in noise_of(joint(cells, resamples=9, seed=0))})
    total, task = [one["total"] for one in results], [one["a1"] for one in results]
    assert {(one.freedom, one.items, one.sets, one.kind) for one in total} == {(8, 240, 8, "total")}
    # Weights of items w have a mean of 1, and mean squares of 13/12.
    chance = 13 / 12 * 0.15**2 / 60
    for results, planted in (
        ([one.draw**2 for one in task], 0.02**2 * 1.25 + chance),
        ([one.draw**2 for one in total], 0.02**2 * (0.5 + 0.25) + chance / 4),
        ([one.item**2 for one in total], 2 * chance / 4),
        ([one.signal**2 for one in total], 0.05**2),
    ):
        assert np.mean(results) == pytest.approx(planted, rel=0.2)
    one = total[0]
    assert one.ratio == pytest.approx(one.signal / math.hypot(one.draw, one.item / math.sqrt(2)))


def detected(difference, draws, draw, freedom, item):
    """The fraction of simulated studies whose 95 % interval excludes 0."""
    rng = np.random.default_rng([draws, freedom])
    count = 200_000
    gap = rng.normal(difference, math.sqrt(2 * draw**2 / draws + item**2), count)
    drawn = 2 * draw**2 * rng.chisquare(freedom, count) / freedom / draws
    error = drawn + item**2
    critical = stats.t.ppf(0.975, freedom * (error / drawn) ** 2)
    return float((np.abs(gap) > critical * np.sqrt(error)).mean())


@pytest.mark.parametrize(
    ("draws", "freedom", "item"),
    [(2, 2, 0.0), (9, 6, 0.0), (2, 40, 0.0), (3, 6, 0.004), (3, 6, 0.02), (3, 40, 0.01)],
)
def test_detectable_difference_has_80_percent_power(draws, freedom, item):
    result = detectable(draws, 0.012, freedom, item)
    assert result >= detectable(draws, 0.012, freedom)
    assert detected(result, draws, 0.012, freedom, item) == pytest.approx(
        0.80, abs=0.015 if item else 0.005
    )
