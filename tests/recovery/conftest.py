"""A dense model, prunings of it, a calibration set and undisturbed recoveries, made once."""

import json

import pytest
import torch

import calmix as api
from calmix.cli import app
from calmix.recovery import distill
from tests.conftest import write_text_file
from tests.pruning import stopper
from tests.tiny import save_tiny_model

METHODS = ("distill", "blocks")


def command(place, output, method, *more, pruned="half", dense="dense"):
    """Return the arguments that recover a pruning."""
    data = ("--against", place / dense, "--calibration", place / "set")
    how = ("--method", method, "--lr", 0.006, *more)
    return ("recover", place / pruned, *data, *how, "-o", output)


def manifest(folder):
    """Return the record of a result."""
    return json.loads((folder / "calmix.json").read_text(encoding="utf-8"))


def arm(moment, number):
    """Kill this process after `number` blocks or steps; distillation saves every state."""
    distill.SAVING = 0
    stopper.arm(moment, number - 1)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A dense model, two prunings of it, and a calibration set."""
    folder = tmp_path_factory.mktemp("recovery")
    save_tiny_model(folder / "dense")
    text = write_text_file(folder / "text.txt")
    opened = api.open_model(str(folder / "dense"))
    drawn = api.calibration_set(str(text), opened, rows=32, length=32, leakage="off")
    drawn.save(folder / "set")
    for name, pattern, dtype in (
        ("half", api.Unstructured(0.5), torch.float32),
        ("2of4", api.SemiStructured(2, 4), torch.bfloat16),
    ):
        opened = api.open_model(str(folder / "dense"))
        api.prune(opened.model, drawn.ids, method="sparsegpt", pattern=pattern)
        opened.model.to(dtype).save_pretrained(folder / name)
        opened.tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def whole(place):
    """What a recovery gives undisturbed."""

    def made(method, pruned="half"):
        output = place / f"whole-{method}-{pruned}"
        if not output.exists():
            arguments = command(place, output, method, pruned=pruned)
            app([str(one) for one in arguments], standalone_mode=False)
        return output

    return made
