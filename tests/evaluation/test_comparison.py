"""Comparing models: a model's figures do not depend on the others; what is left out is named."""

import json
from dataclasses import replace

import pytest

from calmix import words
from calmix.evaluation.behaviour import behaviour
from calmix.evaluation.comparison import Comparison
from calmix.evaluation.scores import load_pair, load_scores, write_scores
from calmix.evaluation.summary import ability_rows
from tests.evaluation.helpers import bits, save_pair, scored, written

RIGHT = [1] * 12 + [0] * 8
LOST = [1] * 9 + [0] * 3 + [1, 1] + [0] * 6  # three of them, and two gained


def tasks(code, math=RIGHT):
    return written("programs", "code", code), written("sums", "math", math)


def saved(path, dense, small):
    """Write both models' scores; the small model is named after the file."""
    return save_pair(path, dense, replace(small, model=path.stem, fingerprint=path.stem))


@pytest.fixture
def printed(calmix, monkeypatch):
    """Return a function that runs `compare` and returns its rows by label, and its notes."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        ended = calmix("compare", *arguments).ok()
        parted = (line.split("  ") for line in ended.out.splitlines())
        cells = ([one.strip() for one in line if one.strip()] for line in parted)
        return {row[0]: row[1:] for row in cells if len(row) > 1}, ended

    return run


def test_figures_are_the_same_alone_and_compared(calmix, printed, tmp_path):
    small, dense = scored(*tasks(LOST)), scored(*tasks(RIGHT))
    other = scored(*tasks([*RIGHT[:11], *[0] * 9]))  # the same model, rounded otherwise
    one, two = (
        saved(tmp_path / "one.json", dense, small),
        saved(tmp_path / "two.json", other, small),
    )
    alone, (both, ended) = [printed(path)[0] for path in (one, two)], printed(one, two)
    for label in ("code", "math", "total", "lost", "gained", "p", "kept %"):
        assert both[label] == [row[label][0] for row in alone]
    assert "differ in 1 items (rounding): each model is compared with those in" in ended.err
    assert both["lost"] == ["3", "2"]
    # The bracket is that of `evaluate`, of the card's table, and of Python.
    before, after = load_pair(one)
    wanted = words.with_span(after.retention(before, "right").of("code"))
    assert both["code"][0] == wanted == words.with_span(behaviour((before, after)).right.of("code"))
    assert wanted in calmix("evaluate", "rescore", one).ok().out
    counts = {"#asked": 20, "#dense right": 12, "#small right": 11, "#lost": 3, "#gained": 2}
    row = {"ability": "code", **counts, "#p": "1.000", "#right %": wanted}
    assert ability_rows(behaviour((before, after)))[0] == row
    told = json.loads(calmix("compare", one, "--json").ok().out)["one"]
    assert told["retention"]["total"] == told["behaviour"]["right"]["total"]


def test_scores_of_right_answers_alone_are_refused(calmix, tmp_path):
    """Files of an older version."""
    path, value = tmp_path / "old.json", scored(*tasks(RIGHT)).to_dict()
    write_scores(path, value | {"right_only": False})
    assert load_scores(path).to_dict() == value
    write_scores(path, value | {"right_only": True})
    said = "old.json has only the answers that the dense model had right: score the model again"
    assert said in calmix("evaluate", "rescore", path).line


def test_compare_folders_on_common_suites(printed, calmix, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()  # called as the model is, and no model
    monkeypatch.chdir(tmp_path)
    likely = [scored(bits(nats, [4] * 30), suite="offline") for nats in ([1.0] * 30, [2.0] * 30)]
    asked = scored(*tasks(RIGHT)), scored(*tasks(LOST))
    for name in ("first", "second"):
        saved(tmp_path / name / "scores.json", *likely)
        saved(tmp_path / name / "abilities.json", *asked)
    rows, ended = printed(tmp_path / "first", tmp_path / "second")
    assert rows["lost"] == ["3", "3"]
    assert rows["likelihood %"][0] == words.with_span(likely[1].retention(likely[0]).total)
    assert "left out" not in ended.err
    alone, third = (saved(tmp_path / f"{n}.json", *p) for n, p in (("a", asked), ("b", likely)))
    rows, ended = printed(tmp_path / "first", alone)
    assert "left out: suite offline of first, which others lack" in ended.err
    assert (rows["lost"], "likelihood %" in rows) == (["3", "3"], False)
    (tmp_path / "empty").mkdir()
    assert "has neither scores.json nor" in calmix("compare", tmp_path / "empty").line
    assert "of different suites" in calmix("compare", alone, third).line


def test_ceiling_and_too_few_answers(printed, tmp_path):
    few = [1] * 4 + [0] * 16
    dense = replace(scored(*tasks(RIGHT, few)), repeat=tasks([0, *RIGHT[1:]], few))
    files = [saved(tmp_path / f"{n}.json", dense, scored(*tasks(LOST, few))) for n in "ab"]
    rows, ended = printed(*files)
    assert rows["math"] == [words.TOO_FEW] * 2
    assert ended.out.count("The dense model against itself, in other batches: 91.7 [") == 1
    found = Comparison.of("a", [load_pair(files[0])])
    assert found.behaviour.right.total.value == found.behaviour.right.of("code").value
    assert ability_rows(found.behaviour)[1]["#right %"] == words.TOO_FEW
