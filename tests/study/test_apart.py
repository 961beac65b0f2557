"""Draws added until sets are apart: what is asked for, and that a store keeps and resumes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calmix.capability.measures import Z
from calmix.errors import InputError
from calmix.study import bench as bench_module
from calmix.study import load_study, read_results, run_study
from calmix.study.apart import Standing, run_until_apart
from calmix.study.bench import Bench
from calmix.study.results import Interval, Trial
from calmix.study.store import open_store
from calmix.study.trials import extended, plan
from tests.study.test_running import Recorder

Write = Callable[..., Path]

# Totals of each set's draws, in place of what the tiny model keeps: code is best, mix as good
# within 2 points, letters far behind.
TOTALS = {
    "letters": [0.60, 0.61, 0.59, 0.60, 0.61, 0.59, 0.6, 0.6],
    "code": [0.71, 0.70, 0.70, 0.71, 0.70, 0.71, 0.7, 0.71],
    "mix": [0.69, 0.70, 0.70, 0.69, 0.70, 0.70, 0.69, 0.7],
}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials find TOTALS; return the labels of those that ran, in order."""
    ran: list[str] = []
    real = bench_module.describe

    def describe(trial: Any, *rest: Any) -> Trial:
        ran.append(trial.planned.label)
        value = TOTALS[trial.planned.calibration][trial.planned.seed]
        return real(trial, *rest).model_copy(update={"total": Interval(value=value)})

    monkeypatch.setattr(bench_module, "describe", describe)
    return ran


def apart(
    path: Path, store: Path, points: float = 2.0, **options: Any
) -> tuple[Recorder, list[Standing]]:
    seen = Recorder()
    _, _, standings = run_until_apart(load_study(path), store, seen, points=points, **options)
    return seen, standings


@pytest.fixture
def two_draws(tiny_study: Write) -> Path:
    return tiny_study((', wanda: ["2:4"]', ""), more="seeds: [0, 1]\n")


def test_draws_are_added_where_sets_are_not_apart(
    two_draws: Path, tmp_path: Path, made_up: list[str]
) -> None:
    store = tmp_path / "store"
    seen, (standing,) = apart(two_draws, store, most=5)
    added = made_up[6:]
    # Letters are found behind at once. Code and mix go on, and take the seeds that come next.
    assert not [label for label in added if label.startswith("letters")]
    assert added[:2] == ["code sparsegpt 60% seed 2", "mix sparsegpt 60% seed 2"]
    notes = [note for note in seen.notes if note.startswith("one more draw")]
    assert len(notes) == len(added)
    assert notes[1].startswith(
        "one more draw, mix sparsegpt 60% seed 2: code is ahead of mix by 1.0 points ["
    )
    assert (standing.best, standing.looks) == ("code", 4)
    assert standing.look == 1 + len(added) / 2
    pairs = {(p.ahead, p.behind): p.state for p in standing.pairs}
    assert pairs == {("code", "letters"): "apart", ("code", "mix"): "equal"}
    assert standing.draws == {
        "letters": 2,
        "code": 2 + len(added) // 2,
        "mix": standing.draws["code"],
    }
    assert standing.line == (
        f"sparsegpt 60%, look {standing.look} of 4: best code; behind it: letters; "
        "equal within 2 points: mix"
    )


def test_the_interval_is_corrected_for_the_looks(
    two_draws: Path, tmp_path: Path, made_up: list[str]
) -> None:
    store = tmp_path / "store"
    run_study(load_study(two_draws), store, Recorder())
    plain = apart(two_draws, store, points=50, most=3)[1][0].pairs[0]
    again = apart(two_draws, tmp_path / "other", points=50, most=8)[1][0].pairs[0]
    assert plain.value == again.value
    assert plain.low is not None
    assert again.low is not None
    assert again.low < plain.low < plain.value - Z * 0.01 / 2**0.5
    assert len(made_up) == 12  # within 50 points everything is equal: nothing is added


