"""The page to pass on: plain words, what can be drawn, nothing that the study does not hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calmix.analysis import Analysis, Settings, analyse
from calmix.analysis.cells import TOTAL
from calmix.report import summarise
from calmix.report.brief import BEST, MEAN, MIXED, WORST, WROTE, bars, brief, brief_figures
from calmix.study.results import StudyResults
from tests.browser import WIDTHS, Page, needs_chromium, readable
from tests.synthetic import Plan, study

LIFTS = {"mix-4": ("mix", 0.1), "mix-8": ("mix", 0.2), "igsp": ("igsp", 0.15),
         "sgs": ("sgs", 0.0)}  # fmt: skip
CONDITIONS = [("sparsegpt", "50%"), ("sparsegpt", "60%"), ("admm", "60%")]
SOURCES = ("a", "b", "c", "d")


def two_models() -> StudyResults:
    one = study(Plan(sources=SOURCES, conditions=CONDITIONS, others=LIFTS, seeds=(0,)))
    more = [
        trial.model_copy(update={"model": "other", "id": f"other-{trial.id}"})
        for trial in one.trials
    ]
    return study(Plan(), trials=(*one.trials, *more), planned=2 * len(more))


def of(results: StudyResults) -> tuple[Analysis, str]:
    found = analyse(results, Settings(permutations=99, resamples=50))
    return found, brief(results, found, summarise(found))


@pytest.fixture(scope="module")
def made() -> tuple[Analysis, str]:
    return of(two_models())


def test_what_stands_for_a_kind_is_its_best_and_its_worst_source(
    made: tuple[Analysis, str],
) -> None:
    found = made[0].conditions[0]
    told = {bar.kind: bar for bar in bars(found)}
    assert list(told) == [MIXED, WROTE, BEST, MEAN, WORST]
    assert (told[MIXED].name, told[WROTE].name) == ("mix-8", "igsp")
    singles = [one for one in found.ranking if one.strategy == "single"]
    assert told[BEST].kept == singles[0].shrunken
    assert told[WORST].kept == singles[-1].total
    mean = sum(one.total.value or 0 for one in singles) / len(singles)
    assert told[MEAN].kept.value == pytest.approx(mean)
    low, high = told[MEAN].kept.low, told[MEAN].kept.high
    assert low is not None
    assert high is not None
    assert low < mean < high


def test_what_holds_items_of_a_benchmark_is_starred(made: tuple[Analysis, str]) -> None:
    assert "other items of benchmarks" not in made[1]
    whole = two_models()
    some = tuple(
        one.model_copy(update={"halves": ("code_a",)}) if one.calibration == "mix-8" else one
        for one in whole.trials
    )
    found, page = of(whole.model_copy(update={"trials": some}))
    assert "* holds other items of benchmarks that are scored here." in page
    drawn = brief_figures(found)[0]
    labels = [tick.get_text() for axes in drawn.draw(False).axes for tick in axes.get_yticklabels()]
    assert [one for one in labels if "*" in one] == [f"{MIXED} (mix-8*)"] * 2


def test_a_line_is_about_the_same_single_sources_throughout() -> None:
    pairs = [("sparsegpt", "50%"), ("sparsegpt", "60%")]
    whole = study(Plan(sources=SOURCES, conditions=pairs, others=LIFTS, seeds=(0,), noise=0.0))
    left = [one for one in whole.trials if (one.pattern, one.calibration) != ("50%", "a")]
    fewer = study(Plan(), trials=tuple(left), planned=len(left))
    found, page = of(fewer)
    line = page[page.index("brief-sparser-title") :]
    (told,) = re.findall(rf"{MEAN}: ([^<]*) %<", line[: line.index("</figure>")])
    at_60 = next(one for one in found.conditions if one.condition.pattern == "60%")
    few = {bar.kind: bar for bar in bars(at_60, {"b", "c", "d"})}[MEAN].kept
    every = {bar.kind: bar for bar in bars(at_60)}[MEAN].kept
    assert f"60 {100 * (few.value or 0):.1f} [" in told
    assert f"{few.value:.3f}" != f"{every.value:.3f}"


def test_methods_stand_in_one_order_for_all_models() -> None:
    """By what sets that were run with all of them keep, whatever else one was run with."""
    whole = two_models()
    for missing in ("admm", "sparsegpt"):
        left = [
            one for one in whole.trials
            if (one.model, one.method) != ("other", missing) or one.calibration in SOURCES
        ]  # fmt: skip
        found, page = of(study(Plan(), trials=tuple(left), planned=len(left)))
        kept: dict[str, list[float]] = {"SparseGPT": [], "ADMM": []}
        for each in found.conditions:
            common = SOURCES if each.condition.model == "other" else (*SOURCES, *LIFTS)
            if each.condition.pattern == "60%":
                kept[each.condition.label.split()[0]] += [
                    one.total.value or 0 for one in each.ranking if one.calibration in common
                ]
        line = page[page.index("brief-better-title") :]
        told = re.findall(rf", {MEAN}: ([^<]*) %<", line[: line.index("</figure>")])
        assert len(told) == 2
        for values in told:
            order = [value.split()[0] for value in values.split(" %, ")]
            assert order == sorted(kept, key=lambda way: sum(kept[way])), values


def test_it_says_first_what_is_left_without_terms(made: tuple[Analysis, str]) -> None:
    found, page = made
    lead = page[page.index('<p class="lead">') : page.index("</header>")]
    for model in ("builtin:smollm2-135m", "other"):
        top = next(
            each for each in found.conditions
            if each.condition.model == model and each.condition.label.startswith("SparseGPT 60%")
        ).ranking[0]  # fmt: skip
        assert f"With 60\N{NO-BREAK SPACE}% of its weights set to zero, {model} keeps" in lead
        assert f"{100 * (top.total.value or 0):.1f}\N{NO-BREAK SPACE}% on a mix of sources" in lead
    assert not re.search(r"retention|rho|SparseGPT|shrunken|bootstrap|p-value", lead, re.I)


def test_five_figures_of_both_models_and_all_the_claims(made: tuple[Analysis, str]) -> None:
    found, page = made
    names = re.findall(r'aria-labelledby="([\w-]+)-title', page)
    assert names == [f"brief-{name}" for name in
                     ("left", "abilities", "sparser", "better", "distance")]  # fmt: skip
    for claim in summarise(found).claims:
        assert f">{claim.text}</td>" in page
    assert "nan" not in page.lower().split()
    links = re.findall(r'(?:src|href)="([^"#]*)"', page)
    assert set(links) <= {"report.html", "data:,"}
    assert len(page) < 200_000
    assert "planned runs" not in page


def test_what_a_study_does_not_have_is_left_out() -> None:
    _, page = of(study(Plan(sources=SOURCES[:1], seeds=(0,))))
    assert "<figure>" not in page
    assert "The claims" not in page
    few = study(Plan(sources=SOURCES, seeds=(0,), others={"mix-8": ("mix", 0.2)}), planned=99)
    _, page = of(few)
    names = re.findall(r'aria-labelledby="brief-(\w+)-title', page)
    assert names == ["left", "abilities", "distance"]
    assert "5 of 99 planned runs are done" in page
    assert WROTE not in page
    far = [one.model_copy(update={"distance": None}) for one in few.trials]
    _, page = of(few.model_copy(update={"trials": tuple(far)}))
    assert re.findall(r'aria-labelledby="brief-(\w+)-title', page) == ["left", "abilities"]


def test_how_much_text_is_enough() -> None:
    lifts = {"mix-8": ("mix", 0.2), "igsp": ("igsp", 0.15)}
    plans = [
        Plan(sources=SOURCES, seeds=(0,), others={**lifts, "mix-8": ("mix", mix)})
        for mix in (0.1, 0.2, 0.201)
    ]
    trials = [
        trial.model_copy(update={"rows": rows, "id": f"{rows}-{trial.id}"})
        for rows, plan in zip((8, 16, 32), plans, strict=True)
        for trial in study(plan).trials
    ]
    _, page = of(study(Plan(), trials=tuple(trials), planned=len(trials)))
    names = re.findall(r'aria-labelledby="brief-([\w]+)-title', page)
    assert names == ["left", "abilities", "more", "distance"]
    assert f"{MIXED}, 16 rows" in page
    assert f"{WROTE}, 8 rows" in page


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS[:1] + WIDTHS[-1:])
def test_it_is_readable(page: Page, made: tuple[Analysis, str], tmp_path: Path, width: int) -> None:
    (tmp_path / "brief.html").write_text(made[1], encoding="utf-8")
    page.open(tmp_path / "brief.html", width=width)
    readable(page, width, figures=5, texts=100)
    assert TOTAL in made[1]
