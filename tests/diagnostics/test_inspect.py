"""`inspect`: a whole folder is told so; every way to damage one is named, with exit code 2."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from calmix.files import sha256_file, write_json
from calmix.manifest import sealed
from tests.tiny import load_weights

SMALL = ("--rows", 6, "--length", 32, "--leakage", "off")


@pytest.fixture
def pruned(calmix, tiny_folder, text_file, tmp_path):
    folder = tmp_path / "pruned"
    calmix(
        "prune", tiny_folder, "-o", folder, "--sparsity", 0.5, "--calibration", text_file, *SMALL
    ).ok()
    return folder


def health(calmix, path):
    ended = calmix("doctor", "inspect", path, "--json")
    return ended, json.loads(ended.out)


def test_a_whole_checkpoint_is_told_so(calmix, pruned, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ended = calmix("doctor", "inspect", pruned).ok()
    assert "intact: every file matches its manifest" in ended.out
    assert "50.00%" in ended.out
    rows = [
        line
        for line in calmix("doctor", "inspect", pruned, "--layers").out.splitlines()
        if "_proj" in line
    ]
    assert len([row for row in rows if row.startswith(" model.layers")]) == 14
    _, told = health(calmix, pruned)
    assert not told["problems"]
    assert len(told["layers"]) == 14
    assert all(layer["sparsity"] == 0.5 for layer in told["layers"])
    assert all(0 < layer["error"] < 1 and layer["damping"] == 0.01 for layer in told["layers"])


def test_weights_that_were_zero_before_are_not_counted_as_pruned(
    calmix, tiny_folder, text_file, tmp_path
):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_weights(model)
    tensors["model.layers.0.self_attn.q_proj.weight"][:, ::2] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = ("--sparsity", 0.2, "--calibration", text_file, *SMALL, "-o", tmp_path / "out")
    assert calmix("prune", model, *options).code == 0
    weight = load_weights(tmp_path / "out")
    assert (weight["model.layers.0.self_attn.q_proj.weight"] == 0).float().mean() > 0.4
    _, told = health(calmix, tmp_path / "out")
    assert all(abs(layer["sparsity"] - 0.2) < 1e-3 for layer in told["layers"])


def test_a_checkpoint_moved_elsewhere_is_still_whole(calmix, pruned, tmp_path):
    shutil.move(pruned, tmp_path / "elsewhere")
    assert calmix("doctor", "inspect", tmp_path / "elsewhere" / "calmix.json").code == 0


@pytest.mark.parametrize(
    "name", ["model-00001-of-00004.safetensors", "config.json", "tokenizer.json"]
)
def test_every_damaged_changed_or_missing_file_is_named(calmix, pruned, name):
    path = pruned / name
    raw = path.read_bytes()
    for damaged in (
        raw[:-1],
        raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:],
        raw + b"\n",
        b"",
    ):
        path.write_bytes(damaged)
        ended = calmix("doctor", "inspect", pruned)
        assert str(path) in ended.line
    path.unlink()
    ended = calmix("doctor", "inspect", pruned)
    assert name in ended.line
    assert "missing" in ended.line


def test_a_changed_manifest_is_named_and_an_unlisted_file_told(calmix, pruned):
    (pruned / "model-00002.safetensors").write_bytes(b"")
    ended, told = health(calmix, pruned)
    assert ended.code == 0
    assert any("model-00002" in line for line in told["warnings"])
    path = pruned / "calmix.json"
    manifest = json.loads(path.read_text())
    for change in ({"dtype": "float16"}, {"files": []}, {"pruning": None}, {"kind": 3}):
        path.write_text(json.dumps(manifest | change))
        ended = calmix("doctor", "inspect", pruned)
        assert (ended.code, "calmix.json" in ended.line) == (2, True)
    path.write_text("{")
    assert "no JSON" in calmix("doctor", "inspect", pruned).line


def test_weights_that_contradict_a_manifest_with_right_hashes_are_found(calmix, pruned):
    path = pruned / "calmix.json"
    manifest = json.loads(path.read_text())
    for index, where, value in ((0, slice(None), 1.0), (1, (0, 0), float("nan"))):
        file = pruned / f"model-0000{index + 1}-of-00004.safetensors"
        tensors = load_file(file)
        tensors[f"model.layers.{index}.self_attn.q_proj.weight"][where] = value
        save_file(tensors, file, metadata={"format": "pt"})
        manifest["files"][file.name] = sha256_file(file)
    write_json(path, sealed(manifest))
    ended, told = health(calmix, pruned)
    assert ended.code == 2
    assert any("layers.0 has " in line for line in told["problems"])
    assert any(
        "1.self_attn.q_proj.weight holds weights that are not" in line for line in told["problems"]
    )


def test_warnings_name_raised_damping_dead_inputs_and_lost_output(calmix, pruned):
    path = pruned / "calmix.json"
    manifest = json.loads(path.read_text())
    manifest["pruning"]["layers"][0] |= {"damping": 0.1, "dead_inputs": 9, "error": 0.4}
    write_json(path, sealed(manifest))
    ended, told = health(calmix, pruned)
    assert ended.code == 0
    assert [w for w in told["warnings"] if "damping was raised from 0.01 to 0.1" in w]
    assert [w for w in told["warnings"] if "9 of 32 inputs are dead" in w]
    assert [w for w in told["warnings"] if "lost 40.0%" in w]


def test_a_magnitude_checkpoint_has_no_errors_to_show(calmix, tiny_folder, tmp_path):
    options = ("--method", "magnitude", "--pattern", "2:4", "-o", tmp_path / "m")
    assert calmix("prune", tiny_folder, *options).code == 0
    ended = calmix("doctor", "inspect", tmp_path / "m").ok()
    assert "largest reconstruction errors" not in ended.out


def test_what_a_recovery_read_is_not_what_a_prune_without_text_lacked(
    calmix, tiny_folder, text_file, tmp_path
):
    pruned, folder = tmp_path / "pruned", tmp_path / "recovered"
    calmix("prune", tiny_folder, "-o", pruned, "--sparsity", 0.5, "--method", "magnitude")
    calmix(
        "recover", pruned, "--against", tiny_folder, "-o", folder, "--method", "blocks",
        "--calibration", text_file, "--epochs", 1, "--rows", 8, *SMALL[2:],
    ).ok()  # fmt: skip
    _, told = health(calmix, folder)
    assert not told["problems"]
    assert not told["warnings"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nowhere",), "there is nothing at nowhere"),
        ((".",), "holds nothing calmix has written"),
    ],
)
def test_mistakes_give_one_line(calmix, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    ended = calmix("doctor", "inspect", *arguments)
    assert line in ended.line
