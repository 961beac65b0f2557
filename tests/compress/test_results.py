"""Results are compared with what they were made from, by whoever reads them."""

import json
import shutil
from pathlib import Path

import pytest

from calmix.compression.results import Results
from calmix.compression.running import stages
from calmix.evaluation.scores import write_scores
from calmix.files import sha256_file, write_json
from calmix.manifest import sealed
from calmix.progress import Progress
from calmix.pruning.engine import Run
from calmix.pruning.work import SUFFIX
from tests.diagnostics.conftest import interrupting
from tests.tiny import hashes

FLOOR = ("--keep-at-least", "0.05")


@pytest.fixture
def out(compressed, tmp_path):
    """A finished compression, moved to another folder."""
    return Path(shutil.copytree(compressed, tmp_path / "out"))


@pytest.fixture
def lines(calmix, command):
    """Return a function that reads a compression in every way and returns the refusals."""

    def read(out):
        inspected = calmix("doctor", "inspect", out, "--json")
        ways = (("report", out), ("check", out, *FLOOR), ("compare", out), command(out))
        assert inspected.code == 2
        return [json.loads(inspected.out)["problems"][0], *(calmix(*way).line for way in ways)]

    return read


def changed(path, change):
    """Change a sealed JSON file as another run would have written it."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, sealed(value))


def other_weights(model):
    """Change a weight, and the manifest too, as another run of the same request would."""
    shard = max(model.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    files = {shard.name: sha256_file(shard)}
    changed(model / "calmix.json", lambda value: value["files"].update(files))


def test_moved_folder(calmix, command, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(out)
    for path in (out, "out", tmp_path / "link"):
        calmix("report", path).ok()
        assert calmix("check", path, *FLOOR).code in (0, 1)
        calmix("doctor", "inspect", path).ok()
        assert calmix(*command(path)).ok().err.count("already done") == 5


def test_swapped_model_is_refused(calmix, lines, out, tiny_folder, tmp_path):
    calmix(
        "prune", tiny_folder, "--method", "magnitude", "--sparsity", 0.6, "-o", tmp_path / "other"
    ).ok()
    shutil.rmtree(out / "model")
    shutil.copytree(tmp_path / "other", out / "model")
    for line in lines(out):
        assert "model was made on another request (method: magnitude, now distill)" in line


def test_changed_weights_are_refused(lines, out):
    other_weights(out / "model")
    for line in lines(out):
        assert f"{out}/scores.json was made from " in line
        assert f"but {out}/model (" in line
        assert line.endswith(f"delete {out}/scores.json and run its calmix compress again")


def test_unlisted_weights_are_refused(lines, out):
    shard = max((out / "model").glob("*.safetensors"))
    shutil.copyfile(max((out / "pruned").glob("*.safetensors")), shard)
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    for line in lines(out):
        assert f"{shard} is damaged or changed" in line


def test_foreign_scores_are_refused(lines, out):
    def change(value):
        value["model"]["sha256"] = value["scores"]["fingerprint"] = "0" * 64

    changed(out / "scores.json", change)
    for line in lines(out):
        assert "scores.json was made from" in line
        assert "(000000000000), but " in line


def test_edited_scores_are_refused(calmix, lines, out):
    value = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    for task in value["scores"]["tasks"]:
        task["values"] = [1.0] * len(task["values"])
    (out / "scores.json").write_text(json.dumps(value), encoding="utf-8")
    for line in lines(out):
        assert "scores.json is damaged or changed: its hash does not match" in line
    del value["manifest_sha256"]
    (out / "scores.json").write_text(json.dumps(value), encoding="utf-8")
    for line in (*lines(out)[1:], calmix("check", out / "scores.json", *FLOOR).line):
        assert "scores.json is damaged or of an older calmix" in line


def test_scores_of_another_slice_are_refused(calmix, lines, out, tiny_folder, place):
    words = ("--suite", place / "made.yaml", "--limit", 1, "--no-distance", "--overwrite")
    scored = ("evaluate", out / "model", "--against", tiny_folder, "-o", out / "scores.json")
    calmix(*scored, *words).ok()
    for line in lines(out):
        assert "scores.json was made on another request (suite.hash: " in line


def test_answers_to_other_prompts_are_refused(lines, out):
    path = out / "answers.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, sealed(value | {"request": {"prompts": "others"}}))
    for line in lines(out):
        assert "answers.json was made on another request (prompts: " in line


def test_a_damaged_pack_is_refused(calmix, command, tmp_path):
    out = tmp_path / "out"
    again = command(out, "--for", "storage", "--bits", "4", sparse=False)
    calmix(*again).ok()
    weights = max((out / "pack").glob("*.safetensors"))
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    for words in (("report", out), ("check", out, *FLOOR), ("compare", out), again):
        assert f"{weights} is damaged or changed" in calmix(*words).line


def test_text_that_changed_since_is_not_taken_for_the_one_that_was_drawn(
    calmix, command, out, place, tmp_path
):
    text = place / "text.txt"
    before = text.read_bytes()
    try:
        text.write_bytes(before.replace(b"apple", b"grape"))
        line = calmix(*command(out)).line
    finally:
        text.write_bytes(before)
    assert "calibration was made on another request (files: " in line
    calmix(*command(out)).ok()


def test_model_of_another_set_is_refused(calmix, command, lines, out, tiny_folder, place):
    shutil.rmtree(out / "calibration")
    calmix(
        "calibrate",
        place / "text.txt",
        "-m",
        tiny_folder,
        "--rows",
        16,
        "--length",
        256,
        "--seed",
        1,
        "--leakage",
        "off",
        "-o",
        out / "calibration",
    ).ok()
    for line in lines(out):
        assert "calibration was made on another request (seed: 1, now 0)" in line
    shutil.rmtree(out / "calibration")
    calmix("report", out).ok()  # what is gone is not compared
    calmix(*command(out)).ok()  # and the same is drawn again


def test_killed_and_moved_run_resumes(calmix, command, compressed, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "block", interrupting(Run.block))
        assert calmix(*command(tmp_path / "cut")).code == 130
    moved = tmp_path / "elsewhere" / "out"
    moved.parent.mkdir()
    (tmp_path / "cut").rename(moved)
    assert (moved / f"pruned{SUFFIX}").is_dir()
    calmix(*command(moved)).ok()
    ours, theirs = (hashes(one / "pruned") for one in (moved, compressed))
    assert {n: h for n, h in ours.items() if n != "calmix.json"} == {
        n: h for n, h in theirs.items() if n != "calmix.json"
    }


def test_folder_of_an_older_version(calmix, lines, out):
    changed(out / "compress.json", lambda value: value.pop("stages"))
    for line in lines(out):
        assert "was made by an older calmix, which did not record what its results were" in line


def test_check_compares_scores_with_their_model(calmix, compressed, out, tmp_path):
    file = tmp_path / "measured.json"
    value = json.loads((compressed / "scores.json").read_text(encoding="utf-8"))
    value["scores"]["model"] = str(out / "model")
    write_scores(file, value)
    ended = calmix("check", file, *FLOOR)
    assert (ended.code in (0, 1), "were checked" in ended.err) == (True, False)
    other_weights(out / "model")
    line = calmix("check", file, *FLOOR).line
    assert f"measured.json was made from {out}/model (" in line
    shutil.rmtree(out / "model")
    ended = calmix("check", file, *FLOOR)
    assert f"no folder {out}/model is here: only its scores were checked" in ended.err


def test_inspect_lists_unhashed_files(calmix, compressed):
    ended = calmix("doctor", "inspect", compressed).ok()
    named = "card.html, compress-run.json, model/README.md, model/calmix-run.json"
    assert f"not covered by a hash: {named}" in ended.out


def test_mix_without_written_rows_resumes(asked, place, tmp_path):
    """Its set names no model that wrote it."""
    text = f"{place / 'text.txt'}:0.999,self-written:0.001"
    suite = str(place / "made.yaml")
    stage = stages(asked(calibration=text, effort="quick", suite=suite), tmp_path)[0]
    assert stage.name == "write the calibration set"
    stage.run(Progress())
    Results().check(stage.result)
