"""Intervals: what is about items, what about draws, and that both together cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from calmix.analysis.estimates import Z, estimate


def test_items_alone_from_one_seed() -> None:
    found = estimate(np.array([[0.5], [0.4]]), np.full((2, 1), 0.03), np.full((2, 1), 0.05))
    assert found.deviation is None
    one = found.sets[0]
    assert (one.value, one.low, one.high) == pytest.approx((0.5, 0.47, 0.55))
    assert (one.item_low, one.item_high) == pytest.approx((0.47, 0.55))
    assert one.draw_low is None
    assert one.deviation is None
    lead = found.lead(0, 1)
    assert lead is not None
    assert lead.value == pytest.approx(0.1)
    assert lead.sure is None


def test_draws_are_pooled_over_the_sets_and_shrink_with_seeds_while_items_do_not() -> None:
    values = np.array([[0.4, 0.5, 0.6], [0.2, 0.3, math.nan]])
    half = np.full((2, 3), 0.04)
    found = estimate(values, half, half)
    assert found.freedom == 3
    assert found.deviation == pytest.approx(math.sqrt((0.02 + 0.005) / 3))
    first, second = found.sets
    t = stats.t.ppf(0.975, 3)
    assert first.draw_high - first.value == pytest.approx(t * found.deviation / math.sqrt(3))
    assert second.draw_high - second.value == pytest.approx(t * found.deviation / math.sqrt(2))
    for one in (first, second):
        assert one.item_high - one.item_low == pytest.approx(0.08)
        assert one.low < min(one.item_low, one.draw_low)
    assert first.deviation == pytest.approx(0.1)


def test_without_spread_over_seeds_only_the_items_remain() -> None:
    found = estimate(np.full((2, 3), 0.5), np.full((2, 3), 0.03), np.full((2, 3), 0.03))
    one = found.sets[0]
    assert (one.low, one.high) == pytest.approx((0.47, 0.53))


def test_a_set_without_trials_has_no_value() -> None:
    gone = np.array([[math.nan, math.nan], [0.5, 0.6]])
    found = estimate(gone, gone * 0, gone * 0)
    assert found.sets[0].value is None
    assert found.lead(0, 1) is None


def test_intervals_and_leads_cover_the_truth_as_often_as_they_say() -> None:
    """Items shift all seeds of a set alike; draws shift each seed."""
    rng = np.random.default_rng(0)
    item, draw, times = 0.02, 0.03, 400
    inside = leads = 0
    truth = np.array([0.5, 0.4, 0.45, 0.6])
    for _ in range(times):
        values = (
            truth[:, None] + item * rng.standard_normal((4, 1)) + draw * rng.standard_normal((4, 3))
        )
        half = np.full((4, 3), Z * item)
        found = estimate(values, half, half)
        one, lead = found.sets[0], found.lead(3, 0)
        assert lead is not None
        inside += one.low <= 0.5 <= one.high
        leads += lead.low <= 0.1 <= lead.high
    assert 0.93 <= inside / times <= 0.975
    assert 0.93 <= leads / times <= 0.975
