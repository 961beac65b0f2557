"""Claims are borne out, refuted or left open as was planted."""

from __future__ import annotations

import re

import pytest

from calmix.analysis import Settings, analyse
from calmix.report import pages, summarise
from calmix.report.claims import Claim, Told, claims, claims_text
from calmix.report.page import claims_section
from calmix.study.results import StudyResults
from tests.synthetic import SLOPES, Plan, study

LIFTS = {"mix-8": ("mix", 0.2), "igsp": ("igsp", 0.1), "self-cal": ("self-cal", 0.1),
         "sgs": ("sgs", -0.1)}  # fmt: skip
SETTINGS = Settings(permutations=1999, resamples=200)


def told(results: StudyResults, **settings: object) -> dict[str, tuple[Told, ...]]:
    found = analyse(results, Settings(permutations=1999, resamples=200, **settings))  # type: ignore[arg-type]
    return {claim.text: claim.told for claim in claims(found)}


def verdicts(results: StudyResults, **settings: object) -> dict[str, str]:
    return {text: one.verdict for text, (one,) in told(results, **settings).items()}


@pytest.fixture(scope="module")
def planted() -> StudyResults:
    return study(Plan(others=LIFTS, noise=0.01, draw=0.004, slopes=SLOPES))


def test_what_was_planted_is_told(planted: StudyResults) -> None:
    found = told(planted)
    assert {text: one.verdict for text, (one,) in found.items()} == {
        "A mix keeps more than the best single source": "holds",
        "A mix keeps more than single sources do on the whole": "holds",
        "IGSP keeps more than the best single source": "holds",
        "IGSP keeps more than Self-Cal": "cannot be told",
        "IGSP keeps more than SGS": "holds",
        "A mix keeps more than IGSP": "holds",
        "Dimensions are far apart where the total is close": "holds",
        "A metric of the text raises one dimension and lowers another": "holds",
        "The same among texts of one kind": "holds",
    }  # fmt: skip
    (one,) = found["A mix keeps more than IGSP"]
    assert (one.where, one.way) == ("SparseGPT 60%", "SparseGPT 60%")
    assert one.because.startswith("mix-8 over igsp +")
    assert one.because.endswith("draws mix-8 3, igsp 3")
    (one,) = found["A mix keeps more than single sources do on the whole"]
    assert one.because.startswith("mix-8 +")
    assert one.because.endswith("; draws mix-8 3")


def test_the_opposite_and_a_part_of_it_are_told() -> None:
    lifts = {"igsp": ("igsp", -0.2), "mixed": ("self-cal", 0.2), "mix-a": ("mix", 0.2),
             "mix-b": ("mix", -0.2)}  # fmt: skip
    found = told(study(Plan(others=lifts, noise=0.01, draw=0.004)))
    (one,) = found["IGSP keeps more than Self-Cal"]
    assert one.verdict == "does not hold"
    assert one.because.startswith("igsp over mixed −")
    (one,) = found["A mix keeps more than single sources do on the whole"]
    assert one.verdict == "holds in part"
    assert one.because.endswith("; draws mix-a 3, mix-b 3")
    (one,) = found["A mix keeps more than IGSP"]  # the sets stand the other way round in the study
    assert one.because.startswith("mix-a over igsp +")


def test_a_lead_from_the_benchmarks_themselves_is_told_apart(planted: StudyResults) -> None:
    halves = tuple(
        one.model_copy(update={"halves": ("code_a",)}) if one.strategy == "mix" else one
        for one in planted.trials
    )
    results = planted.model_copy(update={"trials": halves})
    found = told(results)
    (one,) = found["The same on the benchmarks that the mix holds no text of"]
    assert one.verdict == "holds"
    assert one.because.startswith("mix-8 over igsp +")
    assert found["The same on the benchmarks that neither holds text of"]
    without = told(planted)
    apart = {"The same on the benchmarks that the mix holds no text of",
             "The same on the benchmarks that neither holds text of"}  # fmt: skip
    assert not apart & set(without)
    assert {text: one for text, one in found.items() if text not in apart} == without
    page = pages(results, analyse(results, SETTINGS))["report.html"]
    assert "total on other benchmarks" in page


