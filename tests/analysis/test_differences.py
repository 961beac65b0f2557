"""Differences, margins against sparsity, spreads, ranking."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from calmix.analysis import Settings, analyse
from calmix.analysis.bootstrap import Estimate, Joint
from calmix.analysis.cells import APART, WORST, method_name
from calmix.analysis.differences import BEST, SINGLES, Difference, corrected_differences
from calmix.analysis.ranking import Shrunken
from calmix.analysis.spread import cancellation
from calmix.analysis.statistics import Array
from calmix.evaluation.retention import retention
from tests.synthetic import CONDITIONS, Plan, full_plan, interval, study, trial

QUICK = Settings(permutations=199, resamples=50)
EXACT = Settings(permutations=199, resamples=2000)


def test_a_difference_of_draws_is_students_t_of_the_pooled_spread() -> None:
    """One mean of 3 draws less 16 such means, by the spread of all sets over their draws."""
    found = analyse(study(full_plan(conditions=[("sparsegpt", "60%")])), EXACT).conditions[0]
    one = next(
        d for d in found.differences
        if (d.left, d.right, d.quantity) == ("mix-8", SINGLES, "code")
    ).gap  # fmt: skip
    kept = found.cells.values[:, :, found.cells.quantities.index("code")]
    singles = found.cells.of("single")
    mix = found.cells.sets.index("mix-8")
    assert one.value == pytest.approx(kept[mix].mean() - kept[singles].mean())
    error = math.sqrt(kept.var(1, ddof=1).mean() * (1 / 3 + 1 / 48))
    half = stats.t.ppf(0.975, 22 * 2) * error
    assert one.draw_p == pytest.approx(2 * stats.t.sf(abs(one.value) / error, 44))
    assert one.draw_high - one.draw_low == pytest.approx(2 * half, rel=0.1)
    assert one.low < one.item_low < one.value < one.item_high < one.high
    assert one.high - one.low < 0.9 * ((one.item_high - one.item_low) + 2 * half)
    sides = {d.left for d in found.differences} | {d.right for d in found.differences}
    assert len(sides & set(found.cells.sets)) == 6
    assert sum(side.startswith(BEST) for side in sides) == 1


def test_sets_of_unequal_draws_are_compared_by_the_pooled_spread() -> None:
    """As in a study that spends its seeds where they matter: sources once, mixes three times."""
    whole = study(full_plan(conditions=[("sparsegpt", "60%")]))
    kept = tuple(one for one in whole.trials if one.seed == 0 or one.strategy != "single")
    found = analyse(whole.model_copy(update={"trials": kept}), QUICK).conditions[0]
    one = next(d for d in found.differences if (d.left, d.right) == ("mix-8", SINGLES))
    assert found.joint.freedom == 12
    assert one.gap.draw_low is not None
    assert one.p_corrected is not None
    assert len(found.missing) == 32


def test_from_single_draws_a_difference_is_about_items_alone() -> None:
    found = analyse(study(full_plan(seeds=(0,), conditions=[("wanda", "50%")])), QUICK)
    one = next(d for d in found.conditions[0].differences if d.right == SINGLES)
    assert (one.gap.low, one.gap.high) == (one.gap.item_low, one.gap.item_high)
    assert (one.gap.draw_low, one.gap.draw_p, one.draw_p_corrected) == (None, None, None)
    assert one.p_corrected is not None


def test_worst_is_each_sides_own_lowest_mean() -> None:
    """Of draws that each have another lowest dimension, the means decide."""
    kept = [{"general": 0.3, "code": 0.5}, {"general": 0.6, "code": 0.5}]
    trials = tuple(
        trial(name, made, "sparsegpt", "60%", seed, {key: value + lift
                                                      for key, value in each.items()})
        for name, made, lift in (("a", "mix", 0.1), ("b", "sgs", 0.0))
        for seed, each in enumerate(kept)
    )  # fmt: skip
    found = analyse(study(Plan(), trials=trials), QUICK).conditions[0]
    first = found.ranking[0]
    assert first.worst == "general"
    assert first.lowest == first.dimensions["general"]
    assert first.lowest.value == pytest.approx(0.55, abs=1e-3)
    one = next(d for d in found.differences if d.quantity == "worst")
    assert one.gap.value == pytest.approx(0.1, abs=1e-3)


def test_the_worst_dimension_of_the_picked_source_is_by_its_own_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shrunken, its other dimension would be the worst; the gap is still in the first."""
    own = {"a": {"general": 0.5, "code": 0.6}, "b": {"general": 0.3, "code": 0.3},
           "m": {"general": 0.7, "code": 0.7}}  # fmt: skip
    trials = tuple(
        trial(name, "mix" if name == "m" else "single", "wanda", "50%", seed, kept)
        for name, kept in own.items() for seed in (0, 1)
    )  # fmt: skip

    def pulled(found: Joint, groups: object, weight: Array) -> Shrunken:
        value = float({0: 0.55, 1: 0.56, 2: 0.52}[int(np.flatnonzero(weight)[0])])
        return Shrunken(np.full(len(found.values), value), np.eye(len(found.values)))

    monkeypatch.setattr("calmix.analysis.differences.shrink", pulled)
    found = analyse(study(Plan(), trials=trials), QUICK).conditions[0]
    assert found.cells.dimensions == ("general", "code")
    (gap,) = [one.gap for one in found.differences
              if one.right == f"{BEST}a" and one.quantity == WORST]  # fmt: skip
    assert gap.value == pytest.approx(0.7 - 0.56, abs=1e-3)


