"""Half-precision models are computed in float32 where the CPU is slow with them, and stored as they
were; `test_streamed.py` has one that is resumed."""

import json

import pytest
import torch

from calmix.models.opening import open_model
from calmix.models.shards import weight_bytes
from calmix.pruning.checkpoint import write_checkpoint
from calmix.pruning.engine import prune
from calmix.pruning.solvers.grids import read_grids
from calmix.specs import prune_request
from tests.pruning.toy import SMALL
from tests.tiny import load_weights, save_tiny_model, tiny_ids


@pytest.fixture(autouse=True)
def slow_with_half_precision(monkeypatch):
    monkeypatch.setattr("calmix.precision.capabilities", dict)


def logits(opened):
    with torch.no_grad():
        return opened.model(tiny_ids(2)).logits


@pytest.mark.parametrize(
    ("half", "way"),
    [("float16", ("--sparsity", 0.5)), ("bfloat16", ("--bits", 4, "--embeddings", 5))],
)
def test_half_model_is_stored_in_its_own_type(calmix, text_file, tmp_path, half, way):
    """Pruned and recovered, or rounded with levels that its weights still have."""
    model, out = save_tiny_model(tmp_path / "model", dtype=half), tmp_path / "out"

    def stored(folder):
        manifest = json.loads((folder / "calmix.json").read_text())
        assert manifest["stored_dtype"] == half
        weights = load_weights(folder)
        types = {name: value.dtype for name, value in weights.items()}
        assert types == dict.fromkeys(load_weights(model), getattr(torch, half))
        return manifest, weights

    calmix("prune", model, "--calibration", text_file, *SMALL, *way, "-o", out).ok()
    manifest, after = stored(out)
    assert weight_bytes(out) < 1.1 * weight_bytes(model)
    assert manifest["dtype"] == "float32"
    assert json.loads((out / "config.json").read_text())["dtype"] == half
    grids = read_grids(out)
    assert bool(grids) == ("--bits" in way)
    for name, grid in grids.items():
        assert torch.equal(grid.values(grid.levels(after[name])).to(after[name]), after[name])
    if grids:
        return
    data = ("--calibration", text_file, "--rows", 16, "--length", 32, "--leakage", "off")
    more = ("--batch", 4, "--epochs", 1, "--dtype", "float32", "-o", tmp_path / "again")
    calmix("recover", out, "--against", model, *data, *more).ok()
    _, recovered = stored(tmp_path / "again")
    assert any(not torch.equal(recovered[name], after[name]) for name in after)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_pruning_in_memory_matches_the_stored_model(tmp_path, kind):
    opened = open_model(str(save_tiny_model(tmp_path / "model", kind, dtype="float16")))
    assert (opened.model.dtype, opened.stored_dtype) == (torch.float32, torch.float16)
    report = prune(opened, tiny_ids(), pattern="2:4")
    request = prune_request(pattern="2:4", calibration="none.txt")
    write_checkpoint(opened, tmp_path / "out", report, None, request)
    stored = load_weights(tmp_path / "out")
    assert stored.keys() == load_weights(tmp_path / "model").keys()
    assert {value.dtype for value in stored.values()} == {torch.float16}
    again = open_model(str(tmp_path / "out"))
    assert again.stored_dtype == torch.float16
    assert torch.equal(logits(again), logits(opened))