def test_one_draw_each_leaves_draws_aside_and_few_sources_leave_signs_open() -> None:
    one_draw = Plan(others=LIFTS, seeds=(0,), sources=("a", "b", "c", "d"))
    found = told(study(one_draw))
    assert found["IGSP keeps more than SGS"][0].because.endswith("; other draws left aside")
    (signs,) = found["A metric of the text raises one dimension and lowers another"]
    assert (signs.verdict, signs.because[-9:]) == ("cannot be told", "4 sources")
    noise = told(study(Plan(noise=0.05)))
    (signs,) = noise["A metric of the text raises one dimension and lowers another"]
    assert signs.verdict == "not found"
    assert "A mix keeps more than the best single source" not in noise


def test_a_default_and_sparsities_have_their_claims(planted: StudyResults) -> None:
    assert verdicts(planted, default="news")["A mix keeps more than news"] == "holds"
    pairs = [("sparsegpt", "30%"), ("sparsegpt", "60%")]
    for lift, verdict in ((0.2, "holds"), (0.0, "cannot be told")):
        plan = Plan(conditions=pairs, others={"mix-8": ("mix", lift)}, noise=0.0, draw=0.005)
        (one,) = told(study(plan))["The lead of a mix grows with sparsity"]
        assert (one.where, one.way, one.verdict) == ("SparseGPT", "SparseGPT 60%", verdict)
        assert one.because.startswith("30 % to 60 %: mix-8 ")


def test_they_fit_a_terminal_and_stand_on_the_page(planted: StudyResults) -> None:
    wide = Claim("x" * 70, (Told("m", "w", "a" * 30, "b", "c " * 90),) * 2)
    made = [*claims(analyse(planted, SETTINGS)), wide]
    lines = claims_text(made).splitlines()
    assert lines[0] == "The claims"
    assert max(map(len, lines)) <= 80
    few = study(Plan(sources=("a", "b"), seeds=(0,), others=LIFTS, dimensions=("code", "math")))
    texts = pages(few, analyse(few, Settings(permutations=99, resamples=20)))
    page = texts["report.html"]
    assert "<h2>The claims</h2>" in page
    assert page.count(">A mix keeps more than IGSP</td>") == 1
    assert '<b class="strong">holds</b>' in page
    assert "<b>does not hold</b>" in page
    assert "At a glance" not in page
    assert "The claims" in texts["summary.txt"]


def test_models_stand_side_by_side() -> None:
    pairs = [("sparsegpt", "30%"), ("sparsegpt", "60%")]
    one = study(Plan(sources=("a", "b"), conditions=pairs, others=LIFTS, noise=0.0, draw=0.005))
    more = [
        trial.model_copy(update={"model": "other", "id": f"other-{trial.id}"})
        for trial in one.trials if trial.pattern == "60%"
    ]  # fmt: skip
    both = study(Plan(), trials=(*one.trials, *more), planned=len(one.trials) + len(more))
    found = analyse(both, SETTINGS)
    made = {claim.text: claim for claim in claims(found)}
    claim = made["IGSP keeps more than SGS"]
    first = one.trials[0].model
    ways = ["SparseGPT 30%", "SparseGPT 60%", "SparseGPT 60%"]
    assert [(told.way, told.model) for told in claim.told] == list(
        zip(ways, (first, first, "other"), strict=True)
    )
    assert claim.tally == "holds in 3 of 3"
    (grown,) = made["The lead of a mix grows with sparsity"].told
    assert (grown.way, grown.model, made["The lead of a mix grows with sparsity"].tally) == (
        "SparseGPT 60%", first, ""
    )  # fmt: skip
    section = claims_section(summarise(found))
    glance, figures = section.split("<table>")[1:3]
    heads = re.findall(r'<button type="button">([^<]*)</button>', glance)
    assert heads == ["claim", "SparseGPT 30%", "SparseGPT 60%"]
    assert re.findall(r'<button type="button">([^<]*)</button>', figures) == [
        "claim", "where", first, "other",
    ]  # fmt: skip
    row = glance[glance.index("IGSP keeps more than SGS</td>") :].split("</tr>")[0]
    at_30, at_60 = row.split("<td")[1:]
    assert (at_30.count("✓"), at_30.count('<span class="mark"></span>')) == (1, 1)
    assert at_60.count("✓") == 2
    assert f"{first} and other, in this order" in section
