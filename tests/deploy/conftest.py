"""A pruned model, and quantised models from a GGUF file."""

import pytest

import calmix
from calmix.pruning.checkpoint import prune_checkpoint
from calmix.pruning.requests import prune_request
from tests.tiny import save_tiny_model, tiny_gguf, tiny_ids, tiny_text

QUANTISED = {
    "four": {"method": "gptq,group=32", "bits": 4},
    "eight": {"method": "gptq,group=64", "bits": 8},
    "three": {"method": "gptq,group=32,symmetric=false", "bits": 3},
    "ecq": {"bits": 2.8},
    "blocks": {"method": "ggml,type=Q4_K"},
    "joint": {"sparsity": 0.5, "bits": 4},
}


@pytest.fixture(scope="session")
def pruned(tmp_path_factory):
    """A tiny model of one block with 60 % zeros."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "pruned", num_hidden_layers=1)
    opened = calmix.open_model(str(folder))
    pattern = calmix.Unstructured(0.6)
    calmix.prune(opened.model, tiny_ids(4), method="magnitude", pattern=pattern)
    opened.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantised(tmp_path_factory):
    """A folder with `tiny.gguf`, and models made from it with 4-bit and 8-bit levels."""
    folder = tmp_path_factory.mktemp("quantised")
    tiny_gguf(folder / "tiny.gguf")
    text = tiny_text(folder / "text.txt")
    drawn = {"calibration": str(text), "rows": 6, "length": 32, "leakage": "off"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CALMIX_CACHE", str(folder / "cache"))
        for name, asked in QUANTISED.items():
            request = prune_request(**asked, **drawn)
            prune_checkpoint(str(folder / "tiny.gguf"), folder / name, request)
    return folder


@pytest.fixture(autouse=True)
def own_cache(quantised, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(quantised / "cache"))
