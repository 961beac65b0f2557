"""The guard against the real suite, and where text starts, with the builtin model's tokenizer."""

import json

import numpy as np
import pytest

from calmix import CalibrationSet
from calmix.calibration import open_tokenizer
from calmix.calibration.leakage import suite_items
from calmix.calibration.selfgen.prompts import start_token
from calmix.errors import InputError
from tests.tiny import quick

pytestmark = pytest.mark.real
WORDS = "river stone under bright seven letters carried north along quiet roads"


def test_text_starts_at_the_separator_of_pretraining():
    tokenizer = open_tokenizer("builtin:smollm2-135m").tokenizer
    assert tokenizer.bos_token == "<|im_start|>"
    for start in ("auto", "separator"):
        assert tokenizer.convert_ids_to_tokens(start_token(tokenizer, start)) == "<|endoftext|>"


def _planted(path, text, leaks):
    rng, lines = np.random.default_rng(0), []
    for number in range(120):
        body = " ".join(rng.choice(WORDS.split(), 60))
        if number % 12 == 5 and number // 12 < leaks:
            body = f"{body}\n\n{text}\n\n{body}"
        lines.append(json.dumps({"text": body}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("task", quick(["gsm8k"], ["humaneval", "arc_easy", "pattern"]))
def test_a_planted_item_of_the_offline_suite_is_caught(task, calmix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    item = next(i for i in suite_items("offline") if i[0] == task and len(i[2]) > 60)
    arguments = ["--model", "builtin:smollm2-135m", "--rows", 110, "--length", 50]
    _planted(tmp_path / "few.jsonl", item[2], 3)
    calmix("calibrate", "few.jsonl", *arguments, "-o", "out", "--packing", "window").ok()
    dropped = CalibrationSet.open("out").manifest["leakage"]["dropped"]["few.jsonl"]
    assert {entry["task"] for entry in dropped} == {task}
    assert 1 <= len(dropped) <= 3
    _planted(tmp_path / "many.jsonl", item[2], 10)
    ended = calmix("calibrate", "many.jsonl", *arguments, "-o", "out2", "--packing", "window")
    assert "source many.jsonl leaks" in ended.line
    assert f"with task {task}" in ended.line
    assert not (tmp_path / "out2").exists()


def test_a_guard_may_be_against_several_suites():
    both = suite_items("smoke,abilities")
    assert len(both) == len(suite_items("smoke")) + len(suite_items("abilities"))
    with pytest.raises(InputError, match="unknown suite 'abilites': did you mean abilities"):
        suite_items("smoke,abilites")
