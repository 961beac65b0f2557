"""The verbs of a study: their output, and one line for every mistake."""

import json
import shutil

from calmix.evaluation.scores import write_scores
from calmix.study.declaration import declaration
from calmix.study.spec import load_study
from calmix.study.store import read_results
from calmix.study.trials import planned_trials
from tests.compress.conftest import read, shows


def test_study_commands_end_to_end(calmix, tiny_study, tmp_path):
    compared = "{name: mixed, of: {calibration: mix}, over: {calibration: code}}"
    more = f"seeds: [0, 1]\ncomparisons:\n  - {compared}\n"
    path, store = tiny_study((', wanda: ["2:4"]', ""), more=more), tmp_path / "store"
    assert "declares 1 comparison by measure" in calmix("study", "plan", path).ok().out
    ended = calmix("study", "run", path, "-o", store, "--only", "code", "--json").ok()
    data = json.loads(ended.out)
    assert (data["planned"], data["finished"], data["failed"]) == (6, 2, {})
    shows(ended.err, "2 of 6 trials to run", "1/2 code sparsegpt 60% seed 0: total")
    part = calmix("study", "report", store, "--resamples", 20).ok().out
    left = "Declared and not run: mix sparsegpt 60% seed 0 (tiny) and mix"
    shows(part, left, "Without trials on both sides: mixed.")
    assert "2 finished, 4 pending" in calmix("study", "status", store).out
    assert "6 of 6 trials finished" in calmix("study", "run", path, "-o", store).out
    data = json.loads(calmix("study", "status", store, "--json").out)
    assert (data["finished"], data["pending"], len(data["trials"])) == (6, 0, 6)
    calmix("study", "report", store).ok()
    page = (store / "report" / "report.html").read_text(encoding="utf-8")
    shows(page, "6 of 6 trials finished", "methods: {sparsegpt: [0.6]")
    assert "finished: 6" in calmix("doctor", "inspect", store).out
    # A distance stored with the scores is part of the trial, and so of the table.
    file = sorted((store / "trials").iterdir())[0] / "scores.json"
    scores = read(file)
    assert scores["distance"] is None  # the tiny suite has no texts
    far = {"kl_mean": 1.75, "top1": 0.5}
    parts = dict.fromkeys(("general", "code"), far | {"kl_mean": 1.25})
    scores["distance"] = {"dense": "d", "texts": "t", "dimensions": parts, "total": far}
    write_scores(file, scores)
    # Output inside the store leaves it a valid store.
    assert "0 of 6 trials to run" in calmix("study", "run", path, "-o", store).err
    shutil.rmtree(store / "calibration")  # a store may be passed on without its sets
    (condition,) = json.loads(calmix("study", "report", store, "--json").out)["conditions"]
    assert condition["label"] == "SparseGPT 60%"
    assert {row["strategy"] for row in condition["ranking"]} == {"single", "mix"}
    far = [row["distance"]["kl"]["total"] for row in condition["ranking"]]
    assert [value for value in far if value is not None] == [1.75]


def test_study_init_writes_a_valid_file(calmix, tmp_path):
    path = tmp_path / "mine.yaml"
    assert (calmix("study", "init", path).code, load_study(path).file.name) == (0, "my-study")
    text, start = path.read_text(encoding="utf-8"), "# primary: "
    declared = text[text.index(start) : text.index("# Grids")].replace("\n# ", "\n")
    whole = tmp_path / "whole.yaml"
    whole.write_text(text.replace("# Grids", f"{declared[2:]}\n# Grids"), encoding="utf-8")
    study = load_study(whole)
    declared = str(declaration(study, planned_trials(study)))
    assert declared.startswith("declares 1 comparison by measure")
    assert "exists" in calmix("study", "init", path).line
    assert calmix("study", "init", path, "--overwrite").code == 0


def test_validate_lists_all_errors(calmix, tiny_study):
    path = tiny_study(("rows: 6", "row: 6"), ("length: 32", "length: x"))
    ended = calmix("study", "plan", path)
    assert ended.line == f"error: {path} has 2 mistakes"
    first, second = ended.out.splitlines()
    assert first.startswith(f"{path} line 4: row: unknown key: did you mean rows")
    assert second.startswith(f"{path} line 5: length: must be a valid integer")
    told = json.loads(calmix("study", "plan", path, "--json").out)
    assert told["problems"] == [first, second]
    run = calmix("study", "run", path, "-o", path.with_name("store"), "--workers", 2)
    assert "--workers has no effect without" in run.line


def test_retry_failed_trials(calmix, tiny_study, tmp_path):
    text, store = tmp_path / "texts" / "letters.jsonl", tmp_path / "store"
    run = "study", "run", tiny_study((', wanda: ["2:4"]', "")), "-o", store
    original = text.read_text()
    text.write_text('{"text": "too short"}')
    ended = calmix(*run)
    assert (ended.code, "1 of 3 trials finished" in ended.out) == (2, True)
    line = "error: 2 trials failed, first 'letters sparsegpt 60% seed 0' ("
    assert ended.err.strip().splitlines()[-1].startswith(line)
    assert "2 failed" in calmix("study", "status", store).out
    results = read_results(store)
    assert ([trial.calibration for trial in results.trials], results.failed) == (["code"], 2)
    rows = json.loads(calmix("study", "status", store, "--json").out)["trials"]
    errors = {row["trial"]: row["note"] for row in rows if row["state"] == "failed"}
    assert [*errors] == [f"{name} sparsegpt 60% seed 0" for name in ("letters", "mix")]
    assert "letters.jsonl has text for 0 rows" in errors["mix sparsegpt 60% seed 0"]
    assert "0 of 3 trials to run" in calmix(*run).ok().err
    assert "2 of 3 trials to run" in calmix(*run, "--retry-failed").err
    text.write_text(original)
    # Changed content is a new request, not a retry.
    assert "2 of 3 trials to run" in calmix(*run).ok().err
    assert read_results(store).failed == 0
