"""Planted correlations are recovered; noise stays noise."""

from __future__ import annotations

import numpy as np
import pytest

from calmix.analysis import Settings, analyse
from calmix.analysis.cells import select, tables
from calmix.analysis.correlations import corrected, correlate, trade_offs
from calmix.analysis.statistics import benjamini_hochberg, permutation_p
from calmix.study.results import StudyResults
from tests.synthetic import DIMENSIONS, SLOPES, Plan, full_plan, study

QUICK = Settings(permutations=1999, resamples=200)


def found_in(results: StudyResults, settings: Settings = QUICK) -> dict[tuple[str, str], object]:
    only = analyse(results, settings).conditions[0]
    return {(one.metric, one.dimension): one for one in only.correlations}


def test_a_planted_trade_off_is_found_with_its_signs() -> None:
    found = analyse(study(Plan(slopes=SLOPES, noise=0.02)), QUICK).conditions[0]
    by_name = {(one.metric, one.dimension): one for one in found.correlations}
    for dimension, sign in {"general": 1, "code": -1, "math": -1}.items():
        one = by_name["perplexity", dimension]
        assert one.rho is not None
        assert one.low is not None
        assert one.high is not None
        assert sign * one.rho > 0.8
        assert one.low <= one.rho <= one.high
        assert one.significant
    pairs = {(one.rises, one.falls) for one in found.trade_offs if one.metric == "perplexity"}
    assert pairs == {("general", "code"), ("general", "math")}
    assert all(one.rho_rises > 0 > one.rho_falls for one in found.trade_offs)


def test_rho_is_that_of_the_seed_means_of_single_sources_alone() -> None:
    results = study(full_plan())
    cells = tables(results, select(results, method="wanda"), "corrected")[0]
    singles = cells.of("single")
    assert len(singles) == 16
    assert len(cells.sets) == 22
    x = [np.mean([t.information["perplexity"] for t in results.trials
                  if t.method == "wanda" and t.calibration == cells.sets[at]])
         for at in singles]  # fmt: skip
    y = [np.mean([t.dimensions["code"].value for t in results.trials
                  if t.method == "wanda" and t.calibration == cells.sets[at]])
         for at in singles]  # fmt: skip
    from scipy import stats

    one = found_in(study(full_plan(conditions=[("wanda", "50%")])))["perplexity", "code"]
    assert one.n == 16  # type: ignore[attr-defined]
    whole = correlate(cells, "single", permutations=99, resamples=10, seed=0)
    rho = next(c.rho for c in whole if (c.metric, c.dimension) == ("perplexity", "code"))
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    every = correlate(cells, "all", permutations=99, resamples=10, seed=0)
    assert {c.n for c in every} == {22}


def test_a_metric_that_is_the_same_for_all_sets_is_left_out() -> None:
    assert not any(metric == "tokens" for metric, _ in found_in(study(Plan())))


def test_noise_yields_false_discoveries_no_more_often_than_nominal() -> None:
    """All hypotheses false: a study with any discovery is a false one; 5 % may have some."""
    rng = np.random.default_rng(11)
    studies, alarms = 300, 0
    for _ in range(studies):
        metrics, kept = rng.standard_normal((8, 15)), rng.standard_normal((5, 15))
        p = [permutation_p(x, y, permutations=1999)[0] for x in metrics for y in kept]
        alarms += min(benjamini_hochberg(p)) <= 0.05
    # Two standard errors of a share of 0.05 in 300 studies are 0.025.
    assert alarms / studies <= 0.05 + 0.025


def test_among_planted_effects_false_discoveries_stay_below_nominal() -> None:
    rng = np.random.default_rng(12)
    shares, power = [], []
    for _ in range(100):
        x, kept = rng.standard_normal((8, 15)), rng.standard_normal((5, 15))
        kept[0] += 3 * x[0]
        kept[1] -= 3 * x[1]
        pairs = [(i, j) for i in range(8) for j in range(5)]
        p = [permutation_p(x[i], kept[j], permutations=1999)[0] for i, j in pairs]
        hits = {at for at, q in zip(pairs, benjamini_hochberg(p), strict=True) if q <= 0.05}
        true = {(0, 0), (1, 1)}
        shares.append(len(hits - true) / max(1, len(hits)))
        power.append(len(hits & true) / 2)
    # Two standard errors of the mean share in 100 studies.
    assert np.mean(shares) <= 0.05 + 2 * np.std(shares) / 10
    assert np.mean(power) > 0.9


def test_whole_studies_of_noise_have_no_trade_off() -> None:
    alarms = 0
    for seed in range(20):
        results = study(Plan(seed=seed, seeds=(0,), noise=0.1))
        cells = tables(results, results.trials, "corrected")[0]
        found = corrected(correlate(cells, "single", permutations=999, resamples=10, seed=0))
        alarms += bool(trade_offs(found, DIMENSIONS))
    assert alarms <= 1


def test_the_family_is_the_whole_study() -> None:
    results = study(full_plan())
    whole = analyse(results, QUICK)
    assert whole.family == sum(len(found.correlations) for found in whole.conditions)
    p = [one.p for found in whole.conditions for one in found.correlations]
    q = [one.p_corrected for found in whole.conditions for one in found.correlations]
    assert q == pytest.approx(benjamini_hochberg([value for value in p if value is not None]))
    part = analyse(results, QUICK, method="wanda")
    assert part.family == whole.family // 3
