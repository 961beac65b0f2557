"""Which set is best: one answer wherever it is asked, and a tie is never told as a win."""

from __future__ import annotations

from typing import Any

import pytest

from calmix.analysis import Settings, analyse, recommend
from calmix.analysis.ranking import leaders
from calmix.report import pages, summarise, words
from calmix.study.results import StudyResults
from tests.synthetic import OTHERS, Plan, save, study, trial

QUICK = Settings(permutations=199, resamples=200)


def made(kept: dict[str, float], seeds: tuple[int, ...] = (0,), **changes: Any) -> StudyResults:
    """Return results of sets with a retention each, in both dimensions."""
    trials = tuple(
        trial(name, "single", "sparsegpt", "60%", seed,
              {"general": value + 0.002 * seed, "code": value - 0.002 * seed}, **changes)
        for name, value in kept.items() for seed in seeds
    )  # fmt: skip
    return study(Plan(), trials=trials)


def answers(results: StudyResults, **asked: Any) -> list[list[str]]:
    """Return the best sets of every condition, after having looked for another answer."""
    found = analyse(results, QUICK, **asked)
    summary, texts = summarise(found), pages(results, found)
    best = []
    for each, told, advice in zip(
        found.conditions, summary.conditions, recommend(results, resamples=200, **asked),
        strict=True,
    ):  # fmt: skip
        sets = leaders(each.ranking)
        best.append([one.calibration for one in sets])
        assert tuple(best[-1]) == advice.best
        known = [one for one in each.ranking if one.total.value is not None]
        for one, other in zip(known, advice.candidates, strict=True):
            assert (one.calibration, one.total, one.shrunken, one.best, one.behind) == (
                other.calibration, other.total, other.shrunken, other.best, other.behind,
            )  # fmt: skip
        sentence = words.which_is_best(each.ranking)
        assert sentence in told.brief
        assert (sentence + "." in told.found, sentence + "." in told.not_found) == (
            len(sets) == 1, len(sets) > 1,
        )  # fmt: skip
        assert ("keeps the most" in sentence) == (len(sets) == 1)
        if each is found.conditions[0]:  # the main one here
            assert sentence in summary.headline
            for name in ("report.html", "brief.html"):
                lead = texts[name].split('<p class="lead">')[1].split("</p>")[0]
                assert sentence in lead.replace(words.HOLD, " ")
            assert ("tied for the best total" in texts["report.html"]) == (len(sets) > 1)
    return best


def test_sets_drawn_to_one_mean_stand_by_what_was_measured() -> None:
    """All that is expected of them is the same: the study's order decides nothing."""
    assert answers(made({"lower": 0.600, "higher": 0.604})) == [["higher", "lower"]]


def test_a_near_tie_is_one_and_a_clear_lead_is_none() -> None:
    kept = {"bad": 0.3, "worse": 0.2, "near": 0.70, "top": 0.71}
    assert answers(made(kept, (0, 1))) == [["top", "near"]]
    assert answers(made(kept | {"top": 0.9}, (0, 1))) == [["top"]]


def test_a_part_of_a_study_has_the_answer_of_the_whole() -> None:
    plan = Plan(conditions=(("sparsegpt", "50%"), ("sparsegpt", "60%")), others=OTHERS, seed=3)
    results = study(plan)
    extra = trial("once", "mix", "sparsegpt", "50%", 7, dict.fromkeys(plan.dimensions, 0.8))
    results = study(plan, trials=(*results.trials, extra))
    for at, sparsity in enumerate(("50%", "60%")):
        whole, part = analyse(results, QUICK), analyse(results, QUICK, sparsity=sparsity)
        assert whole.conditions[at].ranking == part.conditions[0].ranking
        assert recommend(results, sparsity=sparsity)[0] == recommend(results)[at]


def test_a_dimension_without_signal_is_left_out_of_both_answers() -> None:
    """One model has no signal in code, the other has: each is judged by what it can show."""
    quiet = [
        trial(name, "single", "sparsegpt", "60%", 0, {"general": value, "code": None},
              model="quiet", id=f"quiet-{name}")
        for name, value in (("a", 0.2), ("b", 0.9))
    ]  # fmt: skip
    results = made({"a": 0.9, "b": 0.2})
    results = study(Plan(), trials=(*results.trials, *quiet))
    assert sorted(answers(results)) == [["a"], ["b"]]


@pytest.mark.parametrize("weights", [(), ("--weights", "general=1,code=1")])
def test_recommend_says_a_tie(calmix: Any, tmp_path: Any, weights: tuple[str, ...]) -> None:
    folder = save(made({"lower": 0.600, "higher": 0.604}), tmp_path / "tied")
    text = " ".join(calmix("study", "recommend", folder, *weights).out.split())
    assert "take higher or another that is tied: expect " in text
    assert "higher and lower are tied (" in text
    assert "keeps the most" not in text
