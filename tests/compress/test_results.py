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
from calmix.progress import Progress
from calmix.pruning.engine import Run
from calmix.pruning.work import SUFFIX
from tests.compress.conftest import damage, stopping
from tests.pruning.stopper import interrupting
from tests.tiny import hashes, tiny_gguf

FLOOR = ("--keep-at-least", "0.05")


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
    damage(shard)
    files = {shard.name: sha256_file(shard)}
    changed(model / "calmix.json", lambda value: value["files"].update(files))


def swap_model(out, remake):
    shutil.rmtree(out / "model")
    remake("prune", "--method", "magnitude", "--sparsity", 0.6, "-o", out / "model")


def unlisted_weights(out, _):
    damage(max((out / "model").glob("*.safetensors")))


def other_scores(out, _):
    def change(value):
        value["model"]["sha256"] = value["scores"]["fingerprint"] = "0" * 64

    changed(out / "scores.json", change)


def older_folder(out, _):
    changed(out / "compress.json", lambda value: value.pop("stages"))


OTHERS = {
    "model was made on another request (method: magnitude, now distill)": swap_model,
    "scores.json was made from ": lambda out, _: other_weights(out / "model"),
    ".safetensors is damaged or changed": unlisted_weights,
    "(000000000000), but ": other_scores,
    "was made by an older calmix, which did not record what its results were": older_folder,
}


@pytest.mark.parametrize(("said", "change"), OTHERS.items())
def test_results_of_another_run_are_refused(calmix, lines, out, tiny_folder, said, change):
    change(out, lambda verb, *words: calmix(verb, tiny_folder, *words).ok())
    for line in lines(out):
        assert said in line


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


def test_killed_and_moved_run_resumes(calmix, command, compressed, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "block", interrupting(Run.block))
        assert calmix(*command(tmp_path / "cut")).code == 130
    moved = (tmp_path / "cut").rename(tmp_path / "moved")
    assert (moved / f"pruned{SUFFIX}").is_dir()
    monkeypatch.setattr(Stage, "run", stopping(Stage.run, 1))  # the prune alone
    assert calmix(*command(moved)).code == 130
    ours, theirs = (hashes(one / "pruned") for one in (moved, compressed))
    assert ours.pop("calmix.json") != theirs.pop("calmix.json")  # which names the folders
    assert ours == theirs


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
    assert f"only the scores of {out}/model were checked: its files are not here" in ended.err
    file = tiny_gguf(tmp_path / "any.gguf")  # that calmix did not make
    results, scores = Results(sha256_file), load_scores(tmp_path / "measured.json")
    scores = replace(scores, model=str(file), fingerprint=open_model(str(file)).fingerprint)
    assert results.check_scores(out, scores)
    with pytest.raises(InputError, match="put back what was there"):
        results.check_scores(out, replace(scores, fingerprint="of another file"))


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
