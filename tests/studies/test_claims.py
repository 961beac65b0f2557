"""The paper's claims, judged by a script: planted effects are reported, a tie is never a win."""

import sys

import numpy as np
import paper_claims as SCRIPT  # noqa: N812
import pytest

from calmix.analysis import Settings, analyse
from calmix.analysis.cells import TOTAL, WORST
from calmix.analysis.differences import SINGLES
from tests.analysis.test_differences import BETTER, KEPT, NAMES, PLAIN, TUNED, analysed, gap
from tests.synthetic import LIFTS, SLOPES, Plan, full_plan, informed, save, study

pytestmark = pytest.mark.long
QUICK = Settings(resamples=100)
METRIC = "A metric of the text raises one dimension and lowers another"


def of(results, text=None, **settings):
    analysis = analyse(results, QUICK.model_copy(update=settings))
    cells, more = [each.cells for each in analysis.conditions], ()
    if text is not None:
        more = SCRIPT.correlate(cells, results.trials, text, permutations=999)
    return SCRIPT.claims(analysis, more)


SHARP = {"noise": 0.01, "draw": 0.004}
PLANTED = Plan(others=LIFTS, slopes=SLOPES, **SHARP)
OPPOSITE = {
    "igsp": ("igsp", -0.2),
    "mixed": ("self-cal", 0.2),
    "mix-a": ("mix", 0.2),
    "mix-b": ("mix", -0.2),
}
STEPS = [("sparsegpt", "30%"), ("sparsegpt", "60%")]
GROWS, SHRINKS = "The lead of a mix grows with sparsity", "The lead of a mix shrinks with recovery"


def stepped(lift):
    return Plan(conditions=STEPS, others={"mix-8": ("mix", lift)}, noise=0.0, draw=0.005)


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (
            PLANTED,
            {
                "A mix keeps more than the best single source": "holds (mix-8 over ",
                "A mix keeps more than single sources do on average": "holds (mix-8 +",
                "IGSP keeps more than the best single source": "holds (igsp over ",
                "IGSP keeps more than Self-Cal": "undecided (igsp over self-cal ",
                "IGSP keeps more than SGS": "holds (igsp over sgs +",
                "A mix keeps more than IGSP": "holds (mix-8 over igsp +",
                "Dimensions are far apart where the total is close": "holds (single sources ",
                METRIC: "holds (perplexity: general +",
            },
        ),
        (
            Plan(others=OPPOSITE, **SHARP),
            {
                "IGSP keeps more than Self-Cal": "does not hold (igsp over mixed −",
                "A mix keeps more than single sources do on average": "holds in part (",
                "A mix keeps more than IGSP": "holds in part (mix-a over igsp +",
            },
        ),
        (
            Plan(noise=0.05),
            {
                METRIC: "not found (no opposite signs survive correction; strongest: ",
                "A mix keeps more than the best single source": None,
            },
        ),
        (stepped(0.2), {GROWS: "holds (mix-8 from 30 % to 60 % +"}),
        (stepped(0.0), {GROWS: "undecided (mix-8 from 30 % to 60 % "}),
        ({"prose": (0.8, 0.7), "mix": (0.85, 0.85)}, {SHRINKS: "holds (mix over prose −"}),
        ({"prose": (0.6, 0.3), "mix": (0.95, 0.95)}, {SHRINKS: "does not hold (mix over prose +"}),
        ({"prose": (0.65, 0.35), "mix": (0.85, 0.85)}, {SHRINKS: "undecided (mix over prose "}),
    ],
)
def test_claims_find_planted_effects(plan, told):
    if isinstance(plan, Plan):
        actual = of(*informed(plan))
    else:
        actual = SCRIPT.claims(analysed({**KEPT, TUNED: plan}))
    assert plan is not PLANTED or actual.keys() == told.keys()
    where = {GROWS: "SparseGPT", SHRINKS: "ADMM + distill,epochs=4 60%"}
    for claim, start in told.items():
        assert (start is None) == (claim not in actual)
        for one in actual.get(claim, ()):
            assert one["where"] == where.get(claim, "SparseGPT 60%")
            assert "{verdict} ({figures})".format(**one).startswith(start)
    if plan is PLANTED:
        assert "code −" in actual[METRIC][0]["figures"]


def test_claims_use_strategy_not_label():
    others = {"mix": ("self-written", 0.2), "igsp": ("mix", 0.1), "mix-8": ("mix", 0.2)}
    actual = of(study(Plan(others=others, **SHARP)))
    [best] = actual["A mix keeps more than the best single source"]
    assert best["figures"].startswith("igsp over ")
    assert "; mix-8 over " in best["figures"]
    assert "mix over" not in best["figures"]
    assert "A mix keeps more than IGSP" not in actual
    named = of(study(Plan(others=others, **SHARP)), default="igsp")
    assert named["A mix keeps more than igsp"][0]["figures"].startswith("mix-8 over igsp ")


