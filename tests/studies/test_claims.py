"""The paper's claims, judged by a script: planted effects are reported, a tie is never a win."""

import numpy as np
import paper_claims as SCRIPT  # noqa: N812
import pytest

from calmix.options import Settings
from calmix.study.analyse import analyse
from tests.analysis.test_differences import KEPT, TUNED, analysed
from tests.synthetic import LIFTS, SLOPES, Plan, informed

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
