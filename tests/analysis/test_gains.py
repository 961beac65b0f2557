"""What one method keeps more of than another, and what becomes of leads between them."""

import pytest

from calmix.analysis import Settings, analyse
from calmix.analysis.gains import MEAN
from tests.synthetic import Plan, study, trial

QUICK = Settings(permutations=9, resamples=400)
MADE = {"prose": "single", "code": "single", "mix": "mix"}
PLAIN, BETTER, TUNED = "sparsegpt", "admm", "admm + distill,epochs=4"
KEPT = {  # of general and code
    PLAIN: {"prose": (0.5, 0.3), "code": (0.4, 0.6), "mix": (0.6, 0.6)},
    BETTER: {"prose": (0.6, 0.3), "code": (0.5, 0.6), "mix": (0.8, 0.8)},
    TUNED: {"prose": (0.8, 0.5), "mix": (0.9, 0.9)},
}


def analysed(kept, *, seeds=1, default="prose"):
    trials = tuple(
        trial(name, MADE[name], method, "60%", seed,
              {"general": general + 0.01 * seed, "code": code + 0.01 * seed})
        for method, sets in kept.items()
        for name, (general, code) in sets.items() for seed in range(seeds)
    )  # fmt: skip
    settings = Settings(permutations=9, resamples=400, default=default)
    return analyse(study(Plan(), trials=trials), settings)


def gain(found, more, less, name, quantity="total"):
    (one,) = [each for each in found.gains
              if (each.more, each.less) == (f"{more} 60%", f"{less} 60%")
              and (each.calibration, each.quantity) == (name, quantity)]  # fmt: skip
    return one


def shift(found, more, less, quantity="total"):
    asked = f"{more} 60%", f"{less} 60%", quantity
    (one,) = [each for each in found.shifts if (each.more, each.less, each.quantity) == asked]
    return one


def test_every_two_methods_are_compared_set_by_set():
    found = analysed(KEPT)
    assert {(one.more, one.less) for one in found.gains} == {
        ("ADMM 60%", "SparseGPT 60%"),
        ("ADMM + distill,epochs=4 60%", "SparseGPT 60%"),
        ("ADMM + distill,epochs=4 60%", "ADMM 60%"),
    }
    assert gain(found, "ADMM", "SparseGPT", "prose").gap.value == pytest.approx(0.05, abs=1e-3)
    general = gain(found, "ADMM", "SparseGPT", "mix", "general")
    assert general.gap.value == pytest.approx(0.2, abs=1e-3)
    mean = gain(found, "ADMM", "SparseGPT", MEAN)
    assert (mean.sets, mean.recovered) == (3, False)
    assert mean.gap.value == pytest.approx((0.05 + 0.05 + 0.2) / 3, abs=1e-3)
    mean = gain(found, "ADMM + distill,epochs=4", "ADMM", MEAN)
    assert (mean.sets, mean.recovered) == (2, True)  # what one of them lacks is left out
    assert mean.gap.value == pytest.approx((0.2 + 0.1) / 2, abs=1e-3)
    assert not gain(found, "ADMM + distill,epochs=4", "SparseGPT", MEAN).recovered


def test_items_and_seeds_are_the_same_on_both_sides():
    """A gap of two methods is as sure as what they have in common lets it be."""
    once, twice = analysed(KEPT), analysed(KEPT, seeds=2)
    gap = gain(once, "ADMM", "SparseGPT", "mix").gap
    of_mix = [each.joint.one(each.cells.sets.index("mix"), 0) for each in once.conditions[:2]]
    widths = [one.high - one.low for one in of_mix]
    assert gap.low < gap.value < gap.high
    assert gap.high - gap.low < 0.9 * (widths[0] ** 2 + widths[1] ** 2) ** 0.5
    assert (gap.draws, gap.draw_low) == (1, None)
    gap = gain(twice, "ADMM", "SparseGPT", "mix").gap
    total = twice.conditions[0].joint.one(twice.conditions[0].cells.sets.index("mix"), 0)
    assert gap.draws == 2
    assert gap.draw_high - gap.draw_low < 0.1 * (total.draw_high - total.draw_low)


def test_leads_over_the_default_are_followed_from_method_to_method():
    found = analysed(KEPT)
    one = shift(found, "ADMM", "SparseGPT")
    assert (one.calibration, one.default, one.recovered) == ("mix", "prose", False)
    assert one.gap.value == pytest.approx((0.8 - 0.45) - (0.6 - 0.4), abs=1e-3)
    one = shift(found, "ADMM + distill,epochs=4", "ADMM")
    assert one.recovered
    assert one.gap.value == pytest.approx((0.9 - 0.65) - (0.8 - 0.45), abs=1e-3)
    code = shift(found, "ADMM + distill,epochs=4", "ADMM", "code")
    assert code.gap.value == pytest.approx((0.9 - 0.5) - (0.8 - 0.3), abs=1e-3)
    worst = shift(found, "ADMM", "SparseGPT", "worst")
    assert worst.gap.value == pytest.approx((0.8 - 0.3) - (0.6 - 0.3), abs=1e-3)


def test_without_a_default_leads_are_over_the_sources_of_both():
    found = analysed(KEPT, default=None)
    one, of_prose = (
        shift(found, "ADMM", "SparseGPT"),
        shift(found, "ADMM + distill,epochs=4", "ADMM"),
    )
    assert one.gap.value == pytest.approx((0.8 - 0.5) - (0.6 - 0.45), abs=1e-3)
    assert of_prose.gap.value == pytest.approx((0.9 - 0.65) - (0.8 - 0.45), abs=1e-3)


def test_only_conditions_alike_but_for_the_method_are_compared():
    plans = [
        Plan(sources=("a", "b"), conditions=[("sparsegpt", pattern), ("admm", "60%")])
        for pattern in ("50%", "60%")
    ]
    apart, alike = (analyse(study(plan), QUICK) for plan in plans)
    assert apart.gains == ()
    assert len(alike.gains) == 3 * 5
    one = study(plans[1])
    other = [
        each.model_copy(update={"model": "other", "id": f"other-{each.id}"})
        for each in one.trials if each.method == "sparsegpt"
    ]  # fmt: skip
    both = study(plans[1], trials=(*(t for t in one.trials if t.method == "admm"), *other))
    assert analyse(both, QUICK).gains == ()


def test_a_recovery_is_one_whatever_it_keeps_and_an_allocation_is_none():
    mean = gain(analysed({BETTER: KEPT[BETTER], TUNED: KEPT[PLAIN]}), "ADMM + distill,epochs=4",
                "ADMM", MEAN)  # fmt: skip
    assert (mean.recovered, mean.gap.value) == (True, pytest.approx(-0.1, abs=1e-3))
    kept = {BETTER: KEPT[PLAIN], f"{BETTER} + owl": KEPT[BETTER]}
    assert not any(one.recovered for one in analysed(kept).gains)
    kept = {f"{BETTER} + owl": KEPT[PLAIN], f"{BETTER} + owl + blocks": KEPT[BETTER]}
    assert all(one.recovered for one in analysed(kept).gains)
