"""What one method keeps more of than another, and what becomes of leads between them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from calmix.analysis import Settings, analyse
from calmix.analysis.analyse import Analysis
from calmix.analysis.gains import MEAN, Gain, Shift
from calmix.report import summarise
from calmix.report.claims import claims
from tests.synthetic import Plan, study, trial

QUICK = Settings(permutations=9, resamples=400)
MADE = {"prose": "single", "code": "single", "mix": "mix"}
PLAIN, BETTER, TUNED = "sparsegpt", "admm", "admm + distill,epochs=4"
KEPT = {  # of general and code
    PLAIN: {"prose": (0.5, 0.3), "code": (0.4, 0.6), "mix": (0.6, 0.6)},
    BETTER: {"prose": (0.6, 0.3), "code": (0.5, 0.6), "mix": (0.8, 0.8)},
    TUNED: {"prose": (0.8, 0.5), "mix": (0.9, 0.9)},
}


def analysed(
    kept: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    seeds: int = 1,
    default: str | None = "prose",
) -> Analysis:
    trials = tuple(
        trial(name, MADE[name], method, "60%", seed,
              {"general": general + 0.01 * seed, "code": code + 0.01 * seed})
        for method, sets in kept.items()
        for name, (general, code) in sets.items() for seed in range(seeds)
    )  # fmt: skip
    settings = Settings(permutations=9, resamples=400, default=default)
    return analyse(study(Plan(), trials=trials), settings)


def gain(found: Analysis, more: str, less: str, name: str, quantity: str = "total") -> Gain:
    (one,) = [each for each in found.gains
              if (each.more, each.less) == (f"{more} 60%", f"{less} 60%")
              and (each.calibration, each.quantity) == (name, quantity)]  # fmt: skip
    return one


def shift(found: Analysis, more: str, less: str, quantity: str = "total") -> Shift:
    asked = f"{more} 60%", f"{less} 60%", quantity
    (one,) = [each for each in found.shifts if (each.more, each.less, each.quantity) == asked]
    return one


def test_every_two_methods_are_compared_set_by_set() -> None:
    found = analysed(KEPT)
    pairs = dict.fromkeys((one.more, one.less) for one in found.gains)
    assert list(pairs) == [
        ("ADMM 60%", "SparseGPT 60%"),
        ("ADMM + distill,epochs=4 60%", "SparseGPT 60%"),
        ("ADMM + distill,epochs=4 60%", "ADMM 60%"),
    ]
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


def test_items_are_the_same_on_both_sides() -> None:
    """A gap of two methods is as sure as what they have in common lets it be."""
    found = analysed(KEPT)
    gap = gain(found, "ADMM", "SparseGPT", "mix").gap
    widths = []
    for each in found.conditions[:2]:
        at = each.cells.sets.index("mix")
        total = each.joint.one(at, 0)
        widths.append(total.high - total.low)
    assert gap.low < gap.value < gap.high
    assert gap.high - gap.low < 0.9 * (widths[0] ** 2 + widths[1] ** 2) ** 0.5
    assert (gap.draws, gap.draw_low) == (1, None)


def test_draws_that_both_have_are_the_same_on_both_sides() -> None:
    """What both methods lose by another draw takes nothing from what is between them."""
    found = analysed(KEPT, seeds=2)
    gap = gain(found, "ADMM", "SparseGPT", "mix").gap
    at = found.conditions[0].cells.sets.index("mix")
    total = found.conditions[0].joint.one(at, 0)
    assert gap.draws == 2
    assert gap.draw_high - gap.draw_low < 0.1 * (total.draw_high - total.draw_low)


def test_leads_over_the_default_are_followed_from_method_to_method() -> None:
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


def test_without_a_default_leads_are_over_the_sources_of_both() -> None:
    found = analysed(KEPT, default=None)
    one = shift(found, "ADMM", "SparseGPT")
    assert one.gap.value == pytest.approx((0.8 - 0.5) - (0.6 - 0.45), abs=1e-3)
    one = shift(found, "ADMM + distill,epochs=4", "ADMM")  # of prose alone
    assert one.gap.value == pytest.approx((0.9 - 0.65) - (0.8 - 0.45), abs=1e-3)


def test_only_conditions_alike_but_for_the_method_are_compared() -> None:
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


def test_a_recovery_that_keeps_less_is_told_as_one() -> None:
    found = analysed({BETTER: KEPT[BETTER], TUNED: KEPT[PLAIN]})
    mean = gain(found, "ADMM + distill,epochs=4", "ADMM", MEAN)
    assert mean.recovered
    assert mean.gap.value == pytest.approx(-0.1, abs=1e-3)
    (line, *_) = summarise(found).methods.found
    assert line.startswith("ADMM + distill,epochs=4 60% against ADMM 60%: −10.0 [")


def test_an_allocation_is_no_recovery() -> None:
    kept = {BETTER: KEPT[PLAIN], f"{BETTER} + owl": KEPT[BETTER]}
    assert not any(one.recovered for one in analysed(kept).gains)
    kept = {f"{BETTER} + owl": KEPT[PLAIN], f"{BETTER} + owl + blocks": KEPT[BETTER]}
    assert all(one.recovered for one in analysed(kept).gains)


@pytest.mark.parametrize(
    ("tuned", "verdict"),
    [
        ({"prose": (0.8, 0.7), "mix": (0.85, 0.85)}, "holds"),
        ({"prose": (0.6, 0.3), "mix": (0.95, 0.95)}, "does not hold"),
        ({"prose": (0.65, 0.35), "mix": (0.85, 0.85)}, "cannot be told"),
    ],
)
def test_whether_recovery_evens_texts_out_is_a_claim(
    tuned: dict[str, tuple[float, float]], verdict: str
) -> None:
    made = {one.text: one.told for one in claims(analysed({**KEPT, TUNED: tuned}))}
    (one,) = made["The lead of a mix shrinks with recovery"]
    assert (one.way, one.verdict) == ("ADMM + distill,epochs=4 60%", verdict)
    assert one.because.startswith("the lead over the prose: mix ")


def test_the_summary_goes_from_each_method_to_the_one_that_keeps_next_less() -> None:
    found = summarise(analysed(KEPT)).methods
    told = [line for line in found.found if "points in total" in line]
    assert [line.split(":")[0] for line in told] == [
        "ADMM 60% against SparseGPT 60%", "ADMM + distill,epochs=4 60% against ADMM 60%",
    ]  # fmt: skip
    assert "mean of 3 sets, +5.0 (prose) to +20.0 (mix)." in told[0]
    assert any("the lead over the default prose changes by mix −10.0 [" in line
               for line in found.found)  # fmt: skip
    few = {PLAIN: {"mix": (0.5, 0.5)}, BETTER: {"mix": (0.501, 0.5)}}
    (line,) = summarise(analysed(few, default="mix")).methods.not_found
    assert line.startswith("ADMM 60% against SparseGPT 60%: ")
    assert line.endswith(" points in total, of mix.")
