"""The verbs of a study: what they print, and one line for every mistake."""

import json

from calmix.study import load_study


def test_a_study_from_its_first_file_to_its_table(calmix, tiny_study, tmp_path):
    path, store = tiny_study(), tmp_path / "store"
    ended = calmix("study", "validate", path).ok()
    assert "6 trials over 3 calibration sets" in ended.out
    ended = calmix("study", "run", path, "-o", store, "--only", "code", "--json").ok()
    told = json.loads(ended.out)
    assert (told["planned"], told["finished"], told["failed"]) == (6, 2, {})
    assert "2 of 6 trials to run" in ended.err
    assert "1/2 code sparsegpt 60% seed 0: total" in ended.err
    ended = calmix("study", "status", store)
    assert "2 finished, 4 pending" in ended.out
    ended = calmix("study", "run", path, "-o", store)
    assert "6 of 6 trials finished" in ended.out
    told = json.loads(calmix("study", "status", store, "--json").out)
    assert (told["finished"], told["pending"], len(told["trials"])) == (6, 0, 6)
    assert (store / "results.csv").is_file()


def test_the_file_to_start_from_is_a_study(calmix, tmp_path):
    path = tmp_path / "mine.yaml"
    assert calmix("study", "init", path).code == 0
    assert load_study(path).file.name == "my-study"
    assert "exists" in calmix("study", "init", path).line
    assert calmix("study", "init", path, "--overwrite").code == 0


def test_a_plan_in_words_and_as_json(calmix, tiny_study):
    path = tiny_study()
    ended = calmix("study", "plan", path).ok()
    assert "6 trials, 3 calibration sets" in ended.out
    assert "recover" not in ended.out
    both = tiny_study(("wanda:", "admm:"), more="recovery: [none, distill]\n", name="both.yaml")
    told = calmix("study", "plan", both).out
    assert "prune recover evaluate" in " ".join(told.split())
    rows = [line for line in told.splitlines() if "60%" in line or "2:4" in line]
    assert [" - " in row for row in rows] == [True, False] * 2  # each method without and with
    told = json.loads(calmix("study", "plan", path, "--json").out)
    assert told["trials"] == 6
    assert [group["trials"] for group in told["groups"]] == [3, 3]


def test_validate_lists_every_mistake(calmix, tiny_study):
    path = tiny_study(("rows: 6", "row: 6"), ("length: 32", "length: x"))
    ended = calmix("study", "validate", path)
    assert ended.line == f"error: {path} has 2 mistakes"
    first, second = ended.out.splitlines()
    assert first.startswith(f"{path} line 4: row: unknown key: did you mean rows")
    assert second.startswith(f"{path} line 5: length: Input should be a valid integer")
    told = json.loads(calmix("study", "validate", path, "--json").out)
    assert told["problems"] == [first, second]


def test_every_mistake_is_one_line(calmix, tiny_study, tmp_path):
    run = "run", tiny_study(), "-o", tmp_path / "store"
    wrong = tiny_study(("rows: 6", "rows: six"), name="wrong.yaml")
    for arguments, words in [
        (("run", wrong, "-o", tmp_path / "store"), "line 4: rows: Input should be a valid integer"),
        ((*run, "--only", "zz"), "no trial matches 'zz'"),
        ((*run, "--workers", 2), "--workers has no effect without"),
        ((*run, "--executor", "ray", "--address", "127.0.0.1:1"), "answers at"),
        (("plan", wrong), "line 4"),
    ]:
        assert words in calmix("study", *arguments).line, arguments


def test_a_failed_trial_is_told_and_the_rest_is_run(calmix, tiny_study, tmp_path):
    path = tiny_study()
    (tmp_path / "texts" / "code.jsonl").write_text('{"text": "x"}')
    ended = calmix("study", "run", path, "-o", tmp_path / "store")
    assert ended.code == 2
    assert "2 of 6 trials finished" in ended.out
    assert ended.err.strip().splitlines()[-1].startswith("error: 4 trials failed, first 'code")
    assert "4 failed" in calmix("study", "status", tmp_path / "store").out
