"""Findings report planted effects, a tie is never a win, and how numbers are written."""

import pytest

from calmix import words
from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.findings import summarise, which_is_best
from calmix.study.page import pages
from calmix.study.ranking import leaders
from tests.synthetic import Plan, study, trial

QUICK = Settings(resamples=100)


def of(results, **settings):
    return summarise(analyse(results, QUICK.model_copy(update=settings)))


# Which set is best


KEPT_BY = {"bad": 0.3, "worse": 0.2, "near": 0.70, "top": 0.71}


@pytest.mark.parametrize(
    ("kept", "seeds", "best"),
    [
        (KEPT_BY, (0, 1), ["top", "near"]),
        (KEPT_BY | {"top": 0.9}, (0, 1), ["top"]),
        ({"lower": 0.600, "higher": 0.604}, (0,), ["higher", "lower"]),
    ],
)
def test_ties_and_leads(kept, seeds, best):
    """In the ranking, the sentences and the page."""
    trials = tuple(
        trial(
            name,
            "single",
            "sparsegpt",
            "60%",
            seed,
            {"general": value + 0.002 * seed, "code": value - 0.002 * seed},
        )
        for name, value in kept.items()
        for seed in seeds
    )
    results = study(Plan(), trials=trials)
    analysis = analyse(results, QUICK)
    ranking = analysis.conditions[0].ranking
    assert [one.calibration for one in leaders(ranking)] == best
    sentence, summary = which_is_best(ranking), summarise(analysis)
    assert ("keeps the most" in sentence) == (len(best) == 1)
    assert summary["conditions"][0][0] == f"{sentence}."
    lead = pages(results, analysis)["report.html"].split('<p class="lead">')[1].split("</p>")[0]
    assert sentence in summary["headline"]
    assert sentence in lead


# Sentences


def test_small_and_unfinished_studies():
    whole = study(Plan(sources=("a", "b"), seeds=(0, 1)))
    assert "not run" not in " ".join(of(whole)["certainty"])
    part = whole.model_copy(update={"trials": whole.trials[:3], "failed": 1})
    part = part.model_copy(update={"planned": 10})
    sentences = of(part)["certainty"]
    assert sentences[0].startswith("3 of 10 planned trials finished, 1 failed, 6 not run")
    assert any("empty cell" in line for line in sentences)
    alone = of(study(Plan(sources=("a",), seeds=(0,))))
    assert "nothing to compare" in alone["headline"]
    assert alone["conditions"] == [["a: 44.5 [43.3, 45.8] %."]]
    equal = of(study(Plan(others={"mix-8": ("mix", 0.0)}, noise=0.0, draw=0.02)))
    assert " are tied (" in equal["conditions"][0][0]
    silent = trial("a", "single", "sparsegpt", "60%", 0, {"general": None})
    assert "no task of the suite has signal" in of(study(Plan(), trials=(silent,)))["headline"]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (words.percent(0.5004), "50.0"),
        (words.percent(None), "–"),
        (words.percent(-0.001), "−0.1"),
        (words.percent(-0.0001), "0.0"),
        (words.percent(0.012, sign=True), "+1.2"),
        (words.p_value(0.0004), "<0.001"),
        (words.p_value(None), "–"),
        (words.sure(0.9999), "99 %"),
        (words.listed("abc"), "a, b and c"),
        (words.counted(1, "seed"), "1 seed"),
    ],
)
def test_formatting(written, text):
    assert written == text
