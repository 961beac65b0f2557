"""Differences over seeds, margins against sparsity, spreads, ranking."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from calmix.analysis import Settings, analyse
from calmix.analysis.cells import tables
from calmix.analysis.differences import SINGLES, over_seeds, paired, pooled
from calmix.analysis.spread import cancellation, spreads
from tests.synthetic import CONDITIONS, Plan, full_plan, study, trial

QUICK = Settings(permutations=199, resamples=50)


def test_a_paired_difference_is_scipys_t_test() -> None:
    a, b = np.array([0.50, 0.55, 0.53, 0.60]), np.array([0.45, 0.47, 0.52, 0.50])
    found = paired(a - b)
    theirs = stats.ttest_rel(a, b)
    ends = theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.p_flip == pytest.approx(2 / 16)
    assert found.p_flip_least == 2 / 16


def test_one_seed_has_no_interval_and_equal_differences_no_p() -> None:
    one = paired(np.array([0.1]))
    assert (one.low, one.high, one.p, one.p_flip) == (None, None, None, 1.0)
    assert paired(np.array([0.1, 0.1])).p is None


def test_missing_cells_leave_balanced_means() -> None:
    values = np.array([[1.0, 1.0, math.nan], [2.0, 2.0, 2.0], [9.0, math.nan, math.nan]])
    found = over_seeds(values, [0, 1, 2])
    assert found[:2] == pytest.approx([1.5, 1.5])
    assert math.isnan(found[2])


def test_mixes_are_compared_with_the_best_and_the_mean_source_by_seed() -> None:
    results = study(full_plan(conditions=[("sparsegpt", "60%")]))
    found = analyse(results, QUICK).conditions[0]
    one = next(
        d for d in found.differences
        if (d.left, d.right, d.quantity) == ("mix-8", SINGLES, "code")
    )  # fmt: skip

    def kept(seed: int, strategy: str, name: str = "") -> float:
        return float(np.mean([
            t.dimensions["code"].value for t in results.trials
            if t.seed == seed and t.strategy == strategy and name in t.calibration
        ]))  # fmt: skip

    gaps = [kept(s, "mix", "mix-8") - kept(s, "single") for s in range(3)]
    assert one.seeds == 3
    assert (one.value, one.paired) == pytest.approx((np.mean(gaps), np.mean(gaps)))
    ends = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (one.paired_low, one.paired_high) == pytest.approx((ends.low, ends.high))
    assert one.p_flip_least == 0.25
    # By the spread of all sets over their seeds: one mean of 3 draws less 16 such means.
    kept_by = found.cells.values[:, :, found.cells.quantities.index("code")]
    error = math.sqrt(kept_by.var(1, ddof=1).mean() * (1 / 3 + 1 / 48))
    half = stats.t.ppf(0.975, 22 * 2) * error
    assert (one.low, one.high) == pytest.approx((one.value - half, one.value + half))
    assert one.p == pytest.approx(2 * stats.t.sf(abs(one.value) / error, 44))
    singles = {d.left for d in found.differences} | {d.right for d in found.differences}
    assert len(singles & set(found.cells.sets)) == 7


def test_sets_of_unequal_seeds_are_compared_by_the_pooled_spread() -> None:
    """As in a study that spends its seeds where they matter: sources once, mixes three times."""
    whole = study(full_plan(conditions=[("sparsegpt", "60%")]))
    kept = tuple(one for one in whole.trials if one.seed == 0 or one.strategy != "single")
    found = analyse(whole.model_copy(update={"trials": kept}), QUICK).conditions[0]
    one = next(d for d in found.differences if (d.left, d.right) == ("mix-8", SINGLES))
    assert one.seeds == 1
    assert one.paired_low is None
    assert one.p_paired is None
    assert one.low is not None
    assert one.value != one.paired
    assert one.p_corrected is not None
    assert len(found.missing) == 32


def test_the_pooled_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    truth = np.array([0.5, 0.4, 0.4, 0.7])
    inside = 0
    for _ in range(400):
        values = truth[:, None] + 0.03 * rng.standard_normal((4, 3))
        values[1:3, 1:] = np.nan
        gap = pooled(values, [0], [1, 2])
        assert gap is not None
        assert gap.low is not None
        assert gap.high is not None
        inside += gap.low <= 0.1 <= gap.high
    assert 0.925 <= inside / 400 <= 0.975
    once = pooled(np.array([[0.5], [0.3]]), [0], [1])
    assert once is not None
    assert once.value == pytest.approx(0.2)
    assert once.p is None
    assert pooled(np.array([[0.5], [np.nan]]), [0], [1]) is None


def test_the_margin_grows_with_sparsity_as_planted() -> None:
    pairs = [("sparsegpt", f"{share}%") for share in (30, 40, 50, 60)]
    found = analyse(study(full_plan(conditions=pairs, draw=0.003, noise=0.005)), QUICK)
    of_mix = [m for m in found.margins if (m.calibration, m.quantity) == ("mix-8", "total")]
    assert [m.sparsity for m in of_mix] == [0.3, 0.4, 0.5, 0.6]
    for margin in of_mix:
        assert margin.value == pytest.approx(0.08 * (margin.sparsity / 0.6) ** 3, abs=0.012)
    growth = next(g for g in found.growths if (g.calibration, g.quantity) == ("mix-8", "total"))
    assert growth.low is not None
    assert growth.low > 0
    named = analyse(
        study(full_plan(conditions=pairs)), Settings(default="news", permutations=9, resamples=9)
    )
    assert {m.default for m in named.margins} == {"news"}


def test_patterns_of_n_in_m_are_no_point_on_the_sparsity_axis() -> None:
    pairs = [("sparsegpt", "2:4"), ("sparsegpt", "50%"), ("sparsegpt", "60%")]
    found = analyse(study(full_plan(conditions=pairs)), QUICK)
    assert len(found.conditions) == 3
    assert {margin.condition for margin in found.margins} == {"SparseGPT 50%", "SparseGPT 60%"}


def test_ranking_by_total_and_by_worst_dimension() -> None:
    trials = (
        trial("even", "mix", "sparsegpt", "60%", 0, {"general": 0.5, "code": 0.5}),
        trial("lopsided", "single", "sparsegpt", "60%", 0, {"general": 0.9, "code": 0.3}),
        trial("bad", "single", "sparsegpt", "60%", 0, {"general": 0.4, "code": 0.2}),
    )
    results = study(Plan(), trials=trials)
    ranking = analyse(results, QUICK).conditions[0].ranking
    assert [one.calibration for one in ranking] == ["lopsided", "even", "bad"]
    assert [one.rank_worst for one in ranking] == [2, 1, 3]
    assert ranking[0].worst == "code"
    assert ranking[0].lowest.value == pytest.approx(0.3)
    assert ranking[0].behind is None
    assert ranking[1].behind is not None
    assert ranking[1].behind.value == pytest.approx(0.1)


def test_the_averaging_artefact_is_planted_and_found() -> None:
    opposite = {"general": 0.1, "commonsense": 0.0, "code": -0.1, "math": 0.0}
    found = analyse(study(Plan(slopes=opposite, noise=0.005)), QUICK).conditions[0]
    spread = {one.quantity: one for one in found.spreads if one.over == "single"}
    assert spread["code"].range > 0.25
    assert spread["total"].range < 0.05
    total = spread["total"]
    assert total.if_independent is not None
    assert total.deviation < 0.5 * total.if_independent
    assert total.beyond_draws is not None
    assert total.beyond_draws <= total.deviation


def test_raw_retention_is_the_mean_of_the_raw_tasks() -> None:
    results = study(Plan(seeds=(0,), sources=("a", "b")))
    cells = tables(results, results.trials, "raw")[0]
    first = results.trials[0]
    kept = first.dimensions["code"].value
    assert kept is not None
    assert cells.values[0, 0, 3] == pytest.approx(0.4 + 0.6 * kept)
    assert cells.values[0, 0, 0] == pytest.approx(np.mean(cells.values[0, 0, 1:]))
    assert cells.below[0, 0, 3] == pytest.approx(0.04 / math.sqrt(2))
    assert cells.below[0, 0, 0] == pytest.approx(0.04 / math.sqrt(8))


def test_conditions_are_named_by_what_differs() -> None:
    labels = [c.condition.label for c in analyse(study(full_plan()), QUICK).conditions]
    assert labels == ["SparseGPT 50%", "SparseGPT 60%", "Wanda 50%"]
    assert len(CONDITIONS) == 3
    kept = {"general": 0.5, "code": 0.5}
    trials = (
        trial("a", "single", "sparsegpt", "60%", 0, kept),
        trial("a", "single", "sparsegpt", "60%", 0, kept, rows=128),
        trial("a", "single", "sparsegpt", "60%", 0, kept, propagation="block"),
        trial("none", "none", "magnitude", "60%", 0, kept, propagation=None, rows=0, length=0),
    )
    found = analyse(study(Plan(), trials=trials), QUICK)
    assert [c.condition.label for c in found.conditions] == [
        "SparseGPT 60%, block propagation, 64 x 512",
        "SparseGPT 60%, layer propagation, 64 x 512",
        "SparseGPT 60%, layer propagation, 128 x 512",
        "Magnitude 60%",
    ]


def test_sets_that_differ_by_their_draws_alone_are_known() -> None:
    """The F test of one-way analysis of variance, as scipy has it; uniform where all are alike."""
    p = []
    for seed in range(40):
        results = study(Plan(noise=0.0, draw=0.02, seed=seed, sources=tuple("abcdef")))
        cells = tables(results, results.trials, "corrected")[0]
        one = spreads(cells, "single", permutations=9, seed=0)[0]
        theirs = stats.f_oneway(*cells.values[:, :, 0]).pvalue
        assert one.p_alike == pytest.approx(theirs)
        p.append(theirs)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    apart = analyse(study(Plan(slopes={"code": 0.3}, noise=0.0)), QUICK).conditions[0].spreads
    assert {one.quantity for one in apart if one.p_alike is not None and one.p_alike < 0.001} == {
        "total", "code",
    }  # fmt: skip


def test_cancelling_is_seen_where_it_is_and_not_where_it_is_not() -> None:
    rng = np.random.default_rng(4)
    gain = rng.standard_normal(16)
    quiet = 0.1 * rng.standard_normal((16, 4))
    opposed = np.column_stack([gain, -gain, gain, -gain]) + quiet
    assert cancellation(opposed, permutations=999, seed=0)[1] == 0.001
    found = [
        cancellation(rng.standard_normal((16, 4)), permutations=199, seed=0)[1] for _ in range(200)
    ]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.03)
