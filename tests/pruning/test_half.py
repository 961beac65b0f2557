"""Half-precision models are computed in float32 where the CPU is slow with them, and stored as they
were."""

import json

import pytest
import torch

from calmix.models.opening import open_model
from calmix.models.shards import weight_bytes
from calmix.pruning.checkpoint import write_checkpoint
from calmix.pruning.engine import Run, prune
from calmix.pruning.solvers.grids import read_grids
from calmix.specs import prune_request
from tests.pruning.stopper import interrupting
from tests.pruning.toy import SMALL
from tests.tiny import hashes, load_weights, save_tiny_model, tiny_ids, tiny_model

WAYS = {"pruned": ("--sparsity", 0.5), "rounded": ("--bits", 4, "--embeddings", 5)}


@pytest.fixture(autouse=True)
def slow_with_half_precision(monkeypatch):
    monkeypatch.setattr("calmix.precision.capabilities", dict)


def save_half(folder, half, kind="llama"):
    save_tiny_model(folder, kind)
    model = tiny_model(kind).to(half)
    model.config.dtype = half
    model.save_pretrained(folder)
    return folder


def logits(opened):
    with torch.no_grad():
        return opened.model(tiny_ids(2)).logits


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_half_model_is_stored_in_its_own_type(calmix, text_file, tmp_path, half, way):
    model, out = save_half(tmp_path / "model", half), tmp_path / "out"
    calmix("prune", model, "--calibration", text_file, *SMALL, *WAYS[way], "-o", out).ok()
    before, after = load_weights(model), load_weights(out)
    assert {name: value.dtype for name, value in after.items()} == dict.fromkeys(before, half)
    assert weight_bytes(out) < 1.1 * weight_bytes(model)
    manifest = json.loads((out / "calmix.json").read_text())
    assert (manifest["dtype"], manifest["stored_dtype"]) == ("float32", str(half)[6:])
    assert json.loads((out / "config.json").read_text())["dtype"] == str(half)[6:]
    grids = read_grids(out)
    assert bool(grids) == (way == "rounded")
    for name, grid in grids.items():
        assert torch.equal(grid.values(grid.levels(after[name])).to(half), after[name])
    if way == "rounded":
        return
    data = ("--calibration", text_file, "--rows", 16, "--length", 32, "--leakage", "off")
    more = ("--batch", 4, "--epochs", 1, "--dtype", "float32")
    again = tmp_path / "again"
    calmix("recover", out, "--against", model, *data, *more, "-o", again).ok()
    recovered = load_weights(again)
    assert {name: value.dtype for name, value in recovered.items()} == dict.fromkeys(before, half)
    assert any(not torch.equal(recovered[name], after[name]) for name in after)
    assert json.loads((again / "calmix.json").read_text())["stored_dtype"] == str(half)[6:]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_pruning_in_memory_matches_the_stored_model(tmp_path, kind):
    opened = open_model(str(save_half(tmp_path / "model", torch.float16, kind)))
    assert (opened.model.dtype, opened.stored_dtype) == (torch.float32, torch.float16)
    report = prune(opened, tiny_ids(), pattern="2:4")
    request = prune_request(pattern="2:4", calibration="none.txt")
    write_checkpoint(opened, tmp_path / "out", report, None, request)
    stored = load_weights(tmp_path / "out")
    assert stored.keys() == load_weights(tmp_path / "model").keys()
    assert {value.dtype for value in stored.values()} == {torch.float16}
    found = open_model(str(tmp_path / "out"))
    assert found.stored_dtype == torch.float16
    assert torch.equal(logits(found), logits(opened))


def test_resume_uses_stored_weights(calmix, text_file, tmp_path, monkeypatch):
    """Rounded already when the next block's inputs are computed."""
    model = save_half(tmp_path / "model", torch.bfloat16)
    command = ("prune", model, "--calibration", text_file, *SMALL, *WAYS["pruned"], "-o")
    calmix(*command, tmp_path / "whole").ok()
    with monkeypatch.context() as patched:
        patched.setattr(Run, "block", interrupting(Run.block))
        assert calmix(*command, tmp_path / "cut").code == 130
    calmix(*command, tmp_path / "cut", "--resume").ok()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
