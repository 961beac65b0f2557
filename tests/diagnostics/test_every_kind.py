"""`inspect` of everything calmix writes: what it is, and what is wrong with it; `rerun` beside."""

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

from calmix.cli import app
from calmix.files import sha256_file, write_json
from calmix.manifest import sealed
from tests import synthetic
from tests.conftest import write_text_file
from tests.pruning.test_streamed import interrupt_before
from tests.tiny import save_tiny_model

SMALL = ("--rows", 8, "--length", 32, "--leakage", "off")
# By name: what it is, and a file of it that is checked by its bytes; None where none is.
KINDS = {
    "pruned": ("pruned checkpoint", "model-00001-of-00004.safetensors"),
    "several": ("folder of results", "sparsegpt-0.5/model-00001-of-00004.safetensors"),
    "recovered": ("recovered checkpoint", "model-00001-of-00004.safetensors"),
    "dropped": ("pruned checkpoint", "model-00001-of-00003.safetensors"),
    "pack": ("pack of a pruned checkpoint", "model-00001-of-00004.safetensors"),
    "dense-pack": ("pack", "config.json"),
    "set": ("calibration set", "calibration.safetensors"),
    "written": ("calibration set", "calibration.safetensors"),
    "cut.unfinished": ("unfinished prune", "calibration/calibration.safetensors"),
    "cut": ("unfinished prune", None),
    "results": ("study store", "store.json"),
}


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A folder with a result of every kind, named as in `KINDS`."""
    base = tmp_path_factory.mktemp("made")
    text = write_text_file(base / "text.txt")
    mixture = save_tiny_model(base / "mixture", "qwen3_moe")

    def calmix(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["calmix", *map(str, arguments)])
            app([str(one) for one in arguments], standalone_mode=False)

    prune = ("prune", tiny_folder, "--calibration", text, *SMALL)
    calmix(*prune, "--sparsity", 0.5, "-o", base / "pruned")
    calmix(*prune, "--sparsity", "0.4,0.5", "-o", base / "several")
    calmix("recover", base / "pruned", "--against", tiny_folder, "--method", "blocks",
           "--epochs", 1, "--calibration", text, "--rows", 16, *SMALL[2:],
           "-o", base / "recovered")  # fmt: skip
    calmix("prune", mixture, "--calibration", text, *SMALL, "--drop-experts", 0.25, "-o",
           base / "dropped")  # fmt: skip
    calmix("export", "--to", "pack", base / "pruned", "-o", base / "pack")
    calmix("export", "--to", "pack", tiny_folder, "-o", base / "dense-pack")
    calmix("calibrate", text, "--model", tiny_folder, *SMALL, "-o", base / "set")
    calmix("calibrate", "self-cal", "--model", tiny_folder, *SMALL, "-o", base / "written")
    calmix("calibrate", "measure", text, "--model", tiny_folder, "--rows", 8, "--length", 32,
           "--draws", 1, "-o", base / "measured.json")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        interrupt_before(patch, 1)
        calmix(*prune, "--sparsity", 0.5, "-o", base / "cut")
    few = synthetic.Plan(seeds=(0,), sources=("a", "b", "c", "d"), dimensions=("general", "code"))
    synthetic.save(synthetic.study(few), base / "results")
    return base


@pytest.mark.parametrize("name", KINDS)
def test_it_is_told_what_it_is_and_that_it_is_whole(calmix, made, name):
    ended = calmix("doctor", "inspect", made / name).ok()
    lines = ended.out.strip().splitlines()
    assert lines[0].endswith(f": {KINDS[name][0]}")
    fine = ("every file matches its manifest", "nothing missing or damaged")
    assert lines[-1] in [f"intact: {words}" for words in fine]
    assert "warning" not in ended.out
    assert "experts" not in ended.out or name == "dropped"


@pytest.mark.parametrize("name", [name for name, (_, file) in KINDS.items() if file])
def test_a_changed_byte_is_found(calmix, made, tmp_path, name):
    copy = tmp_path / name
    shutil.copytree(made / name, copy)
    file = copy / str(KINDS[name][1])
    raw = file.read_bytes()
    file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    ended = calmix("doctor", "inspect", copy)
    assert str(file.parent) in ended.line


def test_what_is_left_of_unfinished_work_is_told(calmix, made):
    told = json.loads(calmix("doctor", "inspect", made / "cut", "--json").out)
    assert told["facts"]["blocks done"] == 1
    assert "--resume" in told["facts"]["to finish it"]


def test_a_packs_model_is_held_against_its_manifest(calmix, made, tmp_path):
    """A pack that is whole by itself, beside the manifest of another model."""
    copy = tmp_path / "pack"
    shutil.copytree(made / "pack", copy)
    shutil.copyfile(made / "several" / "sparsegpt-0.4" / "calmix.json", copy / "calmix.json")
    path = copy / "calmix-pack.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"]["calmix.json"] = sha256_file(copy / "calmix.json")
    write_json(path, manifest)
    assert (
        "model-00001-of-00004.safetensors is damaged or changed"
        in calmix("doctor", "inspect", copy).line
    )


def test_lacking_weights_are_not_taken_for_experts(calmix, made, tmp_path):
    copy = tmp_path / "lacking"
    shutil.copytree(made / "pruned", copy)
    file, path = copy / "model-00002-of-00004.safetensors", copy / "calmix.json"
    tensors = load_file(file)
    kept = {name: held for name, held in tensors.items() if ".layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"][file.name] = sha256_file(file)
    write_json(path, sealed(manifest))
    told = json.loads(calmix("doctor", "inspect", copy, "--json").out)
    (problem,) = told["problems"]
    assert "lacks the weights of layers.1" in problem


def test_what_is_no_result_or_has_no_manifest_is_one_line(calmix, made):
    for name in ("text.txt", "measured.json"):
        assert "is no file that can be checked" in calmix("doctor", "inspect", made / name).line
    empty = made / "results" / "locks"
    empty.mkdir(exist_ok=True)
    assert "holds nothing calmix has written" in calmix("doctor", "inspect", empty).line


@pytest.mark.parametrize("name", ["dropped", "pack", "written"])
def test_what_has_a_request_is_made_again(calmix, made, name):
    calmix("doctor", "rerun", made / name).ok()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("several", "sparsegpt-0.4"), ("dense-pack", "neither calmix.json nor manifest.json"),
        ("results", "name a pruned or recovered checkpoint"),
        ("measured.json", "which cannot be made again"), ("nothing", "there is no manifest"),
    ],
)  # fmt: skip
def test_what_has_none_is_one_line(calmix, made, name, line):
    ended = calmix("doctor", "rerun", made / name)
    assert line in ended.line
