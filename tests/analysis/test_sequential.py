"""Looks at growing draws: how often a pair is called what it is not, over the whole procedure."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from calmix.analysis.sequential import Look, look, unsettled
from calmix.analysis.statistics import Array

STUDIES, FIRST, MOST = 4_000, 2, 8
LOOKS = MOST - FIRST + 1
NO_MIX = np.zeros(6, dtype=bool)


def procedure(truth: Array, within: float, *, looks: int = LOOKS) -> tuple[Array, Array, Array]:
    """Run many studies of standard normal draws to their end.

    Return whether each pair was ever called apart, and ever equal, shape (studies, sets, sets),
    and the draws that were made, shape (studies, sets).
    """
    sets = len(truth)
    drawn = truth[:, None] + np.random.default_rng(1).normal(size=(STUDIES, sets, MOST))
    counts = np.full((STUDIES, sets), FIRST)
    apart = equal = np.zeros((STUDIES, sets, sets), dtype=bool)
    for _ in range(LOOKS):
        values = np.where(np.arange(MOST) < counts[..., None], drawn, np.nan)
        seen = look(values, NO_MIX[:sets], within=within, looks=looks)
        apart, equal = apart | seen.apart, equal | seen.equal
        counts = counts + unsettled(seen, counts < MOST)
    return apart, equal, counts


@pytest.mark.parametrize("sets", [2, 6])
def test_a_pair_without_a_difference_is_called_apart_in_at_most_5_percent(sets: int) -> None:
    apart, _, _ = procedure(np.zeros(sets), 1.0)
    share = apart.mean(0)[~np.eye(sets, dtype=bool)]
    assert share.max() <= 0.05
    # Without the correction it would be more: the test can tell.
    careless, _, _ = procedure(np.zeros(sets), 1.0, looks=1)
    if sets == 2:
        assert careless.mean(0)[0, 1] > 0.08
    assert careless.mean() > 2 * apart.mean()


def test_a_pair_as_far_apart_as_counts_is_called_equal_in_at_most_5_percent() -> None:
    _, equal, _ = procedure(np.array([0.0, 2.5]), 2.5)
    assert equal[:, 0, 1].mean() <= 0.05


def test_what_is_far_apart_is_found_with_fewer_draws_than_what_is_near() -> None:
    found, _, few = procedure(np.array([0.0, 8.0]), 1.0)
    assert found[:, 0, 1].mean() > 0.98
    _, _, many = procedure(np.array([0.0, 1.0]), 1.0)
    assert few.mean() < 0.7 * many.mean()
    _, same, wide = procedure(np.array([0.0, 0.0]), 6.0)
    assert same[:, 0, 1].mean() > 0.9
    assert wide.mean() < many.mean()


def seen_of(values: list[list[float]], mixed: list[bool], **options: float) -> Look:
    return look(np.array(values), np.array(mixed), **{"within": 1.0, "looks": 1, **options})  # type: ignore[arg-type]


def test_the_interval_is_students_by_the_pooled_spread() -> None:
    seen = seen_of([[1, 3, np.nan], [4, 5, 6]], [False, False], looks=5)
    spread = np.sqrt((2 + 2) / 3)
    half = stats.t.ppf(1 - 0.05 / 10, 3) * spread * np.sqrt(1 / 2 + 1 / 3)
    assert seen.half[0, 1] == pytest.approx(half)
    assert seen.gap[1, 0] == 3
    assert not seen.apart.any()


def test_single_sources_are_compared_with_the_best_alone_and_mixes_among_themselves() -> None:
    draws = [[5.0, 5.2], [1, 1.2], [1, 1.2], [0, 0.2], [0, 0.2]]
    seen = seen_of(draws, [False, False, False, True, True])
    pairs = {(int(a), int(b)) for a, b in np.argwhere(seen.compared) if a < b}
    assert pairs == {(0, 1), (0, 2), (0, 3), (0, 4), (3, 4)}
    assert {(int(a), int(b)) for a, b in np.argwhere(seen.equal) if a < b} == {(3, 4)}


def test_one_draw_a_set_tells_nothing_and_needs_more() -> None:
    seen = seen_of([[1.0], [9], [2]], [False] * 3)
    assert np.isinf(seen.half).all()
    assert unsettled(seen, np.ones(3, dtype=bool)).all()


def test_a_pair_is_settled_when_either_side_can_have_no_more() -> None:
    seen = seen_of([[1.0, 1.9], [1.1, 2.1], [1.3, 0.9]], [False] * 3)
    assert seen.open[1].sum() == 2
    assert unsettled(seen, np.array([True, True, False])).tolist() == [True, True, False]
    assert not unsettled(seen, np.array([True, False, True])).any()
