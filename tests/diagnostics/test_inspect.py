"""`inspect` of all results: their kinds, and every kind of damage is reported."""

import json
import shlex
import shutil

import pytest

from calmix.files import sha256_file, write_json
from calmix.inspecting import _command
from calmix.manifest import sealed
from calmix.pruning.requests import prune_request
from tests.tiny import hashes, quick

# By name: the kind, and a file that is checked by its bytes, or None.
KINDS = {
    "pruned": ("pruned checkpoint", "model-00001-of-00004.safetensors"),
    "several": ("folder of results", "sparsegpt-0.5/model-00001-of-00004.safetensors"),
    "recovered": ("recovered checkpoint", "model-00001-of-00004.safetensors"),
    "dropped": ("pruned checkpoint", "model-00001-of-00003.safetensors"),
    "pack": ("pack of a pruned checkpoint", "packed-model-00001-of-00004.safetensors"),
    "dense-pack": ("pack", "config.json"),
    "set": ("calibration set", "calibration.safetensors"),
    "written": ("calibration set", "calibration.safetensors"),
    "cut.unfinished": ("unfinished prune", "calibration/calibration.safetensors"),
    "cut": ("unfinished prune", None),
    "results": ("study store", "store.json"),
}


def health(calmix, path):
    return json.loads(calmix("doctor", "inspect", path, "--json").ok().out)


@pytest.mark.parametrize("name", KINDS)
def test_inspect_reports_kind_health_and_changes(calmix, made, tmp_path, name):
    kind, changed = KINDS[name]
    ended = calmix("doctor", "inspect", made / name).ok()
    lines = ended.out.strip().splitlines()
    assert f": {kind}; " in lines[0]
    assert lines[-1] == "intact: nothing is missing or damaged"
    assert "warning" not in ended.out
    assert "experts" not in ended.out or name == "dropped"
    said = [line for line in lines[1:-1] if not line.startswith("not covered by a hash")]
    assert [line.partition(":")[0] for line in said] == ["made by"] * ("checkpoint" in kind)
    unfinished = "blocks done: 1; to finish it: the same command with --resume"
    assert (unfinished in ended.out) == name.startswith("cut")
    if changed is None:
        return
    copy = shutil.copytree(made / name, tmp_path / name)
    file = copy / changed
    raw = file.read_bytes()
    file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    assert str(file.parent) in calmix("doctor", "inspect", copy).line


@pytest.mark.parametrize(
    "name",
    quick(["recovered", "quantised"], ["pruned", "bare", "dropped", "several/sparsegpt-0.5"]),
)
def test_printed_command_reproduces_the_checkpoint(calmix, made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(made)  # relative paths in the manifest start there
    program, *words = shlex.split(health(calmix, made / name)["facts"]["command"])
    again = ["own.yaml" if word == "FILE" else word for word in words]
    assert program == "calmix"
    calmix(*again, "-o", tmp_path / "again").ok()
    (tmp_path / "again" / "README.md").write_text("a card", encoding="utf-8")
    assert hashes(tmp_path / "again") == {**hashes(tmp_path / "again"), **hashes(made / name)}


def test_printed_command_has_options_that_differ_from_their_defaults(made):
    recovered = json.loads((made / "recovered" / "calmix.json").read_text(encoding="utf-8"))
    assert recovered["trust_remote_code"] is False
    for method, words in (
        ("llama,type=Q3_K_M", "--method llama"),
        ("llama,type=Q3_K_M,flat=true", "--method llama,flat=True"),
    ):
        request = prune_request(method=method, calibration="stories").record()
        record = {"model": {"name": "m"}, "request": request, "trust_remote_code": True}
        command = _command(record)
        assert f"{words} " in command
        assert "--pattern Q3_K_M " in command
        assert command.endswith("--trust-remote-code")


def test_inspect_warns_of_unlisted_files_and_refuses_a_changed_manifest(calmix, made, tmp_path):
    pruned = shutil.copytree(made / "pruned", tmp_path / "pruned")
    (pruned / "model-00002.safetensors").write_bytes(b"")
    path = pruned / "calmix.json"
    findings = health(calmix, path)
    assert "model-00002" in findings["warnings"][0]
    assert len(findings["layers"]) == 14
    for layer in findings["layers"]:
        assert (layer["sparsity"], layer["damping"], 0 < layer["error"] < 1) == (0.5, 0.01, True)
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for change in ({"dtype": "float16"}, {"files": []}, {"pruning": None}, {"kind": 3}):
        path.write_text(json.dumps(manifest | change))
        assert "calmix.json" in calmix("doctor", "inspect", pruned).line
    path.write_text("{")
    assert "not JSON" in calmix("doctor", "inspect", pruned).line


def test_inspect_checks_a_packs_model(calmix, made, tmp_path):
    """An intact pack with the manifest of another model."""
    copy = shutil.copytree(made / "pack", tmp_path / "pack")
    shutil.copyfile(made / "several" / "sparsegpt-0.4" / "calmix.json", copy / "calmix.json")
    path = copy / "calmix-pack.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"]["calmix.json"] = sha256_file(copy / "calmix.json")
    write_json(path, sealed(manifest))
    line = calmix("doctor", "inspect", copy).line
    assert "model-00001-of-00004.safetensors is damaged or changed" in line


def test_inspect_of_anything_else_is_one_line(calmix, made, tmp_path):
    line = calmix("doctor", "inspect", made / "other.json").line
    assert "cannot be checked: name a folder" in line
    assert "holds no result of calmix" in calmix("doctor", "inspect", tmp_path).line
