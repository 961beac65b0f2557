"""Findings report planted effects, a tie is never a win, and how numbers are written."""

import pytest

from calmix.analysis import Settings, analyse, recommend
from calmix.analysis.ranking import leaders
from calmix.report import words
from calmix.report.findings import claims, summarise, tally
from calmix.report.study import pages, summary_text
from tests.analysis.test_differences import BETTER, KEPT, PLAIN, TUNED, analysed
from tests.report.conftest import SMALL
from tests.synthetic import SLOPES, Plan, failed, full_plan, study, trial

QUICK = Settings(permutations=999, resamples=100)
LIFTS = {"mix-8": ("mix", 0.2), "igsp": ("igsp", 0.1), "self-cal": ("self-cal", 0.1),
         "sgs": ("sgs", -0.1)}  # fmt: skip
METRIC = "A metric of the text raises one dimension and lowers another"


def of(results, **settings):
    return summarise(analyse(results, QUICK.model_copy(update=settings)))


# Which set is best


KEPT_BY = {"bad": 0.3, "worse": 0.2, "near": 0.70, "top": 0.71}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("kept", "seeds", "best"), [
    (KEPT_BY, (0, 1), ["top", "near"]), (KEPT_BY | {"top": 0.9}, (0, 1), ["top"]),
    ({"lower": 0.600, "higher": 0.604}, (0,), ["higher", "lower"]),
])  # fmt: skip
def test_a_near_tie_is_a_tie_and_a_clear_lead_is_not(kept, seeds, best):
    """In the ranking, the advice, the sentences and the page."""
    trials = tuple(
        trial(name, "single", "sparsegpt", "60%", seed,
              {"general": value + 0.002 * seed, "code": value - 0.002 * seed})
        for name, value in kept.items() for seed in seeds
    )  # fmt: skip
    results = study(Plan(), trials=trials)
    found = analyse(results, QUICK)
    ranking = found.conditions[0].ranking
    assert [one.calibration for one in leaders(ranking)] == best
    assert recommend(results, resamples=200)[0].best == tuple(best)
    sentence, summary = words.which_is_best(ranking), summarise(found)
    assert ("keeps the most" in sentence) == (len(best) == 1)
    assert summary["conditions"][0][0] == f"{sentence}."
    lead = pages(results, found)["report.html"].split('<p class="lead">')[1].split("</p>")[0]
    assert sentence in summary["headline"]
    assert sentence in lead


def test_part_of_a_study_gives_the_same_answer_as_the_whole():
    results = study(full_plan(**SMALL, seed=3))
    whole, part = analyse(results, QUICK), analyse(results, QUICK, sparsity="60%")
    assert whole.conditions[1].ranking == part.conditions[0].ranking
    assert recommend(results, sparsity="60%")[0] == recommend(results)[1]


# Claims


SHARP = {"noise": 0.01, "draw": 0.004}
PLANTED = Plan(others=LIFTS, slopes=SLOPES, **SHARP)
OPPOSITE = {"igsp": ("igsp", -0.2), "mixed": ("self-cal", 0.2), "mix-a": ("mix", 0.2),
            "mix-b": ("mix", -0.2)}  # fmt: skip
STEPS = [("sparsegpt", "30%"), ("sparsegpt", "60%")]
GROWS, SHRINKS = "The lead of a mix grows with sparsity", "The lead of a mix shrinks with recovery"


def stepped(lift):
    return Plan(conditions=STEPS, others={"mix-8": ("mix", lift)}, noise=0.0, draw=0.005)


