"""Saving, opening and exporting calibration sets."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix import CalibrationSet
from calmix.calibration import build, parse_mix
from calmix.calibration.dataset import export_jsonl
from calmix.errors import InputError
from calmix.manifest import sealed


@pytest.fixture
def made(sources, tiny):
    mix = parse_mix(f"uniform:{sources['lower']},{sources['upper']}")
    return build(mix, tiny, rows=6, length=32)


@pytest.fixture
def folder(made, tmp_path):
    return made.save(tmp_path / "set")


def test_round_trip(made, folder, tiny, tmp_path):
    again = CalibrationSet.open(folder, tiny)
    assert torch.equal(again.ids, made.ids)
    assert again.sources == made.sources
    assert again.sha256 == made.sha256 == again.manifest["sha256"]
    assert again.manifest["sources"] == made.manifest["sources"]
    made.save(tmp_path / "other")
    again.save(tmp_path / "third")
    for name in ("calibration.safetensors", "manifest.json"):
        held = {(tmp_path / place / name).read_bytes() for place in ("set", "other", "third")}
        assert len(held) == 1
    export_jsonl(made, tiny.tokenizer, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["source"] for row in rows] == list(made.sources)
    assert rows[0]["text"] == tiny.tokenizer.decode(made.ids[0], skip_special_tokens=True)


def _tensors(change):
    def damage(folder):
        tensors = load_file(folder / "calibration.safetensors")
        change(tensors)
        save_file(tensors, folder / "calibration.safetensors")

    return damage


def _manifest(change, seal):
    def damage(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(seal(json.loads(path.read_text("utf-8")) | change)), "utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_tensors(lambda held: held["ids"][0].add_(1)), "is damaged: make it again"),
        (_tensors(lambda held: held["source"].mul_(-1).add_(1)), "is damaged: make it again"),
        (_manifest({"seed": 1}, dict), r"is damaged \(manifest.json\): make it again"),
        (_manifest({"format": 99}, sealed), "format 1, which .*: .* calibration set and format 99"),
        (lambda f: (f / "calibration.safetensors").unlink(), "is damaged: make it again"),
        (lambda f: (f / "manifest.json").unlink(), "there is no calibration set at"),
        (lambda f: (f / "manifest.json").write_text("{", "utf-8"), "is damaged: it is no JSON"),
        (lambda f: (f / "manifest.json").write_text("{}", "utf-8"), "holds no calibration set"),
    ],
)
def test_damage_is_noticed(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        CalibrationSet.open(folder)
