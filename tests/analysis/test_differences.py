"""Differences, gains of methods, ranking, names."""

import math
from dataclasses import fields, replace

import pytest
from scipy import stats

from calmix.evaluation.retention import flips, retention
from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.cells import TOTAL, WORST
from calmix.study.differences import BEST, SINGLES
from tests.synthetic import SOURCES, Plan, full_plan, study, trials_of

QUICK = Settings(resamples=50)
EXACT = Settings(resamples=2000)
SPARSE = [("sparsegpt", "60%")]


def gap(condition, left, right, quantity=TOTAL):
    wanted = (left, right, quantity)
    (one,) = [one for one in condition.differences if (one.left, one.right, one.quantity) == wanted]
    return one


def test_seed_difference_uses_students_t():
    """One mean of 3 seeds minus 16 such means, with the pooled standard deviation of a seed."""
    condition = analyse(study(full_plan(conditions=SPARSE)), EXACT).conditions[0]
    one = gap(condition, "mix-8", SINGLES, "code").gap
    quantity = condition.cells.quantities.index("code")
    means, spread = condition.cells.means[:, quantity], condition.joint.deviations[:, quantity]
    mix = condition.cells.sets.index("mix-8")
    assert one.value == pytest.approx(means[mix] - means[condition.cells.of("single")].mean())
    error = math.sqrt((spread**2).mean() * (1 / 3 + 1 / 48))
    half = stats.t.ppf(0.975, 22 * 2) * error
    assert one.p >= 2 * stats.t.sf(abs(one.value) / error, 44)
    assert one.draw_high - one.draw_low == pytest.approx(2 * half, rel=0.1)
    assert one.low < one.item_low < one.value < one.item_high < one.high
    assert one.high - one.low < 0.9 * ((one.item_high - one.item_low) + 2 * half)
    named = {name for each in condition.differences for name in (each.left, each.right)}
    assert len(named) == 8


def test_few_seeds_use_pooled_spread():
    """As in a study with one seed for sources and three for mixes."""
    whole = study(full_plan(conditions=SPARSE, sources=SOURCES[:4]))
    for single, freedom, missing in ((True, 0, 0), (False, 12, 8)):
        chosen = tuple(
            one for one in whole.trials if one.seed == 0 or not (single or one.strategy == "single")
        )
        condition = analyse(whole.model_copy(update={"trials": chosen}), QUICK).conditions[0]
        one = gap(condition, "mix-8", SINGLES)
        assert (condition.joint.freedom, len(condition.missing)) == (freedom, missing)
        assert one.p_corrected is not None
        assert (one.gap.draw_low is None) == single
        assert ((one.gap.low, one.gap.high) == (one.gap.item_low, one.gap.item_high)) == single


def test_worst_dimension_of_picked_source():
    """If fully shrunken to the mean of the sources, its worst would be code; it is not."""
    own = {"a": (0.5, 0.9), "b": (0.9, 0.1), "c": (0.9, 0.1), "mix": (0.7, 0.71)}
    trials = trials_of(own, steps=(0.4, -0.4))
    condition = analyse(study(Plan(), trials=trials), QUICK).conditions[0]
    worst, general, code = (
        gap(condition, "mix", f"{BEST}a", quantity).gap.value
        for quantity in (WORST, "general", "code")
    )
    assert general < 0 < code  # of the shrunken values
    assert worst == pytest.approx(general)


def test_one_seed_borrows_spread():
    pairs = [("sparsegpt", "50%"), ("sparsegpt", "60%"), ("admm", "60%")]
    few = {"sources": SOURCES[:4], "others": {"mix-8": ("mix", 0.08)}}
    whole = study(full_plan(conditions=pairs, **few))
    trials_left = tuple(one for one in whole.trials if one.pattern == "50%" or one.seed == 0)
    results = whole.model_copy(update={"trials": trials_left})
    analysis = analyse(results, QUICK)
    pooled = [
        (one.condition.label, one.joint.pooled, one.joint.freedom) for one in analysis.conditions
    ]
    labels = "ADMM 60%", "SparseGPT 50%", "SparseGPT 60%"
    assert pooled == list(zip(labels, (True, False, True), (10, 10, 10), strict=True))
    once, often = analysis.conditions[2].joint, analysis.conditions[1].joint
    assert once.by_draws == pytest.approx(often.by_draws)
    one = gap(analysis.conditions[2], "mix-8", SINGLES).gap
    assert one.draw_low < one.value < one.draw_high
    # Seeds are not taken to move both methods alike: their covariance is unknown.
    (gain,) = [one.gap for one in analysis.gains if one.quantity == TOTAL]
    weight = once.cells.weights[0]
    assert gain.draw_high - gain.draw_low > 2 * math.sqrt(2 * weight @ once.by_draws @ weight / 5)
    other = tuple(
        one.model_copy(update={"model": "other"}) if one.pattern == "50%" else one
        for one in trials_left
    )
    conditions = analyse(study(Plan(), trials=other), QUICK).conditions
    assert [one.joint.freedom for one in conditions if one.condition.model != "other"] == [0, 0]


