"""`calmix check` of score files and of a folder of calmix compress."""

import json

import pytest

from calmix.files import write_json
from calmix.manifest import sealed
from tests.evaluation.helpers import scored
from tests.evaluation.test_floors import answered


def saved(path, dense, pruned, **changed):
    """Write a file as `calmix evaluate --against -o` does."""
    told = {"scores": pruned.to_dict(), "dense": dense.to_dict()}
    told["scores"] |= {"fingerprint": "pruned"} | changed
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    """Score files: a model that keeps 97 of 100 answers, another model, and no dense model."""
    code, chat = answered(100, 120), answered(60, 60, "chat")
    found = {
        "code": saved(tmp_path / "code.json", scored(code), scored(answered(100, 120, kept=97))),
        "chat": saved(tmp_path / "chat.json", scored(chat, suite="t"), scored(chat, suite="t")),
        "other": saved(tmp_path / "other.json", scored(chat), scored(chat), fingerprint="x"),
        "alone": tmp_path / "alone.json",
        "folder": tmp_path / "folder",
    }
    found["alone"].write_text(json.dumps(scored(code).to_dict()), encoding="utf-8")
    found["folder"].mkdir()
    return found


def test_a_verdict_is_printed_sealed_and_sets_the_exit_code(calmix, files, tmp_path):
    both, out = (files["code"], files["chat"]), tmp_path / "check.json"
    ended = calmix("check", *both, "--keep-at-least", "0.9", "-o", out).ok()
    assert (
        "Kept at 95 % confidence, at least: code 90 % (100 generated answers), chat 90 %"
        in ended.out
    )
    made = json.loads(out.read_text(encoding="utf-8"))
    assert sealed(made) == made
    assert made["kind"] == "check"
    assert (made["floors"], made["confidence"], made["passed"]) == ({"": 0.9}, 0.95, True)
    assert (made["dense"], made["model"]) == ("f", "pruned")
    assert [one["hash"] for one in made["suites"]] == ["s", "t"]
    assert [one["items"] for one in made["tested"]] == [100, 60]
    ended = calmix("check", *both, "--keep-at-least", "code=0.95", "--confidence", "90%", "--json")
    assert ended.code == 1
    told = json.loads(ended.out)
    assert (told["passed"], told["confidence"]) == (False, 0.9)
    assert told["tested"][0]["bound"] < 0.95
    assert told["lines"][0].startswith("Not kept at 90 % confidence: code (keeps 97.0 %")
    assert "--keep-at-least is missing: name the floors" in calmix("check", *both).line
    ended = calmix("check", *both, "--keep-at-least", "0.9", "-o", out)
    assert (ended.code, "exists" in ended.line) == (2, True)
    wide = [one for one in calmix("check", *both, "--keep-at-least", "0.9").out.splitlines()
            if len(one) > 80]  # fmt: skip
    assert not wide


@pytest.mark.parametrize(
    ("names", "floors", "said"),
    [
        (["code"], "0.9 --confidence 0.5", "--confidence"),
        (["code"], "90", "did you mean 0.9"),
        (["code"], "maths=0.9", "the scores lack: they have code"),
        (["code"], "0.99", "code=0.99 needs 299 right answers and has 100"),
        (["code", "other"], "0.9", "other.json is about other models than"),
        (["alone"], "0.9", "without a dense model: evaluate again with --against"),
        (["folder"], "0.9", "was not made by calmix compress"),
        (["folder", "code"], "0.9", "a folder is checked alone"),
    ],
)
def test_errors_are_one_line_and_write_nothing(calmix, files, tmp_path, names, floors, said):
    out = tmp_path / "out.json"
    asked = ("--keep-at-least", *floors.split(), "-o", out)
    ended = calmix("check", *(files[name] for name in names), *asked)
    assert (ended.code, said in ended.line) == (2, True), ended.err
    assert not out.exists()
    assert not list(files["folder"].iterdir())


def test_answers_of_a_users_suite_count_as_measured(calmix, files):
    """They are in `scores.json`, so nothing is missing."""
    folder = files["folder"]
    write_json(folder / "compress.json", sealed({"request": {}}))
    files["code"].rename(folder / "scores.json")
    ended = calmix("check", folder, "--keep-at-least", "0.9").ok()
    assert "code 90 % (100 generated answers)" in ended.out
    assert "not measured" not in ended.err
    more = ("-o", folder / "compress.json", "--overwrite")
    ended = calmix("check", folder, "--keep-at-least", "0.9", *more)
    assert "compress.json is the input" in ended.line
