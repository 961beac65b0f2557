"""`rerun`: the same hashes from the manifest alone, or the input that differs."""

import json
import shutil

import pytest

from calmix.files import write_json
from calmix.manifest import sealed

SMALL = ("--rows", 8, "--length", 32, "--leakage", "off")
SETS = ("set", "written", "continued")


@pytest.mark.parametrize(
    "name", ["pruned", "bare", "recovered", "dropped", "pack", "several/sparsegpt-0.5", *SETS]
)
def test_a_rerun_gives_the_same_result(calmix, made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(made)  # relative paths in the manifest start there
    file = "manifest.json" if name in SETS else "calmix.json"
    told = calmix("doctor", "rerun", made / name / file, "-o", tmp_path / "new" / "again", "--json")
    told = json.loads(told.ok().out)
    assert (told["same"], told["differing"], told["inputs"]) == (True, [], [])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["again"]
    first, second = (folder / file for folder in (made / name, tmp_path / "new" / "again"))
    assert first.read_bytes() == second.read_bytes(), "a rerun can be rerun"
    if name in SETS:
        first, second = (path.with_name("calibration.safetensors") for path in (first, second))
        assert first.read_bytes() == second.read_bytes()


def test_differences_are_named(calmix, made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    folder = shutil.copytree(made / "recovered", tmp_path / "recovered")
    kept = json.loads((folder / "calmix.json").read_text(encoding="utf-8"))

    def changed(**parts):
        write_json(folder / "calmix.json", sealed(kept | parts))
        return calmix("doctor", "rerun", folder)

    run = json.loads((folder / "calmix-run.json").read_text())
    write_json(folder / "calmix-run.json", run | {"machine": "riscv"})
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
        ({"model": kept["model"] | {"name": "/moved"}}, "/moved"),
    ):  # fmt: skip
        assert line in changed(**parts).err


def test_a_models_code_runs_if_allowed_and_another_text_is_reported_before_any_work(
    calmix, tiny_folder, text_file, tmp_path
):
    asked = ("prune", tiny_folder, "--calibration", text_file, *SMALL, "--sparsity", 0.5)
    calmix(*asked, "--trust-remote-code", "-o", tmp_path / "first").ok()
    again = ("doctor", "rerun", tmp_path / "first")
    assert "--trust-remote-code" in calmix(*again).line
    again += ("--trust-remote-code",)
    assert "the same: every file" in calmix(*again).ok().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "text.txt"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    line = calmix(*again, "-o", tmp_path / "mine").line
    assert line.endswith("not empty: choose another folder")  # there is no --overwrite
    text_file.write_text("other words " * 5000)
    ended = calmix(*again, "-o", tmp_path / "second")
    assert f"changed (sources.{text_file}." in ended.err
    assert not list(tmp_path.glob("second*"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"kind": "x"}', "cannot be rerun: its kind is 'x'"),
        ("[1]", "not a JSON object"),
        ('{"kind": "pruned checkpoint"}', "damaged or changed"),
        (json.dumps(sealed({"kind": "pruned checkpoint"})), "a study made it"),
        (json.dumps(sealed({"kind": "pruned checkpoint", "request": {}})), "lacks data to"),
    ],
)
def test_manifests_that_cannot_be_used_give_one_line(calmix, tmp_path, content, line):
    (tmp_path / "calmix.json").write_text(content)
    assert line in calmix("doctor", "rerun", tmp_path / "calmix.json").line


def test_a_folder_without_a_manifest_suggests_one_that_has(calmix, made):
    assert "sparsegpt-0.4" in calmix("doctor", "rerun", made / "several").line
    line = calmix("doctor", "rerun", made / "dense-pack").line
    assert "neither calmix.json nor manifest.json" in line
