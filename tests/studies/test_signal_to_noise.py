"""Planted noise is estimated, and detectable differences are detected in 80 % of studies."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import signal_to_noise
from scipy import stats
from signal_to_noise import detectable, needed, noise_of

from calmix.analysis.bootstrap import joint
from tests.analysis.test_coverage import Truth, made
from tests.synthetic import Plan, save, study

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


@pytest.mark.parametrize("difference", [0.01, 0.02, 0.03])
def test_needed_seeds_are_minimal(difference):
    draw, freedom, item = 0.015, 12, 0.003
    result = needed(difference, draw, freedom, item)
    assert result.draws_items >= result.draws > 1
    for draws, other in ((result.draws, 0.0), (result.draws_items, item)):
        assert detectable(draws, draw, freedom, other) <= difference
        assert detectable(draws - 1, draw, freedom, other) > difference


def test_power_by_hand():
    # (1.96 + 0.84)^2 x 2 x s^2 / d^2 = 7.849 x 2
    assert needed(0.01, 0.01, 1e7, 0.0).draws == 16
    assert detectable(16, 0.01, 1e7) == pytest.approx(2.8016 * 0.01 * math.sqrt(1 / 8), rel=1e-4)
    assert (needed(0.01, 0.0, 3, 0.001).draws_items, detectable(2, 0.0, 3)) == (1, 0)
    result = needed(0.01, 0.001, 12, 0.01)  # more seeds do not help
    assert (result.draws_items, result.items) == (None, pytest.approx(7.849, rel=1e-3))
    # With this many times the items, unlimited seeds just detect it.
    assert detectable(10**9, 0.001, 12, 0.01 / math.sqrt(result.items)) == pytest.approx(0.01)
    assert needed(0.01, 0.001, 12, 0.01 / math.sqrt(1.1 * result.items)).draws_items is not None


def test_script_prints_signal_and_seeds(tmp_path, monkeypatch, capsys):
    results = study(Plan(sources=("news", "books", "stories"), seeds=(0, 1)))
    store = save(results, tmp_path / "store")
    monkeypatch.setattr(sys, "argv", ["signal_to_noise.py", str(store)])
    signal_to_noise.main()
    lines = capsys.readouterr().out.splitlines()
    assert "SparseGPT 60%, by primary: 3 sets, points of retention" in lines
    row = next(line.split() for line in lines if line.startswith("total "))
    assert row[-1].count("/") == 1
