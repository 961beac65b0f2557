"""What a quantity known beforehand tells: against refits without each set, and degenerate input."""

import numpy as np
import pytest

from calmix.analysis.validation import Predicted, leave_one_out, predicted


def test_each_set_is_predicted_by_the_line_through_the_others() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9)
    brute = []
    for at in range(9):
        keep = np.arange(9) != at
        slope, offset = np.polyfit(x[keep], y[keep], 1)
        brute.append(offset + slope * x[at])
    assert leave_one_out(x, y) == pytest.approx(brute)
    found = predicted(x, y)
    assert found.error == pytest.approx(np.sqrt(np.mean((brute - y) ** 2)))
    means = [y[np.arange(9) != at].mean() for at in range(9)]
    assert found.spread == pytest.approx(np.sqrt(np.mean((means - y) ** 2)))
    assert found.error > found.spread


def test_a_line_is_found_and_a_curve_keeps_its_order() -> None:
    x = np.linspace(1, 2, 8)
    line, curve = predicted(x, 3 - 2 * x), predicted(x, np.exp(5 * x))
    assert line.rho == pytest.approx(-1)
    assert line.rho_left_out == pytest.approx(1)
    assert line.error == pytest.approx(0, abs=1e-12)
    assert curve.rho == pytest.approx(1)
    assert curve.error > 0.1


def test_sets_without_a_value_do_not_count_and_too_few_tell_nothing() -> None:
    x, y = np.array([1.0, 2, 3, 4, np.nan, 6]), np.array([1.0, 2, 4, 3, 9, np.nan])
    assert predicted(x, y).n == 4
    assert predicted(x, y).rho == pytest.approx(0.8)
    assert predicted(x[:4], y[:4]) == predicted(x, y)
    assert predicted(x[:3], y[:3]) == Predicted(3)
    assert predicted(np.ones(5), np.arange(5.0)) == Predicted(5)


def test_one_set_that_alone_differs_cannot_be_predicted() -> None:
    x, y = np.array([0.0, 0, 0, 0, 1]), np.arange(5.0)
    assert np.isnan(leave_one_out(x, y)).tolist() == [False] * 4 + [True]
    found = predicted(x, y)
    assert found.rho is not None
    assert (found.rho_left_out, found.error) == (None, None)


def test_rank_correlation_may_be_within_kinds() -> None:
    x, y = np.array([1.0, 2, 3, 11, 12, 13]), np.array([3.0, 2, 1, 13, 12, 11])
    assert predicted(x, y).rho > 0
    assert predicted(x, y, ((0, 1, 2), (3, 4, 5))).rho == pytest.approx(-1)