def test_what_was_added_is_part_of_the_study_in_its_store(
    two_draws: Path, tmp_path: Path, made_up: list[str], calmix: Callable[..., Any]
) -> None:
    store = tmp_path / "store"
    apart(two_draws, store, most=5)
    count, results = len(made_up), read_results(store)
    assert results.planned == len(results.trials) == count > 6
    assert [t.seed for t in results.trials if t.calibration == "mix"] == list(
        range((count - 2) // 2)
    )
    seen = Recorder()
    run_study(load_study(two_draws), store, seen)
    assert (seen.todo, seen.planned, len(made_up)) == (0, count, count)
    assert apart(two_draws, store)[1] == apart(two_draws, store, most=5)[1]
    assert len(made_up) == count
    told = json.loads(calmix("study", "status", store, "--json").out)
    assert (told["finished"], told["pending"]) == (count, 0)
    # A study file that asks for an added draw itself has it already.
    text = two_draws.read_text().replace("seeds: [0, 1]", "seeds: [0, 1, 2]")
    two_draws.write_text(text)
    run_study(load_study(two_draws), store, seen)
    assert made_up[count:] == ["letters sparsegpt 60% seed 2"]


@pytest.mark.parametrize(
    "stop", [8, *(pytest.param(stop, marks=pytest.mark.long) for stop in (6, 7, 9, 10))]
)
def test_stopped_anywhere_it_goes_on_to_the_same_decisions(
    two_draws: Path, tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole, store = tmp_path / "whole", tmp_path / "store"
    undisturbed, standings = apart(two_draws, whole, most=5)
    real, calls = Bench.run, [0]

    def run(self: Bench, *rest: Any) -> Trial:
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(Bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        apart(two_draws, store, most=5)
    seen, again = apart(two_draws, store, most=5)
    assert again == standings
    assert seen.notes == [] or seen.notes == undisturbed.notes[-len(seen.notes) :]
    for key in ("added", "looks"):
        assert open_store(store).index[key] == open_store(whole).index[key]
    for name in ("results.csv", "results.parquet"):
        assert (store / name).read_bytes() == (whole / name).read_bytes()


def test_a_plain_run_takes_up_draws_that_were_asked_for(
    two_draws: Path, tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    real = Bench.run

    def run(self: Bench, trial: Any, *rest: Any) -> Trial:
        if trial.planned.seed == 2:
            raise KeyboardInterrupt
        return real(self, trial, *rest)

    monkeypatch.setattr(Bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        apart(two_draws, store)
    monkeypatch.setattr(Bench, "run", real)
    seen = Recorder()
    run_study(load_study(two_draws), store, seen)
    assert made_up[6:] == ["code sparsegpt 60% seed 2", "mix sparsegpt 60% seed 2"]
    assert seen.planned == 8


def test_single_draws_are_doubled_first(
    tiny_study: Write, tmp_path: Path, made_up: list[str]
) -> None:
    seen, _ = apart(tiny_study(), tmp_path / "store", most=2)
    assert len(made_up) == 12
    said = [note for note in seen.notes if note.startswith("one more draw, letters wanda 2:4")]
    (note,) = said
    assert note.endswith("code is ahead of letters by 11.0 points, and no set has two draws")


def test_only_chosen_sets_are_looked_at(
    tiny_study: Write, tmp_path: Path, made_up: list[str]
) -> None:
    path = tiny_study(more="seeds: [0, 1]\n")
    _, standings = apart(path, tmp_path / "store", only=["mix *60%*", "code *60%*"], most=3)
    (standing,) = standings
    assert set(standing.draws) == {"code", "mix"}
    assert not [label for label in made_up if "wanda" in label or "letters" in label]
    # A pattern that leaves out a set's other draws leaves nothing to look at.
    seen, none = apart(path, tmp_path / "other", only=["* seed 0"])
    assert none == []
    assert "sparsegpt 60%: not looked at, 3 trials are left to run" in seen.notes


def test_failed_draws_are_left_out(
    two_draws: Path, tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bench.run

    def run(self: Bench, trial: Any, *rest: Any) -> Trial:
        if trial.planned.calibration == "mix" and trial.planned.seed > 1:
            raise RuntimeError("no")
        return real(self, trial, *rest)

    monkeypatch.setattr(Bench, "run", run)
    seen, (standing,) = apart(two_draws, tmp_path / "store", points=0.5, most=4)
    assert standing.draws["mix"] == 2
    assert set(seen.errors) == {"mix sparsegpt 60% seed 2", "mix sparsegpt 60% seed 3"}


def test_a_saved_set_has_no_other_draws(
    tiny_study: Write, tmp_path: Path, calmix: Callable[..., Any], made_up: list[str]
) -> None:
    saved = tmp_path / "saved"
    text = tmp_path / "texts" / "code.jsonl"
    model = load_study(tiny_study()).models["tiny"].name
    made = calmix("calibrate", text, "--model", model, "--rows", 6, "--length", 32,
                  "--leakage", "off", "-o", saved)  # fmt: skip
    assert made.code == 0, made.err
    path = tiny_study((f"{tmp_path}/texts/code.jsonl\n", f"{saved}\n"))
    trial = next(t for t in plan(load_study(path)) if t.calibration == "code")
    assert not trial.redrawable
    assert extended([trial], [(trial.condition, "code", 3)]) == [trial]


def test_mistakes_are_one_line(
    two_draws: Path, tmp_path: Path, made_up: list[str], calmix: Callable[..., Any]
) -> None:
    store = tmp_path / "store"
    ended = calmix("study", "run", two_draws, "-o", store, "--until-apart", 2, "--most-draws", 4)
    assert ended.code == 0
    assert "sparsegpt 60%, look " in ended.out
    assert "one more draw, code" in ended.err
    told = json.loads(
        calmix("study", "run", two_draws, "-o", store, "--until-apart", 2, "--json").out
    )
    assert told["apart"][0]["best"] == "code"
    single = tmp_path / "one.yaml"
    lines = two_draws.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("  letters", "  mix"))]
    single.write_text("\n".join(kept), encoding="utf-8")
    new = tmp_path / "new"
    cases = [
        (
            (two_draws, "-o", store, "--until-apart", 2, "--most-draws", 5),
            "with --most-draws 4, over",
        ),
        ((two_draws, "-o", new, "--until-apart", 2, "--most-draws", 2), "asks for 2 draws a set"),
        ((two_draws, "-o", new, "--until-apart", 0), "between 0 and 100, not 0"),
        ((two_draws, "-o", new, "--until-apart", "nan"), "between 0 and 100, not nan"),
        ((two_draws, "-o", new, "--most-draws", 5), "no effect without --until-apart"),
        ((single, "-o", new, "--until-apart", 2), "no two calibration sets"),
    ]
    for arguments, words in cases:
        ended = calmix("study", "run", *arguments)
        assert ended.code == 2, arguments
        assert words in ended.line, (arguments, ended.line)
    assert not new.exists()


def test_an_added_draw_of_a_set_that_is_gone_is_refused(
    two_draws: Path, tmp_path: Path, made_up: list[str]
) -> None:
    store = tmp_path / "store"
    apart(two_draws, store, most=4)
    two_draws.write_text(two_draws.read_text().replace("  mix:", "  other:"))
    # What the study file asks for has another name now; the added draw knows the former one.
    with pytest.raises(InputError, match="no longer asks for 'mix sparsegpt 60% seed 2'"):
        run_study(load_study(two_draws), store, Recorder())


def test_sets_without_a_total_are_told_and_get_no_draws(
    two_draws: Path, tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("letters", "mix"):
        monkeypatch.setitem(TOTALS, name, [None] * 8)  # type: ignore[list-item]
    seen, standings = apart(two_draws, tmp_path / "store")
    assert standings == []
    assert "sparsegpt 60%: not looked at, no two sets have a total" in seen.notes
    assert len(made_up) == 6
