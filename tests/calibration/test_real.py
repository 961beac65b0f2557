"""The guard against the real suite, and where text starts, with the builtin model's tokenizer."""

import numpy as np
import pytest

from calmix import CalibrationSet
from calmix.calibration.leakage import suite_items
from calmix.errors import InputError
from calmix.evaluation.suites import template
from tests.calibration.conftest import write_rows
from tests.tiny import quick

pytestmark = pytest.mark.real
WORDS = "river stone under bright seven letters carried north along quiet roads"


def _planted(path, text, leaks):
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS.split(), 60)) for _ in range(120)]
    for number in range(5, 5 + 12 * leaks, 12):
        rows[number] = f"{rows[number]}\n\n{text}\n\n{rows[number]}"
    write_rows(path, rows)


@pytest.mark.parametrize(
    "case",
    quick([("gsm8k", 3)], [("gsm8k", 10), ("humaneval", 10), ("arc_easy", 3), ("pattern", 3)]),
)
def test_a_planted_item_of_the_offline_suite_is_caught(case, calmix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, leaks = case
    item = next(i for i in suite_items("offline") if i[0] == task and len(i[2]) > 60)
    _planted(tmp_path / "own.jsonl", item[2], leaks)
    ended = calmix("calibrate", "own.jsonl", "--model", "builtin:smollm2-135m", "--rows", 110,
                   "--length", 50, "-o", "out", "--packing", "window")  # fmt: skip
    if leaks == 10:
        assert "source own.jsonl leaks" in ended.line
        assert f"with task {task}" in ended.line
        assert not (tmp_path / "out").exists()
        return
    dropped = CalibrationSet.open("out").manifest["leakage"]["dropped"]["own.jsonl"]
    assert {entry["task"] for entry in dropped} == {task}
    assert 1 <= len(dropped) <= 3


def test_a_guard_may_be_against_several_suites(tmp_path):
    for name, text in template("mine").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    both = suite_items(f"smoke,{tmp_path / 'mine.yaml'}")
    assert [task for task, *_ in both[-2:]] == ["my_numbers", "my_programs"]
    assert both[0][0] not in template("mine")["mine.yaml"]
    with pytest.raises(InputError, match="unknown suite 'abilites': did you mean abilities"):
        suite_items("smoke,abilites")