def test_the_margin_grows_with_sparsity_as_planted() -> None:
    pairs = [("sparsegpt", f"{share}%") for share in (30, 40, 50, 60)]
    found = analyse(study(full_plan(conditions=pairs, draw=0.003, noise=0.005)), QUICK)
    of_mix = [m for m in found.margins if (m.calibration, m.quantity) == ("mix-8", "total")]
    assert [m.sparsity for m in of_mix] == [0.3, 0.4, 0.5, 0.6]
    for margin in of_mix:
        assert margin.gap.value == pytest.approx(0.08 * (margin.sparsity / 0.6) ** 3, abs=0.012)
    growth = next(g for g in found.growths if (g.calibration, g.quantity) == ("mix-8", "total"))
    assert growth.gap.low > 0
    assert growth.gap.value == pytest.approx(of_mix[-1].gap.value - of_mix[0].gap.value)
    named = analyse(
        study(full_plan(conditions=pairs)), Settings(default="news", permutations=9, resamples=9)
    )
    assert {m.default for m in named.margins} == {"news"}


def test_margins_are_over_the_sources_of_every_sparsity() -> None:
    """A lead does not grow because other sources were run."""
    whole = study(full_plan(conditions=[("sparsegpt", "50%"), ("sparsegpt", "60%")]))
    gone = {"news", "books"} & {one.calibration for one in whole.trials}
    assert gone

    def without(patterns: set[str]) -> list[float | None]:
        left = [t for t in whole.trials if t.calibration not in gone or t.pattern not in patterns]
        found = analyse(whole.model_copy(update={"trials": tuple(left)}), QUICK)
        assert len(found.growths) > 0
        return [one.gap.value for one in (*found.margins, *found.growths)]

    assert without({"50%"}) == pytest.approx(without({"50%", "60%"}))
    assert without({"50%"}) != pytest.approx(without(set()))