@pytest.mark.parametrize(("plan", "told"), [
    (PLANTED, {
        "A mix keeps more than the best single source": "holds (mix-8 over ",
        "A mix keeps more than single sources do on average": "holds (mix-8 +",
        "IGSP keeps more than the best single source": "holds (igsp over ",
        "IGSP keeps more than Self-Cal": "undecided (igsp over self-cal ",
        "IGSP keeps more than SGS": "holds (igsp over sgs +",
        "A mix keeps more than IGSP": "holds (mix-8 over igsp +",
        "Dimensions are far apart where the total is close": "holds (single sources ",
        METRIC: "holds (perplexity: general +",
    }),
    (Plan(others=OPPOSITE, **SHARP), {
        "IGSP keeps more than Self-Cal": "does not hold (igsp over mixed −",
        "A mix keeps more than single sources do on average": "holds in part (",
        "A mix keeps more than IGSP": "holds in part (mix-a over igsp +",  # in the next study
    }),
    (Plan(noise=0.05), {
        METRIC: "not found (no opposite signs survive correction; strongest: ",
        "A mix keeps more than the best single source": None,
    }),
    (stepped(0.2), {GROWS: "holds (mix-8 from 30 % to 60 % +"}),
    (stepped(0.0), {GROWS: "undecided (mix-8 from 30 % to 60 % "}),
    ({"prose": (0.8, 0.7), "mix": (0.85, 0.85)}, {SHRINKS: "holds (mix over prose −"}),
    ({"prose": (0.6, 0.3), "mix": (0.95, 0.95)}, {SHRINKS: "does not hold (mix over prose +"}),
    ({"prose": (0.65, 0.35), "mix": (0.85, 0.85)}, {SHRINKS: "undecided (mix over prose "}),
])  # fmt: skip
def test_claims_report_planted_effects(plan, told):
    found = claims(analyse(study(plan), QUICK) if isinstance(plan, Plan)
                   else analysed({**KEPT, TUNED: plan}))  # fmt: skip
    assert plan is not PLANTED or found.keys() == told.keys()
    where = {GROWS: "SparseGPT", SHRINKS: "ADMM + distill,epochs=4 60%"}
    for claim, start in told.items():
        assert (start is None) == (claim not in found)
        for one in found.get(claim, ()):
            assert one["where"] == where.get(claim, "SparseGPT 60%")
            assert "{verdict} ({figures})".format(**one).startswith(start)
    if plan is PLANTED:
        assert "code −" in found[METRIC][0]["figures"]


def test_a_set_counts_by_how_it_was_made_and_not_by_its_label():
    others = {"mix": ("self-written", 0.2), "igsp": ("mix", 0.1), "mix-8": ("mix", 0.2)}
    found = of(study(Plan(others=others, **SHARP)))["claims"]
    [best] = found["A mix keeps more than the best single source"]
    assert best["figures"].startswith("igsp over ")
    assert "; mix-8 over " in best["figures"]
    assert "mix over" not in best["figures"]
    assert "A mix keeps more than IGSP" not in found
    named = of(study(Plan(others=others, **SHARP)), default="igsp")["claims"]
    assert named["A mix keeps more than igsp"][0]["figures"].startswith("mix-8 over igsp ")


def test_a_default_adds_a_claim_and_claims_are_counted_over_conditions():
    found = of(study(PLANTED), default="news")["claims"]["A mix keeps more than news"]
    assert tally(found) == "holds"
    assert tally([*found, found[0] | {"verdict": "undecided"}]) == "holds in 1 of 2"


def test_few_sources_leave_signs_open():
    small = of(study(Plan(others=LIFTS, seeds=(0,), sources=("a", "b", "c", "d"))))
    [found] = small["claims"][METRIC]
    assert found["verdict"] == "undecided"
    assert found["figures"].endswith("; 4 sources")
    assert any("no correlation could have been found" in one for one in small["certainty"])
    alone = of(study(Plan(seeds=(0,), sources=("a", "b", "c", "d"))))
    assert any("cannot be said to rank 4 sets" in one for one in alone["conditions"][0])
    many = study(Plan(noise=0.05))
    known = {name: at for at, name in enumerate(Plan().sources[:3])}  # a metric that only they have
    trials = tuple(
        one.model_copy(update={"information": one.information | {"own": known[one.calibration]}})
        if one.calibration in known else one for one in many.trials
    )  # fmt: skip
    told = of(study(Plan(noise=0.05), trials=trials))["certainty"]
    assert not any("no correlation could" in one for one in told)


