"""Written answers: batched, greedy, cut at stops; the panel or a file; the saved file."""

import json
from pathlib import Path

import pytest

from calmix.errors import InputError
from calmix.evaluation import generations
from calmix.evaluation.generations import (
    Answered,
    Prompt,
    answer,
    load_answers,
    panel,
    read_prompts,
)
from calmix.evaluation.greedy import Answer
from tests.evaluation.helpers import opened


def test_the_panel_is_asked_behind_worked_examples_and_an_answer_that_is_cut_says_so(monkeypatch):
    model, prompts = opened(), panel()
    written = [Answer(" Paris. ", False), Answer(" Paris. ", True)]
    monkeypatch.setattr(generations, "answers", lambda *_, **__: written)
    assert answer(model, prompts) == ("Paris. …", "Paris.")
    assert len({one.shown for one in prompts}) == 10
    assert prompts[0].plain.endswith(f"Question: {prompts[0].shown}\nAnswer:")
    assert prompts[0].plain.count("Answer:") == 4


def test_prompts_of_a_file_and_the_file_of_answers(tmp_path):
    path, out, rows = tmp_path / "mine.txt", tmp_path / "answers.json", tmp_path / "mine.csv"
    path.write_text("first\n\n  second \n", encoding="utf-8")
    rows.write_text("ask\nfirst\n", encoding="utf-8")
    prompts = read_prompts(path)
    assert prompts == [Prompt("mine.txt", text, text) for text in ("first", "second")]
    assert read_prompts(Path(f"{rows}@ask")) == [Prompt("mine.csv", "first", "first")]
    made = Answered(tuple(prompts), (("tiny", "hash"),), (answer(opened(), prompts),))
    made.save(out)
    assert load_answers(out) == made
    value = json.loads(out.read_text(encoding="utf-8"))
    for wrong, says in (
        ({"kind": "x"}, "no answers of calmix"), ({"answers": [["a"]]}, "do not fit"),
        ({"models": 1}, "is damaged: 'models'"),
    ):  # fmt: skip
        out.write_text(json.dumps(value | wrong), encoding="utf-8")
        with pytest.raises(InputError, match=says):
            load_answers(out)
    path.write_text("line\n" * 51, encoding="utf-8")
    with pytest.raises(InputError, match="holds 51 prompts: 50 are the most"):
        read_prompts(path)
