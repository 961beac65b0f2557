"""A dense model, prunings of it and a calibration set, made once."""

import pytest
import torch

import calmix as api
from tests.conftest import write_text_file
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A dense model, two prunings of it, and a calibration set."""
    folder = tmp_path_factory.mktemp("recovery")
    save_tiny_model(folder / "dense")
    text = write_text_file(folder / "text.txt")
    opened = api.open_model(str(folder / "dense"))
    drawn = api.resolve(str(text), opened, rows=32, length=32, leakage="off")
    drawn.save(folder / "set")
    api.resolve(str(text), opened, rows=5, length=32, leakage="off").save(folder / "small")
    for name, pattern, dtype in (
        ("half", api.Unstructured(0.5), torch.float32),
        ("2of4", api.SemiStructured(2, 4), torch.bfloat16),
    ):
        model = api.open_model(str(folder / "dense")).model
        api.prune(model, drawn.ids, method="sparsegpt", pattern=pattern)
        model.to(dtype).save_pretrained(folder / name)
        opened.tokenizer.save_pretrained(folder / name)
    return folder
