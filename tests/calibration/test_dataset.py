"""Saving, opening and exporting calibration sets."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix import CalibrationSet
from calmix.calibration import build, parse_mix
from calmix.errors import InputError
from calmix.manifest import sealed
from tests.tiny import save_tiny_model, tiny_tokenizer

TENSORS = "calibration.safetensors"


def test_a_set_is_drawn_saved_read_back_and_exported(calmix, sources, tiny, tiny_folder, tmp_path):
    mix = f"{sources['lower']}:0.5,{sources['upper']}:0.5"
    folder, text = tmp_path / "set", tmp_path / "set.jsonl"
    how = ("-m", tiny_folder, "--rows", 4, "--length", 32, "--leakage", "off")
    told = json.loads(calmix("calibrate", mix, *how, "-o", folder, "--json").ok().out)
    made, again = build(parse_mix(mix), tiny, rows=4, length=32), CalibrationSet.open(folder, tiny)
    assert torch.equal(again.ids, made.ids)
    assert again.sources == made.sources
    assert made.sha256 == again.sha256 == again.manifest["sha256"] == told["sha256"]
    assert again.counts == told["counts"]
    assert again.manifest["sources"] == made.manifest["sources"]
    again.save(tmp_path / "again")
    for name in (TENSORS, "manifest.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    foreign, tokenizer = save_tiny_model(tmp_path / "foreign"), tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(foreign)
    other, export = tmp_path / "other.jsonl", ("export", folder, "-m", tiny_folder, "-o", text)
    calmix(*export).ok()
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == list(made.sources)
    assert rows[0]["text"] == tiny.tokenizer.decode(made.ids[0], skip_special_tokens=True)
    for words, line in (
        (export, "exists: choose another file"),
        (("export", folder, "-m", foreign, "-o", other), "another tokenizer"),
        (("export", tiny_folder, "-m", tiny_folder, "-o", other), "no effect with --to pack"),
        (("export", folder, "-o", other), "name its model with --model"),
        (("export", folder, "--to", "openvino", "-o", other), "it has no export to openvino"),
        (("calibrate", mix, *how, "-o", folder), "exists and is not empty"),
        (("calibrate", folder, *how, "-o", other), "is already a calibration set"),
    ):
        assert line in calmix(*words).line
    assert not other.exists()
    ended = calmix("calibrate", mix, *how, "-o", folder, "--overwrite").ok()
    assert "4 rows of 32 tokens" in ended.out
    assert "not checked for leakage" in ended.out


def _tensors(change):
    def damage(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

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
        (lambda f: (f / TENSORS).unlink(), "is damaged: make it again"),
        (lambda f: (f / "manifest.json").unlink(), "there is no calibration set at"),
        (lambda f: (f / "manifest.json").write_text("{", "utf-8"), "is damaged: not JSON"),
        (lambda f: (f / "manifest.json").write_text("{}", "utf-8"), "is not a calibration set"),
    ],
)
def test_damage_is_noticed(sources, tiny, tmp_path, damage, message):
    mix = parse_mix(f"uniform:{sources['lower']},{sources['upper']}")
    folder = build(mix, tiny, rows=6, length=32).save(tmp_path / "set")
    damage(folder)
    with pytest.raises(InputError, match=message):
        CalibrationSet.open(folder)
