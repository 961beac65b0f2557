"""Written answers: batched, greedy, cut at stops; the panel or a file; the saved file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calmix.errors import InputError, ModelError
from calmix.evaluation import greedy
from calmix.evaluation.generations import (
    Answered,
    Prompt,
    answer,
    generate,
    load_answers,
    panel,
    read_prompts,
)
from calmix.evaluation.scorer import Scorer
from tests.evaluation.helpers import opened

CONTEXTS = ["one", "two words", "three little words", "four", ""]


def test_generation_is_batched_greedy_and_stops() -> None:
    model = opened()
    together = generate(Scorer(model), CONTEXTS, room=12)
    assert together == [generate(Scorer(model, batch_tokens=1), [c], room=12)[0] for c in CONTEXTS]
    assert len(set(together)) > 1
    stop = together[0][3:5]
    assert generate(Scorer(model), ["one"], stops=[stop], room=12) == [together[0].split(stop)[0]]


def test_long_contexts_are_cut_on_the_left_and_counted() -> None:
    seen: list[tuple[int, int]] = []
    scorer = Scorer(opened(), progress=lambda *of: seen.append(of))
    text = "abcdefghij" * 40  # 400 tokens, the context is 256
    cut, same, short = generate(scorer, [text, text[-246:], "a"], room=10, task="writes")
    assert cut == same != short
    assert scorer.truncated == {"writes": 1}
    assert seen[-1] == (3, 3)


def test_generation_needs_an_end_token_and_room() -> None:
    model = opened()
    with pytest.raises(ModelError, match="task x generates up to 256 tokens"):
        generate(Scorer(model), ["a"], room=256, task="x")
    model.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        generate(Scorer(model), ["a"], room=8)


def test_the_panel_is_asked_in_the_chat_template_or_behind_worked_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = opened(), []

    def answers(_: object, asked: list[greedy.Prompt], **more: object) -> list[greedy.Answer]:
        seen.append(model.tokenizer.decode(asked[0].ids))
        return [greedy.Answer(" Paris. ", 3, number > 0) for number, _ in enumerate(asked)]

    monkeypatch.setattr(greedy, "answers", answers)
    prompts = panel()
    assert len(prompts) == len({one.shown for one in prompts}) == 10
    written = answer(model, prompts)
    assert written[:2] == ("Paris. …", "Paris.")
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    answer(model, prompts)
    question = prompts[0].shown
    assert seen[0].endswith(f"Question: {question}\nAnswer:")
    assert seen[0].count("Answer:") == 4
    assert seen[1] == f"<{question}>"


def test_prompts_of_a_file_and_the_file_of_answers(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.txt", tmp_path / "answers.json"
    path.write_text("first\n\n  second \n", encoding="utf-8")
    prompts = read_prompts(path)
    assert prompts == [Prompt("mine.txt", text, text) for text in ("first", "second")]
    written = answer(opened(), prompts)
    made = Answered(tuple(prompts), (("tiny", "hash"),), (written,))
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
    rows = tmp_path / "mine.csv"
    rows.write_text("ask\nfirst\n", encoding="utf-8")
    assert read_prompts(Path(f"{rows}@ask")) == [Prompt("mine.csv", "first", "first")]
    path.write_text("line\n" * 51, encoding="utf-8")
    with pytest.raises(InputError, match="holds 51 prompts: 50 are the most"):
        read_prompts(path)
