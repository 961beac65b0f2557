"""Planted correlations are recovered; noise stays noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calmix.analysis import Settings, analyse
from calmix.analysis.cells import select, tables
from calmix.analysis.correlations import corrected, correlate, trade_offs
from calmix.analysis.statistics import benjamini_hochberg, permutation_p
from calmix.study.results import StudyResults
from tests.synthetic import DIMENSIONS, SLOPES, Plan, full_plan, study, trial

QUICK = Settings(permutations=1999, resamples=200)


def found_in(results: StudyResults, settings: Settings = QUICK) -> dict[tuple[str, str], object]:
    only = analyse(results, settings).conditions[0]
    return {(one.metric, one.quantity): one for one in only.correlations if one.among == "sources"}


def test_a_planted_trade_off_is_found_with_its_signs() -> None:
    found = analyse(study(Plan(slopes=SLOPES, noise=0.02)), QUICK).conditions[0]
    by_name = {
        (one.metric, one.quantity): one for one in found.correlations if one.among == "sources"
    }
    for dimension, sign in {"general": 1, "code": -1, "math": -1}.items():
        one = by_name["perplexity", dimension]
        assert one.rho is not None
        assert one.low is not None
        assert one.high is not None
        assert sign * one.rho > 0.8
        assert one.low <= one.rho <= one.high
        assert one.significant
    pairs = {(one.rises, one.falls) for one in found.trade_offs if one.metric == "perplexity"
             and one.among == "sources"}  # fmt: skip
    assert pairs == {("general", "code"), ("general", "math")}
    assert all(one.rho_rises > 0 > one.rho_falls for one in found.trade_offs)


def test_rho_is_that_of_the_seed_means_of_single_sources_alone() -> None:
    results = study(full_plan())
    cells = tables(results, select(results, method="wanda"), "primary")[0]
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
    rho = next(
        c.rho
        for c in whole
        if c.among == "sources" and (c.metric, c.quantity) == ("perplexity", "code")
    )
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    every = correlate(cells, "all", permutations=99, resamples=10, seed=0)
    assert {c.n for c in every if c.among == "sources"} == {22}


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
        cells = tables(results, results.trials, "primary")[0]
        found = corrected(correlate(cells, "single", permutations=999, resamples=10, seed=0))
        alarms += bool(trade_offs(found, DIMENSIONS))
    assert alarms <= 1


def test_each_family_is_the_whole_study() -> None:
    results = study(full_plan())
    whole = analyse(results, QUICK)
    every = [one for found in whole.conditions for one in found.correlations]
    assert set(whole.families) == {"sources", "kinds", "tasks of sources", "tasks of kinds"}
    assert sum(whole.families.values()) == len(every)
    for among in ("sources", "kinds"):
        for task in (False, True):
            own = [one for one in every if (one.among, one.task) == (among, task)]
            q = [one.p_corrected for one in own]
            assert q == pytest.approx(benjamini_hochberg([one.p for one in own]))
    part = analyse(results, QUICK, method="wanda")
    assert part.families == {name: count // 3 for name, count in whole.families.items()}


def test_what_only_tells_kinds_apart_is_no_correlation_within_them() -> None:
    """Code is of low perplexity and keeps code: over all sources, not within a kind."""
    whole = study(Plan(noise=0.03, draw=0.002))
    trials = []
    for one in whole.trials:
        lift = 0.3 if one.kind == "code" else 0.0
        kept = {name: (part.value or 0) + lift * (name == "code")
                for name, part in one.dimensions.items()}  # fmt: skip
        told = one.information | {"perplexity": one.information["perplexity"] - 90 * (lift > 0)}
        trials.append(
            trial(one.calibration, "single", one.method, one.pattern, one.seed, kept, told,
                  kind=one.kind)
        )  # fmt: skip
    found = analyse(study(Plan(), trials=tuple(trials)), QUICK).conditions[0].correlations
    told = {one.among: one for one in found
            if (one.metric, one.quantity) == ("perplexity", "code")}  # fmt: skip
    assert told["sources"].rho < -0.5
    assert told["sources"].p < 0.05
    assert abs(told["kinds"].rho) < 0.45
    assert told["kinds"].p > 0.05
    assert told["kinds"].n == 16


def test_metrics_that_order_the_sets_alike_are_one_test() -> None:
    whole = study(Plan(seeds=(0,)))
    trials = []
    for one in whole.trials:
        perplexity = one.information["perplexity"]
        twins = {"bits_per_byte": math.log(perplexity), "volume": -perplexity}
        trials.append(one.model_copy(update={"information": one.information | twins}))
    results = study(Plan(), trials=tuple(trials))
    before, after = (analyse(each, QUICK) for each in (whole, results))
    assert after.families == before.families
    [aliases] = {one.aliases for one in after.conditions[0].correlations
                 if one.metric == "perplexity"}  # fmt: skip
    assert aliases == ("bits_per_byte", "-volume")


def test_a_metric_is_correlated_with_single_tasks_too() -> None:
    found = found_in(study(Plan(slopes=SLOPES, noise=0.02)))
    for task in ("code_a", "code_b"):
        one = found["perplexity", task]
        assert one.task  # type: ignore[attr-defined]
        assert one.rho < -0.8  # type: ignore[attr-defined]
