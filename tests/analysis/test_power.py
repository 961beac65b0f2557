"""Power: a detectable difference is detected in 80 % of simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from calmix.analysis.power import detectable, needed


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
def test_what_is_detectable_is_detected_in_80_percent(draws, freedom, item):
    found = detectable(draws, 0.012, freedom, item)
    assert found >= detectable(draws, 0.012, freedom)
    assert detected(found, draws, 0.012, freedom, item) == pytest.approx(
        0.80, abs=0.015 if item else 0.005
    )


@pytest.mark.parametrize("difference", [0.01, 0.02, 0.03])
def test_the_least_draws_are_enough_and_one_less_is_not(difference):
    draw, freedom, item = 0.015, 12, 0.003
    found = needed(difference, draw, freedom, item)
    assert found.draws_items >= found.draws > 1
    for draws, other in ((found.draws, 0.0), (found.draws_items, item)):
        assert detectable(draws, draw, freedom, other) <= difference
        assert detectable(draws - 1, draw, freedom, other) > difference


def test_by_hand_with_much_freedom_and_where_items_are_the_limit():
    # (1.96 + 0.84)^2 x 2 x s^2 / d^2 = 7.849 x 2
    assert needed(0.01, 0.01, 1e7, 0.0).draws == 16
    assert detectable(16, 0.01, 1e7) == pytest.approx(2.8016 * 0.01 * math.sqrt(1 / 8), rel=1e-4)
    assert (needed(0.01, 0.0, 3, 0.001).draws_items, detectable(2, 0.0, 3)) == (1, 0)
    found = needed(0.01, 0.001, 12, 0.01)  # more seeds do not help
    assert (found.draws_items, found.items) == (None, pytest.approx(7.849, rel=1e-3))
    # With this many times the items, unlimited seeds just detect it.
    assert detectable(10**9, 0.001, 12, 0.01 / math.sqrt(found.items)) == pytest.approx(0.01)
    assert needed(0.01, 0.001, 12, 0.01 / math.sqrt(1.1 * found.items)).draws_items is not None
