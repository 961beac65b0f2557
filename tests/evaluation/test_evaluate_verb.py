"""The verbs `evaluate` and `suites`: tables and JSON, and one line for every mistake."""

import json
import re
import shutil

import pytest

from tests.evaluation.archive import suite_text, use_archive


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
    from tests.tiny import save_tiny_model

    other, out = save_tiny_model(tmp_path / "other", seed=1), tmp_path / "scores.json"
    arguments = ("evaluate", other, "--suite", suite_file, "--text", f"mine={text_file}")
    ended = calmix(*arguments, "--against", tiny_folder, "-o", out).ok()
    assert "KL(dense || pruned)" in ended.out
    assert "flips %" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    compared = calmix("compare", out)  # the dense scores are in the file
    assert "KL to dense" in compared.out
    kept = json.loads(out.read_text(encoding="utf-8"))["scores"]["distance"]
    assert kept["dimensions"]["mine"]["kl_mean"] > 0
    same = ("evaluate", tiny_folder, *arguments[2:], "--against", tiny_folder, "--json")
    assert json.loads(calmix(*same).out)["scores"]["distance"]["total"]["kl_mean"] == 0
    dense = tmp_path / "dense.json"
    assert calmix("evaluate", tiny_folder, "--suite", suite_file, "-o", dense).code == 0
    for against in ((), ("--against", dense)):
        assert "name it with --against" in calmix(*arguments, *against).line
    wrong = calmix("evaluate", other, "--against", tiny_folder, "--text", "mine")
    assert (wrong.code, wrong.out) == (2, "")


def test_a_file_is_scored_anew_by_another_measure(calmix, tiny_folder, suite_file, tmp_path):
    path, alone = tmp_path / "both.json", tmp_path / "alone.json"
    arguments = ("evaluate", tiny_folder, "--suite", suite_file)
    assert calmix(*arguments, "--against", tiny_folder, "-o", path).code == 0
    assert calmix(*arguments, "-o", alone).code == 0
    for measure in ("primary", "probability", "bits", "smoothed", "margin", "accuracy", "ratio"):
        ended = calmix("evaluate", "rescore", path, "--measure", measure).ok()
        assert f"by {measure}" in ended.out
        told = json.loads(calmix("evaluate", "rescore", path, "--measure", measure, "--json").out)
        assert told["measure"] == measure
        rows = json.loads(calmix("evaluate", "rescore", alone, "--measure", measure, "--json").out)
        tasks = ["quiz", "which", *([] if measure == "accuracy" else ["text"])]
        assert [row["task"] for row in rows] == tasks
    assert "scored by" in calmix("evaluate", "rescore", alone).out
    assert calmix("evaluate", "rescore", path, "--against", alone).code == 0
    ended = calmix(
        "evaluate", "rescore", alone, "--against", path
    )  # what was scored as a pruned model
    assert "hold no score without the knowledge" in ended.line
    ended = calmix("evaluate", "rescore", path, "--measure", "f1")
    assert (ended.code, ended.out) == (2, "")
    assert "--measure f1: must be 'primary'" in ended.line
    assert calmix("evaluate", "rescore", tmp_path / "none.json").line.startswith(
        "error: there is no file"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--suite", "offlin"), "unknown suite 'offlin': did you mean offline"),
        (("--suite", "none.yaml"), "there is no file none.yaml"),
        (("--dimension", "maths"), "no dimension 'maths': did you mean math"),
        (("--limit", "-3"), "--limit -3: must be greater"),
        (("--suite", "paper", "--dimension", "code"), "--allow-code-execution"),
        (("--batch-tokens", "0"), "--batch-tokens 0: must be greater"),
        (("--against", "none.json"), "there is no file none.json"),
        (("--dtype", "int8", "--task", "mbpp"), "--dtype int8: must be 'auto'"),
    ],
)
def test_each_mistake_is_one_line(calmix, tiny_folder, arguments, says):
    ended = calmix("evaluate", tiny_folder, *arguments)
    assert says in ended.line
    assert ended.out == ""


def test_an_output_that_cannot_be_written_is_refused_before_any_work(calmix, tiny_folder, tmp_path):
    taken = tmp_path / "taken.json"
    taken.write_text("kept", encoding="utf-8")
    for path, says in [
        (taken, "exists: choose another file or --overwrite"),
        (tmp_path, "is a folder"),
        (taken / "below.json", "Not a directory"),
    ]:
        ended = calmix("evaluate", tiny_folder, "-o", path)
        assert says in ended.line
    assert taken.read_text(encoding="utf-8") == "kept"


def test_a_mistake_in_a_suite_file_names_line_and_key(calmix, suite_file):
    suite_file.write_text(suite_text().replace("metric: acc,", "metric: ac,"), encoding="utf-8")
    ended = calmix("evaluate", "suite", suite_file)
    assert "made.yaml line 7: dimensions.general.which.metric" in ended.line


def test_suites_are_listed_and_shown(calmix):
    listed = calmix("evaluate", "suites", "--json")
    assert {row["name"] for row in json.loads(listed.out)} >= {"offline", "paper", "smoke"}
    assert "offline" in calmix("evaluate", "suites").out
    shown = calmix("evaluate", "suite", "paper").ok()
    assert "humaneval" in shown.out
    data = json.loads(calmix("evaluate", "suite", "offline", "--json").out)
    assert data["dimensions"]["math"]["gsm8k"]["shots"] == 5
    assert len(data["hash"]) == 64
    assert calmix("evaluate", "suite", "papier").code == 2


def test_ids_beyond_the_vocabulary_are_one_line(
    calmix, tiny_folder, suite_file, text_file, tmp_path
):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    file = model / "tokenizer.json"
    file.write_text(re.sub(r'("a": )\d+', r"\g<1>5000", file.read_text(encoding="utf-8")))
    for verb in (
        ("evaluate", model, "--suite", suite_file),
        ("calibrate", "measure", text_file, "-m", model, "--rows", 4, "--length", 32),
    ):
        ended = calmix(*verb)
        assert "has no embedding for token id 5000, its last is 319" in ended.line