def test_patterns_of_n_in_m_have_margins_and_are_no_point_on_the_sparsity_axis() -> None:
    pairs = [("sparsegpt", "2:4"), ("sparsegpt", "50%"), ("sparsegpt", "60%")]
    found = analyse(study(full_plan(conditions=pairs)), QUICK)
    assert len(found.conditions) == 3
    named = [f"SparseGPT {pattern}" for _, pattern in pairs]
    assert {margin.condition for margin in found.margins} == set(named)
    assert {one.sparsities for one in found.growths} == {(0.5, 0.6)}
    for each in found.conditions:  # over the single sources of that pattern alone
        own = next(m for m in found.margins if (m.condition, m.calibration, m.quantity)
                   == (each.condition.label, "mix-8", "total"))  # fmt: skip
        gap = next(one for one in each.differences if (one.left, one.right, one.quantity)
                   == ("mix-8", "mean of the single sources", "total"))  # fmt: skip
        assert own.gap.value == pytest.approx(gap.gap.value)


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
    assert ranking[0].lowest.value == pytest.approx(0.3, abs=1e-3)
    assert ranking[0].behind is None
    raw = ranking[0].total.value - ranking[1].total.value
    assert 0 < ranking[1].behind.value < raw
    assert sum(one.best for one in ranking) == pytest.approx(1)


def test_accuracy_is_read_beside_the_primary_scores() -> None:
    """The made-up tasks keep 0.9 of that in accuracy; texts have none: dense bits over pruned."""
    results = study(Plan(seeds=(0,), sources=("a", "b")))
    found, by_accuracy = (
        analyse(results, replace(QUICK, measure=measure)).conditions[0]
        for measure in ("primary", "accuracy")
    )
    for one, other in zip(found.ranking, sorted(
        by_accuracy.ranking, key=lambda row: [r.calibration for r in found.ranking].index(
            row.calibration)), strict=True):  # fmt: skip
        for name in found.cells.dimensions:
            assert one.accuracy[name] == pytest.approx(other.dimensions[name].value)
        kept = one.tasks["code_a"].value
        assert other.tasks["code_a"].value == pytest.approx(0.9 * kept, abs=0.01)
        assert one.accuracy["code"] == pytest.approx(
            (other.tasks["code_a"].value + other.tasks["code_b"].value) / 2
        )


def test_a_sets_own_benchmark_is_marked_and_left_out_beside() -> None:
    kept = {"general": 0.5, "code": 0.6}
    trials = [trial(name, "single", "wanda", "50%", seed, kept) for name in "ab" for seed in (0, 1)]
    parts = {"code_a": 0.9, "code_b": 0.3}
    for at, one in enumerate(trials):
        tasks = tuple(
            task.model_copy(update={"retention": interval(parts.get(task.task, 0.5))})
            for task in one.tasks
        )
        halves = ("code_a",) if one.calibration == "a" else ()
        trials[at] = one.model_copy(update={"tasks": tasks, "halves": halves})
    found = analyse(study(Plan(), trials=tuple(trials)), QUICK)
    rows = {one.calibration: one for one in found.conditions[0].ranking}
    assert rows["a"].halves == ("code_a",)
    assert rows["a"].dimensions["code"].value == pytest.approx(0.6, abs=1e-3)
    assert rows["a"].without_own["code"].value == pytest.approx(0.3, abs=1e-3)
    assert rows["a"].without_own["total"].value == pytest.approx(0.4, abs=1e-3)
    assert rows["b"].without_own == {}
    marked = [line for line in found.tables()["tasks.csv"].splitlines() if ",true,true," in line]
    assert len(marked) == 1
    assert marked[0].startswith("Wanda 50%,a,code_a,")


