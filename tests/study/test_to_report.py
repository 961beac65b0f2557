"""From a study file to its report, nothing made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Ended


def test_a_study_run_here_is_analysed_reported_and_recommended_from(
    calmix: Callable[..., Ended], tiny_study: Callable[..., Path], tmp_path: Path
) -> None:
    path, store = tiny_study(more="seeds: [0, 1]\n"), tmp_path / "store"
    assert calmix("study", "run", path, "-o", store).code == 0
    ended = calmix("study", "report", store)
    assert ended.code == 0, ended.err
    page = (store / "report" / "report.html").read_text(encoding="utf-8")
    assert "12 of 12 trials finished" in page
    assert "methods: {sparsegpt: [0.6]" in page
    told = json.loads(calmix("study", "analyse", store, "--json").out)
    assert [each["label"] for each in told["conditions"]] == ["SparseGPT 60%", "Wanda 2:4"]
    strategies = {one["strategy"] for one in told["conditions"][0]["ranking"]}
    assert strategies == {"single", "mix"}
    assert calmix("recommend", store).out.count("take ") == 2
    # What was written lies inside the store, and the store stays one.
    assert calmix("study", "export", store, "-o", tmp_path / "out").code == 0
    again = json.loads(calmix("study", "analyse", tmp_path / "out", "--json").out)
    assert again == told
    assert "0 of 12 trials to run" in calmix("study", "run", path, "-o", store).err
