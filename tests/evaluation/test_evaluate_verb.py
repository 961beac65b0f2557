"""The verbs `evaluate` and `suites`: tables and JSON, and one line for every mistake."""

import json

import pytest

from tests.evaluation.archive import suite_text, use_archive
from tests.tiny import save_tiny_model


@pytest.fixture
def suite_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")  # into a pipe, tables are as wide as they come
    use_archive(monkeypatch)
    path = tmp_path / "made.yaml"
    path.write_text(suite_text(), encoding="utf-8")
    return path


def test_retention_against_a_dense_model_or_its_file(calmix, tiny_folder, suite_file, tmp_path):
    arguments, path = ("evaluate", tiny_folder, "--suite", suite_file), tmp_path / "out/dense.json"
    ended = calmix(*arguments, "-o", path).ok()
    assert all(name in ended.out for name in ("quiz", "which", "scored by"))
    value = json.loads(path.read_text(encoding="utf-8"))
    assert len(value["scores"]["tasks"][0]["values"]) == 10
    assert "retention" not in value
    ended = calmix(*arguments, "--against", tiny_folder).ok()
    assert "100.0 [100.0, 100.0]" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    again = calmix(*arguments, "--against", tiny_folder, "--json")  # dense scores from the cache
    value = json.loads(again.out)
    whole = {"value": 1.0, "low": 1.0, "high": 1.0}
    assert [d["kept"] for d in value["retention"]["dimensions"] if d["kept"]["value"]] == [whole]
    assert value["scores"]["suite"] == value["dense"]["suite"]
    assert calmix(*arguments, "--against", path).code == 0
    other = calmix(*arguments, "--against", path, "--quick")
    assert (other.code, "different selections" in other.line) == (2, True)


def test_the_distance_to_the_dense_model_on_a_text_of_the_users(
    calmix, tiny_folder, suite_file, text_file, tmp_path
):
    other, out = save_tiny_model(tmp_path / "other", seed=1), tmp_path / "scores.json"
    arguments = ("evaluate", other, "--suite", suite_file, "--text", f"mine={text_file}")
    ended = calmix(*arguments, "--against", tiny_folder, "-o", out).ok()
    assert "KL(dense || pruned)" in ended.out
    assert "flips %" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "KL to dense" in calmix("compare", out).out  # the dense scores are in the file
    kept = json.loads(out.read_text(encoding="utf-8"))["scores"]["distance"]
    assert kept["dimensions"]["mine"]["kl_mean"] > 0
    for against in ((), ("--against", out)):
        assert "name it with --against" in calmix(*arguments, *against).line


def test_a_file_is_scored_anew_by_another_measure(calmix, tiny_folder, suite_file, tmp_path):
    path, alone = tmp_path / "both.json", tmp_path / "alone.json"
    arguments = ("evaluate", tiny_folder, "--suite", suite_file)
    calmix(*arguments, "--against", tiny_folder, "-o", path).ok()
    calmix(*arguments, "-o", alone).ok()
    for measure in ("primary", "margin", "accuracy", "ratio"):
        by = ("--measure", measure)
        assert f"by {measure}" in calmix("evaluate", "rescore", path, *by).ok().out
        rows = json.loads(calmix("evaluate", "rescore", alone, *by, "--json").out)
        tasks = ["quiz", "which", *([] if measure == "accuracy" else ["text"])]
        assert [row["task"] for row in rows] == tasks
    assert calmix("evaluate", "rescore", path, "--against", alone).code == 0
    for words, says in (
        ((alone, "--against", path), "hold no score without the knowledge"),  # scored as pruned
        ((path, "--measure", "f1"), "--measure f1: must be 'primary'"),
        ((tmp_path / "none.json",), "error: there is no file"),
    ):
        assert says in calmix("evaluate", "rescore", *words).line


def test_suites_are_listed_and_shown_and_a_mistake_names_line_and_key(
    calmix, suite_file, tiny_folder
):
    listed = json.loads(calmix("evaluate", "suites", "--json").out)
    assert {row["name"] for row in listed} >= {"offline", "paper", "smoke"}
    assert "offline" in calmix("evaluate", "suites").out
    assert "humaneval" in calmix("evaluate", "suite", "paper").ok().out
    data = json.loads(calmix("evaluate", "suite", "offline", "--json").out)
    assert data["dimensions"]["math"]["gsm8k"]["shots"] == 5
    assert len(data["hash"]) == 64
    suite_file.write_text(suite_text().replace("metric: acc,", "metric: ac,"), encoding="utf-8")
    ended = calmix("evaluate", "suite", suite_file)
    assert "made.yaml line 7: dimensions.general.which.metric" in ended.line
    refused = calmix("evaluate", tiny_folder, "--suite", "paper", "--dimension", "code")
    assert "--allow-code-execution" in refused.line