def test_sets_are_also_compared_on_the_benchmarks_that_neither_holds_a_half_of() -> None:
    """The mix leads by the task whose other half it read; without it the written text does."""
    kept = {"general": 0.5, "code": 0.6}
    ways = {"m": ("mix", {"code_a": 0.9, "code_b": 0.2}), "w": ("igsp", {"code_b": 0.5}),
            "s": ("single", {}), "t": ("single", {"code_a": 0.4})}  # fmt: skip
    trials = []
    for name, (strategy, parts) in ways.items():
        for seed in (0, 1):
            one = trial(name, strategy, "wanda", "50%", seed, kept)
            tasks = tuple(
                task.model_copy(update={"retention": interval(parts.get(task.task, 0.5))})
                for task in one.tasks
            )
            halves = ("code_a",) if name == "m" else ()
            trials.append(one.model_copy(update={"tasks": tasks, "halves": halves}))
    found = analyse(study(Plan(), trials=tuple(trials)), QUICK).conditions[0]
    gaps = {(one.left, one.right, one.quantity): one for one in found.differences}
    assert gaps["m", "w", APART].gap.value == pytest.approx((0.2 - 0.5) / 2, abs=1e-3)
    assert gaps["m", SINGLES, APART].gap.value == pytest.approx((0.2 - 0.5) / 2, abs=1e-3)
    assert gaps["m", "w", APART].p_corrected is not None
    assert ("w", SINGLES, APART) not in gaps  # neither holds a half of any
    alone = analyse(study(Plan(), trials=tuple(one for one in trials if one.calibration != "m")),
                    QUICK).conditions[0].differences  # fmt: skip
    assert APART not in {one.quantity for one in alone}


def test_corrections_of_the_total_do_not_depend_on_what_is_told_apart() -> None:
    one = Difference("c", "a", "b", "total", Estimate(0.1, p=0.03, draw_p=0.2))
    other = replace(one, quantity=APART, gap=Estimate(0.1, p=0.001, draw_p=0.3))
    told = corrected_differences([one, other, replace(one, gap=Estimate(0.1))])
    assert [each.p_corrected for each in told] == [0.03, 0.001, None]
    assert [each.draw_p_corrected for each in told] == [0.2, 0.3, None]


def test_bits_per_byte_resample_as_the_ratio_they_are() -> None:
    """The paper's ratio of bits has the trial's own bits below: its interval is the ratio's."""
    results = study(Plan(seeds=(0,), sources=("a",)))
    found = analyse(results, replace(EXACT, measure="ratio")).conditions[0].ranking[0]
    only = results.trials[0]
    theirs = next(
        task.kept
        for task in retention(results.dense[only.model], results.scores[only.id], measure="ratio",
                              resamples=2000).tasks
        if task.name == "code_b"
    )  # fmt: skip
    ours = found.tasks["code_b"]
    assert ours.value == pytest.approx(theirs.value)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours.high - ours.low > 0.01


def test_the_averaging_artefact_is_planted_and_found() -> None:
    opposite = {"general": 0.1, "commonsense": 0.0, "code": -0.1, "math": 0.0}
    found = analyse(study(Plan(slopes=opposite, noise=0.005)), QUICK).conditions[0]
    spread = {one.quantity: one for one in found.spreads if one.over == "single"}
    assert spread["code"].range > 0.25
    assert spread["total"].range < 0.05
    total = spread["total"]
    assert total.if_independent is not None
    assert total.deviation < 0.5 * total.if_independent


def test_a_method_is_named_as_its_paper_does_whatever_follows():
    names = ["admm", "admm,refit=5 + distill", "ours + distill"]
    assert [method_name(name) for name in names] == [
        "ADMM", "ADMM,refit=5 + distill", "ours + distill",
    ]  # fmt: skip


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


def test_what_a_source_contributes_is_marked() -> None:
    """A mix against the same without some of its sources, the others in one proportion."""
    mixes = {
        "uniform": {"a": 0.25, "b": 0.25, "c": 0.5},
        "without-a": {"b": 1 / 3, "c": 2 / 3},
        "other": {"b": 0.5, "c": 0.5},
        "without-b-c": {"a": 1.0},
    }
    trials = tuple(
        trial(name, "mix", "sparsegpt", "60%", 0, {"general": 0.5, "code": 0.3 + 0.1 * at}, mix=mix)
        for at, (name, mix) in enumerate(mixes.items())
    )
    found = analyse(study(full_plan(), trials=trials), QUICK)
    marked = {
        (one.left, one.right): one.removed
        for one in found.conditions[0].differences
        if one.removed and one.quantity == "code"
    }
    assert marked == {("uniform", "without-a"): ("a",), ("uniform", "without-b-c"): ("b", "c")}
    assert "removed" in found.tables()["differences.csv"].splitlines()[0]
