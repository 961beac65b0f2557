"""Planted correlations are recovered, noise stays noise; distances, the bare statistics.

`tests/test_properties.py` has what must hold for any input.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from calmix.analysis import Settings, analyse
from calmix.analysis.cells import tables
from calmix.analysis.correlations import (
    bootstrap_intervals,
    correlate,
    permutation_p,
    unit_ranks,
)
from tests.synthetic import SOURCES, Plan, full_plan, study

QUICK = Settings(permutations=1999, resamples=200)


def of(results):
    return analyse(results, QUICK).conditions[0]


def test_rho_uses_seed_means_of_single_sources():
    results = study(full_plan(conditions=[("wanda", "50%")]))
    cells = tables(results, "primary")[0]
    singles = cells.of("single")
    assert (len(singles), len(cells.sets)) == (16, 22)
    own = [[t for t in results.trials if t.calibration == cells.sets[at]] for at in singles]
    x = [np.mean([t.information["perplexity"] for t in each]) for each in own]
    y = [np.mean([t.dimensions["code"].value for t in each]) for each in own]
    settings = Settings(permutations=99, resamples=10, seed=3)
    (one,) = [
        c for c in correlate([cells], settings) if (c.metric, c.quantity) == ("perplexity", "code")
    ]
    assert (one.n, one.rho) == (16, pytest.approx(stats.spearmanr(x, y).statistic))
    x, y = np.array(x), np.array(y)
    p = permutation_p(x, y, permutations=99, seed=3)[0]
    assert (one.p, one.exact, one.least_p) == (pytest.approx(p), False, 0.01)
    ends = bootstrap_intervals(x, y, resamples=10, seed=3)
    assert (one.low, one.high) == pytest.approx(tuple(ends))


def test_correlation_needs_four_sources():
    for count, tested in ((3, False), (4, True)):
        results = study(full_plan(sources=SOURCES[:count], conditions=[("wanda", "50%")]))
        condition = analyse(results, QUICK).conditions[0]
        assert bool(condition.correlations) == tested
    one = condition.correlations[0]
    assert (one.n, one.exact, one.least_p) == (4, True, 2 / 24)


def test_rare_metric_has_no_rho():
    whole = study(full_plan(seeds=(0,), conditions=[("wanda", "50%")]))
    trials = [
        one.model_copy(update={"information": one.information | {"odd": float(at)}})
        if at in (1, 2, 4)
        else one
        for at, one in enumerate(whole.trials)
    ]
    actual = of(whole.model_copy(update={"trials": tuple(trials)})).correlations
    assert {(one.n, one.rho, one.p) for one in actual if one.metric == "odd"} == {(3, None, None)}


def test_exploratory_tests_are_corrected_together():
    results = study(full_plan(seeds=(0,)))
    whole = analyse(results, QUICK)
    every = [
        one
        for actual in whole.conditions
        for one in (*actual.correlations, *actual.differences, *actual.agreements)
    ] + [*whole.gains]
    expected = stats.false_discovery_control([one.p for one in every])
    assert [one.p_corrected for one in every] == pytest.approx(expected)
    assert whole.tests == len(every)
    assert analyse(results, QUICK, method="wanda").tests == (len(every) - len(whole.gains)) // 3


def test_equivalent_metrics_are_one_test():
    whole = study(Plan(seeds=(0,)))
    trials = []
    for one in whole.trials:
        perplexity = one.information["perplexity"]
        twins = {"bits_per_byte": math.log(perplexity), "volume": -perplexity}
        trials.append(one.model_copy(update={"information": twins | one.information}))
    before, after = (analyse(each, QUICK) for each in (whole, study(Plan(), trials=tuple(trials))))
    assert after.tests == before.tests
    aliases = {one.metric: one.aliases for one in after.conditions[0].correlations}
    assert aliases["perplexity"] == ("bits_per_byte", "-volume")


def test_kl_agreement_is_reported():
    results = study(Plan(seeds=(0, 1)))
    first = of(results)
    own = [
        one.distance
        for one in results.trials
        if one.distance and one.calibration == first.ranking[0].calibration
    ]
    divergence = first.ranking[0].distance
    assert divergence["kl"]["total"] == pytest.approx(
        np.mean([one["total"]["kl_mean"] for one in own])
    )
    assert divergence["flips"]["code"] == 1  # every made-up item differs from the dense one
    actual = {one.quantity: one for one in first.agreements}
    assert list(actual) == ["total", "general", "commonsense", "code", "math"]
    assert (actual["total"].n, actual["total"].rho) == (16, pytest.approx(-1))
    assert actual["total"].p <= 0.05


def test_missing_or_other_distances_are_skipped():
    results = study(Plan(seeds=(0,)))
    gone = results.trials[0].model_copy(update={"distance": None})
    part = of(results.model_copy(update={"trials": (gone, *results.trials[1:])}))
    lost = next(one for one in part.ranking if one.calibration == gone.calibration)
    assert lost.distance["kl"] == dict.fromkeys(lost.distance["kl"])
    assert lost.distance["flips"]["total"] is not None
    assert part.agreements[0].n == 15
    other = results.trials[3].model_copy(update={"distance": {"texts": "other"}})
    trials = (*results.trials[:3], other, *results.trials[4:])
    mixed = of(results.model_copy(update={"trials": trials}))
    assert not mixed.agreements
    assert all(one.distance["kl"]["total"] is None for one in mixed.ranking)


def test_bounds_of_constant_metrics():
    for sign, n in itertools.product((1, -1), range(4, 30, 5)):
        x = np.random.default_rng(n).standard_normal(n)
        assert np.max(sign * bootstrap_intervals(x, sign * x, resamples=40)) == 1.0
    same = np.ones(6)
    assert np.isnan(unit_ranks(same)).all()
    assert math.isnan(permutation_p(same, np.arange(6.0))[0])
    assert np.isnan(bootstrap_intervals(same, np.arange(6.0))).all()


def test_bootstrap_matches_a_plain_loop():
    """One resample at a time, some of them constant, up to half or more."""
    x, rows = np.array([1.0, 1, 1, 1, 5]), np.array([[3.0, 1, 4, 1.5, 9], [2, 9, 2, 2, 2], [2] * 5])
    counts = set()
    for seed in range(20):
        drawn = np.random.default_rng([seed, 5]).integers(5, size=(10, 5))
        ends = bootstrap_intervals(x, rows, resamples=10, seed=seed)
        for row, actual in zip(rows, ends, strict=True):
            known = [
                stats.spearmanr(x[order], row[order]).statistic
                for order in drawn
                if np.ptp(x[order]) and np.ptp(row[order])
            ]
            counts.add(len(known))
            expected = [math.nan] * 2 if len(known) < 5 else np.quantile(known, [0.025, 0.975])
            assert actual == pytest.approx(expected, nan_ok=True)
    assert {0, 4, 5} < counts
