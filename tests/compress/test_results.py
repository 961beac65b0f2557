"""Results are compared with what they were made from, by whoever reads them."""

import json
import shutil
from dataclasses import replace

import pytest

from calmix.compression.results import Results
from calmix.compression.run_stages import stages
from calmix.compression.stages import Stage
from calmix.errors import InputError
from calmix.evaluation.scores import load_scores, write_scores
from calmix.files import sha256_file, write_json
from calmix.manifest import sealed
from calmix.models.opening import open_model
from calmix.pruning.engine import Run
from calmix.pruning.work import SUFFIX
from tests.compress.conftest import build, damage, read, stopping
from tests.pruning.stopper import interrupting
from tests.tiny import hashes, tiny_gguf

FLOOR = ("--keep-at-least", "0.05")


@pytest.fixture
def lines(calmix, command):
    """Return a function that reads a compression in every way and returns the refusals."""

    def read_by_all(out):
        inspected = calmix("doctor", "inspect", out, "--json")
        ways = (("report", out), ("check", out, *FLOOR), ("compare", out), command(out))
        assert inspected.code == 2
        return [json.loads(inspected.out)["problems"][0], *(calmix(*way).line for way in ways)]

    return read_by_all


def changed(path, change):
    """Change a sealed JSON file as another run would have written it."""
    value = read(path)
    change(value)
    write_json(path, sealed(value))


def other_weights(out, _=None):
    """Change a weight, and the manifest too, as another run of the same request would."""
    shard = damaged_weights(out)
    files = {shard.name: sha256_file(shard)}
    changed(out / "model" / "calmix.json", lambda value: value["files"].update(files))


def damaged_weights(out, _=None):
    shard = max((out / "model").glob("*.safetensors"))
    damage(shard)
    return shard


def other_model(out, prune):
    shutil.rmtree(out / "model")
    prune("--method", "magnitude", "--sparsity", 0.6, "-o", out / "model")


def other_scores(out, _):
    def change(value):
        value["model"]["sha256"] = value["scores"]["fingerprint"] = "0" * 64

    changed(out / "scores.json", change)


def older_folder(out, _):
    changed(out / "compress.json", lambda value: value.pop("stages"))


OTHERS = {
    "model was made on another request (method: magnitude, now distill)": other_model,
    "scores.json was made from ": other_weights,
    ".safetensors is damaged or changed": damaged_weights,
    "(000000000000), but ": other_scores,
    "was made by an older calmix, which did not record what its results were": older_folder,
}


@pytest.mark.parametrize(("said", "change"), OTHERS.items())
def test_results_of_another_run_are_refused(calmix, lines, out, tiny_folder, said, change):
    change(out, lambda *words: calmix("prune", tiny_folder, *words).ok())
    for line in lines(out):
        assert said in line


def test_edited_scores_are_refused(calmix, lines, out):
    file = out / "scores.json"
    value = read(file)
    for task in value["scores"]["tasks"]:
        task["values"] = [1.0] * len(task["values"])
    write_json(file, value)
    for line in lines(out):
        assert "scores.json is damaged or changed: its hash does not match" in line
    del value["manifest_sha256"]
    write_json(file, value)
    for line in (*lines(out)[1:], calmix("check", file, *FLOOR).line):
        assert "scores.json is damaged or of an older calmix" in line


def test_text_changed_since_the_draw_is_refused(calmix, command, out, place):
    text = place / "text.txt"
    before = text.read_bytes()
    try:
        text.write_bytes(before.replace(b"apple", b"grape"))
        line = calmix(*command(out)).line
    finally:
        text.write_bytes(before)
    assert "calibration was made on another request (files: " in line
    calmix(*command(out)).ok()


def test_killed_and_moved_run_resumes(calmix, command, compressed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "block", interrupting(Run.block))
        assert calmix(*command(tmp_path / "cut")).code == 130
    moved = (tmp_path / "cut").rename(tmp_path / "moved")
    assert (moved / f"pruned{SUFFIX}").is_dir()
    monkeypatch.setattr(Stage, "run", stopping(Stage.run, 1))  # the prune alone
    assert calmix(*command(moved)).code == 130
    ours, theirs = (hashes(one / "pruned") for one in (moved, compressed))
    assert ours.pop("calmix.json") != theirs.pop("calmix.json")  # which names the folders
    assert ours == theirs


def test_check_compares_scores_with_their_model(calmix, out, tmp_path):
    file = tmp_path / "measured.json"
    value = read(out / "scores.json")
    value["scores"]["model"] = str(out / "model")
    write_scores(file, value)
    ended = calmix("check", file, *FLOOR)
    assert (ended.code in (0, 1), "were checked" in ended.err) == (True, False)
    other_weights(out)
    assert f"measured.json was made from {out}/model (" in calmix("check", file, *FLOOR).line
    shutil.rmtree(out / "model")
    said = f"only the scores of {out}/model were checked: its files are not here"
    assert said in calmix("check", file, *FLOOR).err
    any_file = str(tiny_gguf(tmp_path / "any.gguf"))  # that calmix did not make
    results, scores = Results(sha256_file), replace(load_scores(file), model=any_file)
    same = replace(scores, fingerprint=open_model(any_file).fingerprint)
    assert results.check_scores(out, same)
    with pytest.raises(InputError, match="put back what was there"):
        results.check_scores(out, replace(scores, fingerprint="of another file"))


def test_inspect_lists_unhashed_files(calmix, compressed):
    ended = calmix("doctor", "inspect", compressed).ok()
    named = "card.html, compress-run.json, model/README.md, model/calmix-run.json"
    assert f"not covered by a hash: {named}" in ended.out


def test_mix_without_written_rows_resumes(asked, place, tmp_path):
    """Its set names no model that wrote it."""
    text, suite = f"{place / 'text.txt'}:0.999,self-written:0.001", str(place / "made.yaml")
    request = asked(calibration=text, effort="quick", suite=suite)
    stage = stages(request, tmp_path)[0]
    assert stage.name == "write the calibration set"
    build(1, request, tmp_path)
    Results().check(stage.result)
