"""`rerun`: the same hashes from the manifest alone, or the input that differs."""

import json

import pytest
from safetensors.torch import load_file, save_file

from calmix.files import write_json
from calmix.manifest import sealed
from tests.tiny import save_tiny_model

SMALL = ("--rows", 8, "--length", 32, "--leakage", "off")


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def sources(tmp_path, text_file):
    path = tmp_path / "own.yaml"
    path.write_text("mine:\n  licence: MIT\n  reader: {type: file, path: text.txt}\n")
    return path


def prune(calmix, model, output, *options):
    calmix("prune", model, "-o", output, "--sparsity", 0.5, *options).ok()
    return output / "calmix.json"


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_a_checkpoint_is_made_again_with_the_same_hashes(calmix, model, sources, tmp_path, method):
    drawn = ("--calibration", "mine", "--sources", sources, *SMALL, "--seed", 3)
    if method == "magnitude":
        drawn = ()
    manifest = prune(calmix, model, tmp_path / "first", "--method", method, *drawn)
    before = sorted(tmp_path.iterdir())
    ended = calmix("doctor", "rerun", manifest).ok()
    assert "the same: every file" in ended.out
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"
    ended = calmix("doctor", "rerun", manifest.parent, "-o", tmp_path / "second", "--json")
    told = json.loads(ended.out)
    assert (told["same"], told["differing"], told["inputs"]) == (True, [], [])
    first, second = (json.loads((p / "calmix.json").read_text())
                     for p in (manifest.parent, tmp_path / "second"))  # fmt: skip
    assert first == second, "a rerun can be rerun"


def test_one_of_several_targets_on_a_generated_set_is_made_again(calmix, model, tmp_path):
    options = ("--sparsity", "0.4,0.5", "--calibration", "self-cal", *SMALL)
    assert calmix("prune", model, "-o", tmp_path / "both", *options).code == 0
    calmix("doctor", "rerun", tmp_path / "both" / "sparsegpt-0.5").ok()


LARGER = ("--rows", 16, *SMALL[2:])  # a recovery holds rows out


def test_a_recovered_checkpoint_is_made_again_with_the_same_hashes(
    calmix, model, sources, tmp_path
):
    drawn = ("--calibration", "mine", "--sources", sources, *LARGER)
    first = tmp_path / "first"
    prune(calmix, model, tmp_path / "pruned", *drawn)
    how = ("--against", model, *drawn, "--epochs", 1, "-o", first)
    assert calmix("recover", tmp_path / "pruned", *how).code == 0
    before = sorted(tmp_path.iterdir())
    ended = calmix("doctor", "rerun", first, "-o", tmp_path / "new" / "second", "--json").ok()
    told = json.loads(ended.out)
    assert (told["same"], told["differing"], told["inputs"]) == (True, [], [])
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "new"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["second"]
    kept, again = (json.loads((folder / "calmix.json").read_text())
                   for folder in (first, tmp_path / "new" / "second"))  # fmt: skip
    assert kept == again, "a rerun can be rerun"

    def changed(**parts):
        write_json(first / "calmix.json", sealed(kept | parts))
        return calmix("doctor", "rerun", first)

    run = json.loads((first / "calmix-run.json").read_text())
    write_json(first / "calmix-run.json", run | {"machine": "riscv"})
    other = {"sha256": "0" * 64}
    told = changed(
        pruned=kept["pruned"] | {"versions": {"torch": "1.0"}},
        files=kept["files"] | {"model-00001-of-00004.safetensors": "0" * 64},
    )
    assert "not the same: model-00001-of-00004.safetensors" in told.err
    assert "pruned.versions.torch: 1.0, now" in told.out
    assert "machine: riscv, now" in told.out
    for parts, line in (
        ({"calibration": kept["calibration"] | other}, "the calibration set changed"),
        ({"processes": 2}, "by 2 processes"), ({"request": None}, "holds no request"),
        ({"against": kept["against"] | other}, "has changed"),
        ({"model": kept["model"] | other}, "has changed"),
    ):  # fmt: skip
        assert line in changed(**parts).err
    (tmp_path / "pruned").rename(tmp_path / "moved")
    assert str(tmp_path / "pruned") in changed().line


OWN = ("--sources", "own.yaml")


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("self-written", ()), ("sgs,seeds=mine", OWN),
        ("mine:0.3,text.txt:0.7", (*OWN, "--packing", "concat")),
    ],
)  # fmt: skip
def test_a_set_is_made_again(calmix, model, tmp_path, monkeypatch, what, more):
    monkeypatch.chdir(tmp_path)
    calmix("calibrate", what, "-m", model, "-o", "set", *SMALL, *more).ok()
    calmix("doctor", "rerun", "set/manifest.json", "-o", "again").ok()
    first, second = ((tmp_path / name / "calibration.safetensors").read_bytes()
                     for name in ("set", "again"))  # fmt: skip
    assert first == second


def test_another_text_or_model_is_told_before_any_work(calmix, model, text_file, tmp_path):
    manifest = prune(calmix, model, tmp_path / "first", "--calibration", text_file, *SMALL)
    text_file.write_text("other words " * 5000)
    ended = calmix("doctor", "rerun", manifest, "-o", tmp_path / "second")
    assert f"changed (sources.{text_file}." in ended.err
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ended = calmix("doctor", "rerun", manifest, "-o", tmp_path / "second")
    assert f"the model {model} has changed" in ended.line
    assert not list(tmp_path.glob("second*"))


def test_code_of_a_model_runs_again_only_if_asked_for(calmix, model, text_file, tmp_path):
    options = ("--calibration", text_file, *SMALL, "--trust-remote-code")
    manifest = prune(calmix, model, tmp_path / "first", *options)
    assert "--trust-remote-code" in calmix("doctor", "rerun", manifest).line
    assert calmix("doctor", "rerun", manifest, "--trust-remote-code").code == 0


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", "no manifest"),
        ("[1]", "holds no JSON object"),
        ("x", "no JSON"),
        ('{"kind": "pruned checkpoint"}', "damaged or changed"),
        (json.dumps(sealed({"kind": "pruned checkpoint"})), "a study made it"),
        (json.dumps(sealed({"kind": "pruned checkpoint", "request": {}})), "lacks what it takes"),
    ],
)
def test_manifests_that_cannot_be_used_give_one_line(calmix, tmp_path, content, line):
    (tmp_path / "calmix.json").write_text(content)
    ended = calmix("doctor", "rerun", tmp_path / "calmix.json")
    assert line in ended.line
    assert calmix("doctor", "rerun", tmp_path / "nowhere" / "calmix.json").code == 2