def test_accuracy_and_flips_match_evaluate():
    def more(tasks):
        """Add a task of nine items, which weighs as much as the others."""
        (one,) = [task for task in tasks if task.name == "code_a"]
        known = {field.name: getattr(one, field.name) for field in fields(one)}
        few = {name: value[:9] for name, value in known.items() if isinstance(value, tuple)}
        return (*tasks, replace(one, name="code_c", **few))

    results = study(Plan(seeds=(0,), sources=("a", "b")))
    results = results.model_copy(
        update={
            part: {name: more(tasks) for name, tasks in getattr(results, part).items()}
            for part in ("dense", "scores")
        }
    )
    (dense,) = results.dense.values()
    for settings in (QUICK, QUICK.model_copy(update={"measure": "accuracy"})):
        ranking = analyse(results, settings).conditions[0].ranking
        scores = {one.calibration: results.scores[one.id] for one in results.trials}
        for one in ranking:
            pruned = scores[one.calibration]
            wanted = retention(dense, pruned, measure="accuracy", resamples=2).of("code").value
            assert one.accuracy["code"] == pytest.approx(wanted)
            flipped = flips(dense, pruned)["code"].value
            assert one.distance["flips"]["code"] == pytest.approx(flipped)


def test_bits_per_byte_are_resampled_as_a_ratio():
    """The paper's ratio divides by the trial's own bits; the interval is that of the ratio."""
    results = study(Plan(seeds=(0,), sources=("a",)))
    only, by_ratio = results.trials[0], EXACT.model_copy(update={"measure": "ratio"})
    ours = analyse(results, by_ratio).conditions[0].ranking[0].tasks["code_b"]
    pair = results.dense[only.model], results.scores[only.id]
    result = retention(*pair, measure="ratio", resamples=2000)
    (theirs,) = [task.kept for task in result.tasks if task.name == "code_b"]
    assert ours.value == pytest.approx(theirs.value)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours.high - ours.low > 0.01


# One method against another

PLAIN, BETTER, TUNED = "sparsegpt", "admm", "admm + distill,epochs=4"
KEPT = {  # retention of general and code
    PLAIN: {"prose": (0.5, 0.3), "code": (0.4, 0.6), "mix": (0.6, 0.6)},
    BETTER: {"prose": (0.6, 0.3), "code": (0.5, 0.6), "mix": (0.8, 0.8)},
    TUNED: {"prose": (0.8, 0.5), "mix": (0.9, 0.9)},
}
NAMES = {PLAIN: "SparseGPT 60%", BETTER: "ADMM 60%", TUNED: "ADMM + distill,epochs=4 60%"}


def analysed(kept, *, seeds=1, default="prose"):
    steps = [0.01 * seed for seed in range(seeds)]
    trials = [one for method, sets in kept.items() for one in trials_of(sets, method, steps=steps)]
    settings = Settings(resamples=400, default=default)
    return analyse(study(Plan(), trials=tuple(trials)), settings)


def gain(analysis, more, less, quantity=TOTAL):
    wanted = (NAMES[more], NAMES[less], quantity)
    (one,) = [each for each in analysis.gains if (each.more, each.less, each.quantity) == wanted]
    return one


def test_gains_between_all_methods():
    analysis = analysed(KEPT)
    assert len({(one.more, one.less) for one in analysis.gains}) == 3
    for more, less, quantity, sets, wanted in (
        (BETTER, PLAIN, TOTAL, 3, (0.05 + 0.05 + 0.2) / 3),
        (BETTER, PLAIN, "general", 3, (0.1 + 0.1 + 0.2) / 3),
        (TUNED, BETTER, TOTAL, 2, (0.2 + 0.1) / 2),  # sets that one lacks are left out
        (TUNED, PLAIN, TOTAL, 2, (0.25 + 0.3) / 2),
    ):
        one = gain(analysis, more, less, quantity)
        assert (one.sets, one.gap.value) == (sets, pytest.approx(wanted, abs=1e-3))


def test_items_and_seeds_are_paired():
    """The interval of a gap between methods accounts for their common items and seeds."""
    analysis = analysed(KEPT, seeds=3)
    one = gain(analysis, BETTER, PLAIN).gap
    means = [each.joint.mean(range(3), 0).estimate() for each in analysis.conditions[::2]]
    widths = [each.item_high - each.item_low for each in means]
    assert one.low < one.value < one.high
    assert one.item_high - one.item_low < 0.9 * math.hypot(*widths)
    assert one.draws == 3
    assert one.draw_high - one.draw_low < 0.1 * (means[0].draw_high - means[0].draw_low)


def test_p_is_robust_to_one_resample():
    """Of few items next to nothing that can be retained may be left in a resample."""
    better, plain = (one.joint for one in analysed(KEPT, seeds=3).conditions[::2])
    item = better.item.copy()
    item[..., 0] = 1e12
    wild = replace(better, item=item)
    gaps = [(one.mean([0], 0) - plain.mean([0], 0)).estimate(test=True) for one in (better, wild)]
    assert 0 < gaps[0].p < 1
    assert gaps[1].p == pytest.approx(gaps[0].p, rel=0.3)


def test_gains_need_equal_conditions():
    conditions = [("sparsegpt", "60%"), ("admm", "60%")]
    one = study(Plan(sources=("a", "b"), conditions=conditions))
    assert len(analyse(one, QUICK).gains) == 6
    for field, value in (("model", "other"), ("pattern", "50%"), ("rows", 8)):
        trials = [
            t.model_copy(update={field: value} if t.method == "admm" else {}) for t in one.trials
        ]
        assert analyse(study(Plan(), trials=tuple(trials)), QUICK).gains == ()