def test_default_set_adds_a_claim():
    actual = of(study(PLANTED), default="news")["A mix keeps more than news"]
    assert SCRIPT.tally(actual) == "holds"
    assert SCRIPT.tally([*actual, actual[0] | {"verdict": "undecided"}]) == "holds in 1 of 2"


def test_few_sources_leave_claims_open():
    [actual] = of(*informed(Plan(others=LIFTS, seeds=(0,), sources=("a", "b", "c", "d"))))[METRIC]
    assert actual["verdict"] == "undecided"
    assert actual["figures"].endswith("; 4 sources")


def test_lead_growth():
    pairs = [("sparsegpt", pattern) for pattern in ("2:4", "30%", "50%", "60%")]
    analysis = analyse(study(full_plan(conditions=pairs, draw=0.003, noise=0.005)), QUICK)
    leads = [gap(each, "mix-8", SINGLES).gap.value for each in analysis.conditions]
    moved = SCRIPT.changes([each.joint for each in analysis.conditions], None)
    (growth,) = [one for one in moved if (one.calibration, one.quantity) == ("mix-8", TOTAL)]
    assert growth.significant
    assert all(one.p_corrected >= one.gap.p for one in moved)
    # N:M patterns do not count as sparsities.
    assert (growth.by, growth.less, growth.more) == ("sparsity", "SparseGPT 30%", "SparseGPT 60%")
    assert growth.gap.low > 0
    assert growth.gap.value == pytest.approx(leads[-1] - leads[0], abs=1e-9)
    assert growth.gap.value == pytest.approx(0.08 * (1 - 0.5**3), abs=0.02)


@pytest.mark.parametrize(
    ("more", "less", "default", "quantity", "wanted"),
    [
        (BETTER, PLAIN, "prose", TOTAL, (0.8 - 0.45) - (0.6 - 0.4)),
        (TUNED, BETTER, "prose", "code", (0.9 - 0.5) - (0.8 - 0.3)),
        (BETTER, PLAIN, "prose", WORST, (0.8 - 0.3) - (0.6 - 0.3)),
        (BETTER, PLAIN, None, TOTAL, (0.8 - 0.5) - (0.6 - 0.45)),
        (TUNED, BETTER, None, TOTAL, (0.9 - 0.65) - (0.8 - 0.45)),  # over the common source
    ],
)
def test_lead_across_methods(more, less, default, quantity, wanted):
    analysis = analysed(KEPT, default=default)
    (one,) = [
        each
        for each in SCRIPT.changes([each.joint for each in analysis.conditions], default)
        if (each.more, each.less) == (NAMES[more], NAMES[less])
        and (each.calibration, each.quantity) == ("mix", quantity)
    ]
    assert one.gap.value == pytest.approx(wanted, abs=1e-3)


def test_recovery_is_told_from_allocation():
    for share, by in (
        ({BETTER: KEPT[BETTER], TUNED: KEPT[PLAIN]}, "recovery"),
        ({BETTER: KEPT[PLAIN], f"{BETTER} + owl": KEPT[BETTER]}, "method"),
        ({f"{BETTER} + owl": KEPT[PLAIN], f"{BETTER} + owl + blocks": KEPT[BETTER]}, "recovery"),
    ):
        analysis = SCRIPT.changes([one.joint for one in analysed(share).conditions], "prose")
        assert {one.by for one in analysis} == {by}


def test_cancelling_effects():
    rng = np.random.default_rng(4)
    gain = rng.standard_normal(16)
    quiet = 0.1 * rng.standard_normal((16, 4))
    opposed = np.column_stack([gain, -gain, gain, -gain]) + quiet
    assert SCRIPT.cancellation(opposed, permutations=999, seed=0) == 0.001
    actual = [
        SCRIPT.cancellation(rng.standard_normal((16, 4)), permutations=199, seed=0) <= 0.05
        for _ in range(200)
    ]
    assert np.mean(actual) == pytest.approx(0.05, abs=0.03)


def test_script_prints_all_claims(tmp_path, monkeypatch, capsys):
    save(study(PLANTED), tmp_path / "store")
    monkeypatch.setattr(sys, "argv", ["paper_claims.py", str(tmp_path / "store")])
    SCRIPT.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "- A mix keeps more than the best single source: holds" in lines
