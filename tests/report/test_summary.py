"""The summary says what the analysis holds, and what it does not."""

from __future__ import annotations

from calmix.analysis import Settings, analyse
from calmix.analysis.ranking import leaders
from calmix.report import summarise
from calmix.report.summary import MANY, Summary
from calmix.study.results import StudyResults
from tests.synthetic import SLOPES, Plan, failed, full_plan, study, trial

QUICK = Settings(permutations=1999, resamples=200)


def of(results: StudyResults) -> Summary:
    return summarise(analyse(results, QUICK))


def test_a_trade_off_is_told_with_both_its_signs() -> None:
    told = of(study(Plan(slopes=SLOPES, noise=0.02))).conditions[0]
    line, within = [line for line in told.found if "Opposite-sign" in line]
    assert within.startswith("Opposite-sign trade-off within kinds of text: ")
    assert "higher a text's perplexity, the more of general (ρ +0." in line
    assert "the less of code (ρ −0." in line
    assert "An opposite-sign trade-off was found" in told.brief


def test_noise_is_said_to_hold_no_trade_off() -> None:
    told = of(study(Plan(noise=0.05))).conditions[0]
    assert not any("rade-off" in line for line in told.found)
    assert any(line.startswith("No opposite-sign trade-off") for line in told.not_found)
    assert any(line.startswith("No correlation survives correction; the nearest is ")
               for line in told.not_found)  # fmt: skip


def test_mixes_are_told_against_the_best_and_the_mean_source() -> None:
    lifts = {"mix-8": ("mix", 0.2), "self-cal": ("self-cal", -0.2)}
    told = of(study(Plan(others=lifts, noise=0.01, draw=0.002))).conditions[0]
    text = "\n".join(told.found)
    assert "mix-8 (+" in text
    assert "keeps more in total than the best single source" in text
    assert "self-cal (−" in text
    assert "keeps less in total than the mean of the single sources" in text


def test_whether_kl_could_stand_in_for_the_benchmarks_is_told() -> None:
    results = study(Plan())
    told = of(results).conditions[0]
    assert any("the higher the total retention, over 16 sets (ρ −1.00" in line
               for line in told.found)  # fmt: skip
    for number, one in enumerate(results.trials):
        distance = {**(one.distance or {}), "total": {"kl_mean": number % 7, "top1": 0.5}}
        trials = list(results.trials)
        trials[number] = one.model_copy(update={"distance": distance})
        results = results.model_copy(update={"trials": tuple(trials)})
    told = of(results).conditions[0]
    assert any("does not give the order by total retention" in line for line in told.not_found)


def test_a_lead_of_one_draw_each_is_not_said_to_hold_for_others() -> None:
    lifts = {"mix-8": ("mix", 0.2)}
    for seeds, end in (((0,), "single sources, other draws left aside."), ((0, 1), "sources.")):
        told = of(study(Plan(others=lifts, noise=0.01, draw=0.002, seeds=seeds))).conditions[0]
        [line] = [line for line in told.found if "than the mean of the" in line]
        assert line.endswith(end)


def test_equal_sets_are_not_told_apart() -> None:
    lifts = {"mix-8": ("mix", 0.0)}
    told = of(study(Plan(others=lifts, noise=0.0, draw=0.02))).conditions[0]
    text = "\n".join(told.not_found)
    assert " are tied (" in text
    assert "that survives correction from the mean of the single sources" in text
    assert "One trial a source does not tell the sources apart" in text


def test_growth_with_sparsity_is_found_or_not() -> None:
    pairs = [("sparsegpt", "30%"), ("sparsegpt", "60%")]
    lifts = {"mix-8": ("mix", 0.2), "igsp": ("igsp", 0.0)}
    told = of(study(Plan(conditions=pairs, others=lifts, noise=0.0, draw=0.005))).across
    assert "mix-8 +" in told.found[0]
    assert "from 30 % to 60 % sparsity" in told.found[0]
    assert "igsp" in told.not_found[0]


def test_an_unfinished_study_is_told_to_be_one() -> None:
    whole = study(full_plan())
    part = whole.model_copy(update={"trials": whole.trials[:50], "failed": (failed("x"),)})
    told = of(part)
    assert told.certainty[0].startswith("50 of 198 planned trials finished, 1 failed, 147")
    assert not any("  " in line for line in told.certainty)
    assert any("cell" in line and "empty" in line for line in told.certainty)
    assert "still to come" not in " ".join(of(whole).certainty)


