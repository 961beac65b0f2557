"""A dense model, prunings of it and a calibration set, made once."""

import pytest
import torch

import calmix as api
from tests.conftest import write_text_file
from tests.tiny import save_tiny_model


def save_pruned(dense, folder, ids, method="wanda", pattern=None, dtype=torch.float32):
    """Save a pruning of a model, and its tokenizer; by default half of the weights are zeros."""
    opened = api.open_model(str(dense))
    api.prune(opened.model, ids, method=method, pattern=pattern or api.Unstructured(0.5))
    opened.model.to(dtype).save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    return opened


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A dense model, two prunings of it, and a calibration set."""
    folder = tmp_path_factory.mktemp("recovery")
    save_tiny_model(folder / "dense")
    text = write_text_file(folder / "text.txt")
    opened = api.open_model(str(folder / "dense"))
    drawn = api.resolve(str(text), opened, rows=32, length=32, leakage="off")
    drawn.save(folder / "set")
    for name, *how in (("half",), ("2of4", api.SemiStructured(2, 4), torch.bfloat16)):
        save_pruned(folder / "dense", folder / name, drawn.ids, "sparsegpt", *how)
    return folder