# Sentences


def test_small_studies_say_what_they_cannot_show_and_unfinished_ones_what_is_to_come():
    whole = study(full_plan(**SMALL))
    part = whole.model_copy(update={"trials": whole.trials[:29], "failed": (failed("x"),)})
    told = of(part)["certainty"]
    assert told[0].startswith("29 of 40 planned trials finished, 1 failed, 10 to come")
    assert any("empty cell" in line for line in told)
    assert "to come" not in " ".join(of(whole)["certainty"])
    alone = of(study(Plan(sources=("a",), seeds=(0,))))
    assert "nothing to compare" in alone["headline"]
    assert alone["conditions"] == [[]]
    assert not any("cause" in line for line in alone["certainty"])
    two = of(study(Plan(sources=("a", "b"), seeds=(0,))))
    assert any("no metric can be correlated" in line for line in two["conditions"][0])
    equal = of(study(Plan(others={"mix-8": ("mix", 0.0)}, noise=0.0, draw=0.02)))
    assert " are tied (" in equal["conditions"][0][0]
    assert any("One trial per source cannot" in line for line in equal["conditions"][0])
    silent = trial("a", "single", "sparsegpt", "60%", 0, {"general": None})
    assert "no task of the suite has signal" in of(study(Plan(), trials=(silent,)))["headline"]


def test_the_text_has_every_sentence():
    found = analyse(study(full_plan(conditions=SMALL["conditions"])), QUICK)
    told, lines = summarise(found), summary_text(found).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert all(line in text for said in (*told["conditions"], told["methods"]) for line in said)
    assert all(line in text for line in told["certainty"])
    assert all("{where}: {verdict} ({figures})".format(**one) in text
               for verdicts in told["claims"].values() for one in verdicts)  # fmt: skip
    assert text.index("shrunken") < text.index("SparseGPT 50%: findings")
    assert "  and 14 more" in lines


def test_each_method_is_compared_with_the_next_weaker_one():
    told = summarise(analysed(KEPT))["methods"]
    assert [line.split(":")[0] for line in told] == [
        "ADMM 60% against SparseGPT 60%", "ADMM + distill,epochs=4 60% against ADMM 60%",
    ]  # fmt: skip
    assert told[0].endswith("points in total, mean of 3 sets.")
    few = {PLAIN: {"mix": (0.5, 0.5)}, BETTER: {"mix": (0.501, 0.5)}}
    (line,) = summarise(analysed(few, default="mix"))["methods"]
    assert line.startswith("ADMM 60% against SparseGPT 60%: ")
    assert line.endswith(" points in total, mean of 1 set.")


@pytest.mark.parametrize(("written", "text"), [
    (words.percent(0.5004), "50.0"), (words.percent(None), "–"), (words.percent(-0.001), "−0.1"),
    (words.percent(-0.0001), "0.0"), (words.percent(-0.046, 0), "−5"),
    (words.percent(0.012, sign=True), "+1.2"), (words.percent(0.0, sign=True), "0.0"),
    (words.rho(-0.5), "−0.50"), (words.rho(-0.001), "0.00"), (words.p_value(0.0004), "<0.001"),
    (words.p_value(0.04), "0.040"), (words.p_value(None), "–"), (words.sure(0.9999), "99 %"),
    (words.sure(0.0), "1 %"), (words.listed("abc"), "a, b and c"),
    (words.short("x" * 40), "x" * 25 + "…"), (words.counted(1, "seed"), "1 seed"),
    (words.counted(2, "seed"), "2 seeds"),
])  # fmt: skip
def test_a_number_or_name_is_written(written, text):
    assert written == text