def test_what_was_drawn_once_is_named_without_its_model_where_all_were() -> None:
    pairs = [("sparsegpt", "50%"), ("sparsegpt", "60%")]
    one = study(Plan(sources=("a", "b", "c", "d"), conditions=pairs, seeds=(0, 1)))
    both = [
        trial.model_copy(update={"model": model, "id": f"{model}-{trial.id}"})
        for model in ("this", "that") for trial in one.trials
    ]  # fmt: skip
    for kept, name in ((("this", "that"), "SparseGPT 50%"), (("this",), "SparseGPT 50%, this")):
        left = [
            trial for trial in both
            if (trial.seed, trial.pattern) != (1, "50%") or trial.model not in kept
        ]  # fmt: skip
        told = of(study(Plan(), trials=tuple(left), planned=len(left)))
        assert [line.split(": ")[0] for line in told.certainty if "drawn once" in line] == [name]


def test_little_is_told_of_little() -> None:
    alone = of(study(Plan(sources=("a",), seeds=(0,))))
    assert "nothing can be compared" in alone.headline
    assert alone.conditions[0].found == ()
    assert any("drawn once" in line for line in alone.certainty)
    assert not any("cause" in line for line in alone.certainty)
    two = of(study(Plan(sources=("a", "b"), seeds=(0,))))
    assert any("cannot be told" in line for line in two.certainty)
    assert any("no metric can be correlated" in line for line in two.conditions[0].not_found)
    five = of(study(Plan(sources=("a", "b", "c", "d", "e"), seeds=(0,))))
    tests = "tests (sources) have it at once"
    assert any("no p below 0.017" in line and tests in line for line in five.certainty)
    assert any(
        "on other items, other draws left aside" in line for line in five.conditions[0].found
    )
    assert not any("have it at once" in line for line in of(study(Plan())).certainty)
    four = of(study(Plan(sources=("a", "b", "c", "d"), seeds=(0, 1))))
    assert any("no correlation could have been found" in line for line in four.certainty)
    silent = trial("a", "single", "sparsegpt", "60%", 0, {"general": None})
    assert "no task of the suite has signal" in of(study(Plan(), trials=(silent,))).headline


def test_the_table_comes_before_the_sentences() -> None:
    told = of(study(full_plan(conditions=[("wanda", "50%")])))
    text = told.text()
    assert text.index("shrunken") < text.index("Wanda 50%: found")
    assert told.conditions[0].table[-1] == "  and 14 more"


def test_what_holds_on_these_items_alone_is_said_to() -> None:
    """Small differences, hardly any spread over draws: it is the items that leave them open."""
    lifts = {"mix-8": ("mix", 0.012)}
    told = of(study(Plan(others=lifts, noise=0.0, draw=0.002))).conditions[0]
    assert any("on these items only" in line and "mix-8 (+" in line for line in told.not_found)


def test_the_text_has_every_sentence() -> None:
    told = of(study(full_plan()))
    text = " ".join(told.text().split())
    assert max(map(len, told.text().splitlines())) <= 80
    for each in (*told.conditions, told.across, told.methods):
        for line in (*each.found, *each.not_found):
            assert line in text
    assert all(line in text for line in told.certainty)


def test_a_terminal_is_told_what_many_conditions_say_together() -> None:
    few = of(study(full_plan()))
    assert len(few.conditions) < MANY
    assert few.short() == few.text()
    pairs = [("sparsegpt", f"{share}%") for share in (30, 40, 50, 60)] + [("wanda", "60%")]
    found = analyse(study(full_plan(conditions=pairs)), QUICK)
    told = summarise(found)
    assert len(told.conditions) == MANY + 1
    lines = told.short().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 0.4 * len(told.text().splitlines())
    text = " ".join(told.short().split())
    for each in found.conditions:
        (row,) = [line for line in lines if line.startswith(f"  {each.condition.label}  ")]
        assert row.split()[2] == leaders(each.ranking)[0].calibration
    assert all(f"{claim.text}: {claim.tally}" in text for claim in told.claims if claim.tally)
    assert all(line in text for line in (*told.across.found, *told.certainty))
    assert not any(line in text for each in told.conditions for line in each.found)
