"""Scales beside a model's weights that are damaged, or of another model: refused in one line."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix.deploy.gguf import export
from calmix.deploy.pack import pack
from calmix.errors import CalmixError
from calmix.pruning.requests import recover_request
from calmix.pruning.solvers.grids import SCALES_FOLDER, read_blocks, read_grids
from calmix.recovery.checkpoint import recover
from tests.tiny import load_weights

CUT = ("four", lambda raw: raw[:-10])
TRIPLED = ("four", "|scale", lambda scale: torch.cat([scale] * 3, 1))
SHORT_BLOCKS = ("blocks", "|Q5_0", lambda data: data[:, :-2])
BYTES = [CUT, ("four", lambda raw: b""), ("four", lambda raw: b"x" * 500)]
CHANGES = [
    TRIPLED,
    SHORT_BLOCKS,
    ("four", "|scale", lambda scale: scale[:, 0]),
    ("four", "|scale", lambda scale: scale[None]),
    ("four", "|scale", lambda scale: scale[:-1]),
    ("four", "|scale", lambda scale: torch.cat([scale, scale])),
    ("four", "|scale", lambda scale: scale[:0]),
    ("four", "|scale", lambda scale: scale[:, :0]),
    ("four", "|scale", lambda scale: scale.int()),
    ("four", "|scale", lambda scale: scale.float()),
    ("four", "|scale", lambda scale: scale * float("nan")),
    ("four", "|scale", lambda scale: scale * float("inf")),
    ("ecq", "|scale", lambda scale: scale.repeat(1, 2)),
    ("ecq", "|octaves", lambda octaves: octaves[:-1]),
    ("ecq", "|octaves", lambda octaves: octaves.float()),
    ("ecq", "|octaves", lambda octaves: octaves[None]),
    ("blocks", "|Q5_0", lambda data: data[1:]),
    ("blocks", "|Q5_0", lambda data: data.float()),
    ("blocks", "|Q5_0", lambda data: data[0]),
]
NAMES = ["odd", "a.weight|odd", "a.weight|octaves"]  # no kind, another, and no scale beside it


def damage(folder, kind, change, name=None):
    """Change the first file of scales: its bytes, or a tensor of a kind and its name."""
    path = min((folder / SCALES_FOLDER).iterdir())
    if kind is None:
        path.write_bytes(change(path.read_bytes()))
        return
    tensors = load_file(path)
    old = next(one for one in tensors if one.endswith(kind))
    tensors[name or old] = change(tensors.pop(old)).contiguous()
    save_file(tensors, path)


def test_damaged_scales_and_blocks_are_refused(quantised, tmp_path):
    shapes = {name: value.shape for name, value in load_weights(quantised / "four").items()}
    cases = [(base, None, change, None) for base, change in BYTES]
    cases += [(*case, None) for case in CHANGES]
    cases += [("four", "|scale", torch.clone, name) for name in NAMES]
    for number, (base, *case) in enumerate(cases):
        read = read_blocks if base == "blocks" else read_grids
        assert read(quantised / base, shapes)
        shutil.copytree(quantised / base / SCALES_FOLDER, tmp_path / f"{number}" / SCALES_FOLDER)
        damage(tmp_path / f"{number}", *case)
        with pytest.raises(CalmixError, match="calmix-scales"):
            read(tmp_path / f"{number}", shapes)


def test_commands_refuse_damaged_scales_in_one_line(quantised, tmp_path):
    out = tmp_path / "out"
    small = {"rows": 8, "length": 16, "batch": 2, "epochs": 1, "leakage": "off"}
    text, dense = str(quantised / "text.txt"), str(quantised / "tiny.gguf")
    request = recover_request(method="blocks", calibration=text, **small)
    acts = {
        "pack": lambda model: pack(model, out),
        "export": lambda model: export(str(model), out),
        "recover": lambda model: recover(str(model), dense, request, out),
    }
    for number, (case, names) in enumerate(
        [
            ((CUT[0], None, CUT[1]), ["pack", "recover"]),
            (TRIPLED, ["pack", "recover"]),
            (SHORT_BLOCKS, ["export"]),
        ]
    ):
        model = shutil.copytree(quantised / case[0], tmp_path / f"model-{number}")
        damage(model, *case[1:])
        for name in names:
            with pytest.raises(CalmixError, match="calmix-scales") as caught:
                acts[name](model)
            assert "\n" not in str(caught.value)
    (first := min((model / SCALES_FOLDER).iterdir())).unlink()
    first.mkdir()
    with pytest.raises(CalmixError, match="calmix-scales"):
        pack(model, out)
    assert not list(tmp_path.glob("out*"))
