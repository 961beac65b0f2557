"""Results are compared with what they were made from, by whoever reads them."""

import json
import shutil
from dataclasses import replace

import pytest

from calmix.compression.results import Results
from calmix.compression.run_stages import stages
from calmix.errors import InputError
from calmix.evaluation.scores import load_scores, write_scores
from calmix.files import sha256_file, write_json
from calmix.manifest import sealed
from calmix.models.opening import open_model
from calmix.progress import Progress
from tests.compress.conftest import damage
from tests.tiny import tiny_gguf

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


def test_mix_without_written_rows_resumes(asked, place, tmp_path):
    """Its set names no model that wrote it."""
    text = f"{place / 'text.txt'}:0.999,self-written:0.001"
    suite = str(place / "made.yaml")
    stage = stages(asked(calibration=text, effort="quick", suite=suite), tmp_path)[0]
    assert stage.name == "write the calibration set"
    stage.run(Progress())
    Results().check(stage.result)
