"""From a study file to its report, nothing made up."""

import csv
import json
import shutil

import pytest


@pytest.mark.usefixtures("undrawn")
def test_a_study_run_here_is_analysed_reported_and_recommended_from(calmix, tiny_study, tmp_path):
    path = tiny_study((', wanda: ["2:4"]', ""), more="seeds: [0, 1]\n")
    store = tmp_path / "store"
    assert calmix("study", "run", path, "-o", store).code == 0
    calmix("study", "report", store).ok()
    page = (store / "report" / "report.html").read_text(encoding="utf-8")
    assert "6 of 6 trials finished" in page
    assert "methods: {sparsegpt: [0.6]" in page
    told = json.loads(calmix("study", "analyse", store, "--json").out)
    assert [each["label"] for each in told["conditions"]] == ["SparseGPT 60%"]
    strategies = {one["strategy"] for one in told["conditions"][0]["ranking"]}
    assert strategies == {"single", "mix"}
    assert calmix("study", "recommend", store).out.count("take ") == 1
    assert "finished: 6" in calmix("doctor", "inspect", store).out
    # A distance to the dense model beside the scores goes with the trial, here into the table.
    one = sorted((store / "trials").iterdir())[0]
    scores = json.loads((one / "scores.json").read_text(encoding="utf-8"))
    assert scores["distance"] is None  # the tiny suite has no texts
    parts = {name: {"kl_mean": 1.25, "top1": 0.5} for name in told["dimensions"]}
    scores["distance"] = {"dense": "d", "texts": "t", "dimensions": parts,
                          "total": {"kl_mean": 1.75, "top1": 0.5}}  # fmt: skip
    (one / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    # What was written lies inside the store, and the store stays one.
    assert "0 of 6 trials to run" in calmix("study", "run", path, "-o", store).err
    again = json.loads(calmix("study", "analyse", store, "--json").out)
    rows = [row for each in again["conditions"] for row in each["ranking"]]
    far = [row["distance"]["kl"]["total"] for row in rows]
    assert [value for value in far if value is not None] == [1.75]
    with (store / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["study", "id", "model", "calibration"]
    assert len(rows) == 6 * 3
    kept = [(row["kl"], row["dimension_kl"], row["dimension_top1"]) for row in rows
            if row["id"] == one.name]  # fmt: skip
    assert {*kept} == {("1.75", "1.25", "0.5")}
    assert {row["kl"] for row in rows if row["id"] != one.name} == {""}
    # One that is passed on without the text it was calibrated on is read as well.
    shutil.rmtree(store / "calibration")
    assert len(json.loads(calmix("study", "analyse", store, "--json").out)["conditions"]) == 1
