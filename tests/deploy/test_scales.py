"""Scales beside a model's weights that are damaged, or of another model: refused in one line."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix.deploy.gguf import export
from calmix.deploy.pack import pack
from calmix.errors import CalmixError
from calmix.pruning.solvers.grids import SCALES
from calmix.recovery.checkpoint import recover
from calmix.specs import recover_request
from tests.tiny import quick

FILES = {
    "cut": lambda raw: raw[:-10],
    "empty": lambda raw: b"",
    "noise": lambda raw: b"x" * 500,
}
SCALE = {
    "one dimension": lambda scale: scale[:, 0],
    "three dimensions": lambda scale: scale[None],
    "fewer rows": lambda scale: scale[:-1],
    "more rows": lambda scale: torch.cat([scale, scale]),
    "no rows": lambda scale: scale[:0],
    "groups that do not divide a row": lambda scale: torch.cat([scale] * 3, 1),
    "no groups": lambda scale: scale[:, :0],
    "integers": lambda scale: scale.int(),
    "float32": lambda scale: scale.float(),
    "no number": lambda scale: scale * float("nan"),
    "infinity": lambda scale: scale * float("inf"),
}
OCTAVES = {
    "short": lambda octaves: octaves[:-1],
    "floats": lambda octaves: octaves.float(),
    "two dimensions": lambda octaves: octaves[None],
}
BLOCKS = {
    "short": lambda data: data[:, :-2],
    "fewer rows": lambda data: data[1:],
    "floats": lambda data: data.float(),
    "one dimension": lambda data: data[0],
}
NAMES = {"no kind": "odd", "another kind": "a.weight|odd", "octaves alone": "a.weight|octaves"}
FEW = ("cut", "three dimensions", "groups that do not divide a row", "integers", "no number")
FEW += ("octaves, short", "another kind", "two steps", "a folder")


def first(folder):
    return min((folder / SCALES).iterdir())


def changed(folder, kind, change):
    tensors = load_file(first(folder))
    name = next(name for name in tensors if name.endswith(kind))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, first(folder))


def renamed(folder, name):
    tensors = load_file(first(folder))
    save_file(tensors | {name: tensors.pop(next(iter(tensors)))}, first(folder))


CASES = {
    **{
        n: ("four", lambda f, c=c: first(f).write_bytes(c(first(f).read_bytes())))
        for n, c in FILES.items()
    },
    **{n: ("four", lambda f, c=c: changed(f, "|scale", c)) for n, c in SCALE.items()},
    **{
        f"octaves, {n}": ("ecq", lambda f, c=c: changed(f, "|octaves", c))
        for n, c in OCTAVES.items()
    },
    **{n: ("four", lambda f, c=c: renamed(f, c)) for n, c in NAMES.items()},
    "two steps": ("ecq", lambda f: changed(f, "|scale", lambda scale: scale.repeat(1, 2))),
    "a folder": ("four", lambda f: (first(f).unlink(), (f / SCALES / "00000").mkdir())),
}


@pytest.mark.parametrize("case", quick(FEW, CASES))
def test_damaged_scales_are_one_line(quantised, tmp_path, monkeypatch, case):
    monkeypatch.setenv("CALMIX_CACHE", str(quantised / "cache"))
    base, damage = CASES[case]
    model, out = shutil.copytree(quantised / base, tmp_path / "model"), tmp_path / "out"
    damage(model)
    small = {"rows": 8, "length": 16, "batch": 2, "epochs": 1, "leakage": "off"}
    text, dense = str(quantised / "text.txt"), str(quantised / "tiny.gguf")
    request = recover_request(method="blocks", calibration=text, **small)
    for act in (
        lambda: pack(model, out),
        lambda: export(str(model), out),
        lambda: recover(str(model), dense, request, out),
    ):
        with pytest.raises(CalmixError, match="calmix-scales") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("case", quick(["short"], BLOCKS))
def test_damaged_blocks_are_one_line(quantised, tmp_path, monkeypatch, case):
    monkeypatch.setenv("CALMIX_CACHE", str(quantised / "cache"))
    model = shutil.copytree(quantised / "four", tmp_path / "model")
    tensors = load_file(first(model))
    name = next(name for name in tensors if "q_proj" in name)
    rows, groups = tensors.pop(name).shape
    blocks = torch.zeros(rows, 18 * groups, dtype=torch.uint8)
    for data in (blocks, BLOCKS[case](blocks)):
        save_file(tensors | {name.replace("scale", "Q4_0"): data.contiguous()}, first(model))
        if data is blocks:
            export(str(model), tmp_path / "whole.gguf")
            continue
        with pytest.raises(CalmixError, match=r"calmix-scales is damaged"):
            export(str(model), tmp_path / "out.gguf")
