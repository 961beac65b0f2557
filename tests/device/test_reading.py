"""A block on trust: the bytes of one that is read at every step, and what happens if it fails."""

from __future__ import annotations

import pytest
import torch

from calmix.errors import SolverError
from calmix.models import find_blocks
from calmix.pruning import Unstructured, get_method
from calmix.pruning import gram as gram_module
from calmix.pruning.engine import Run, run_through
from calmix.pruning.reading import DoubtError, Laps, holds, quotient, read, trusting
from tests.tiny import tiny_ids, tiny_model

HALF = Unstructured(0.5)


def pruned(monkeypatch, method, *, trust, propagation="sequential", change=lambda model: None):
    """A tiny model's weights and report, pruned on trust or not."""
    model = tiny_model("llama")
    change(model)
    run = Run(model, find_blocks(model), get_method(method), HALF, propagation)
    monkeypatch.setattr(Run, "trusts", lambda self, device: trust)
    run_through(run, tiny_ids() if run.needs_ids else None, 96)
    return dict(model.named_parameters()), run.report


@pytest.mark.parametrize("propagation", ["sequential", "block"])
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda,refit=2", "ria", "magnitude"])
def test_trust_changes_no_bytes(monkeypatch, method, propagation):
    kept, report = pruned(monkeypatch, method, trust=True, propagation=propagation)
    plain, expected = pruned(monkeypatch, method, trust=False, propagation=propagation)
    assert all(torch.equal(kept[name], plain[name]) for name in plain)
    assert report.layers == expected.layers


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_a_factor_that_does_not_exist_is_made_otherwise(monkeypatch, method):
    """One factorisation fails in float32: the block is done over, with more damping there."""
    invert = gram_module._invert_factor

    def stubborn(h):
        if h.dtype == torch.float32 and h.shape[0] == 64:
            yield torch.ones((), dtype=torch.int32)
        yield from invert(h)

    monkeypatch.setattr(gram_module, "_invert_factor", stubborn)
    kept, report = pruned(monkeypatch, method, trust=True)
    plain, expected = pruned(monkeypatch, method, trust=False)
    assert all(torch.equal(kept[name], plain[name]) for name in plain)
    assert report.layers == expected.layers
    assert all((layer.damping > 0.05) == (layer.columns == 64) for layer in report.layers)
    assert len(report.layers) == 14


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda", "magnitude"])
def test_what_is_wrong_is_said_as_ever(monkeypatch, method):
    def damaged(model):
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")

    with pytest.raises(SolverError, match=r"layers\.1\.mlp\.up_proj: its weights are not finite$"):
        pruned(monkeypatch, method, trust=True, change=damaged)


def test_conditions_and_numbers_are_read_together():
    assert not holds(torch.tensor(False))
    with trusting():
        assert holds(torch.tensor(True))
        assert read([None, torch.tensor(3), 0.5]) == [None, 3.0, 0.5]
        assert holds(torch.tensor(False))
        with pytest.raises(DoubtError):
            read([torch.tensor(1.0)])
    assert not holds(torch.tensor(False))
    assert read([]) == []


def test_a_quotient_of_nothing_is_zero():
    zero, one = torch.zeros(()), torch.ones(())
    assert float(quotient(one, zero)) == 0
    assert float(quotient(one, 4 * one)) == 0.25
    assert quotient(one, one).dtype == torch.float64


class Mark:
    """An event of a device that is not there: marks are a second apart."""

    made = 0

    def __init__(self, device, enable_timing):
        assert enable_timing
        self.device = device

    def record(self, queue):
        assert queue == ("queue of", self.device)
        Mark.made += 1
        self.at = Mark.made

    def synchronize(self):
        self.passed = True

    def elapsed_time(self, other):
        assert other.passed
        return 1000.0 * (other.at - self.at)


def test_seconds_are_those_of_the_device_at_work(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: ("queue of", device))
    monkeypatch.setattr(torch, "Event", Mark)
    laps, seconds = Laps(torch.device("cuda", 1)), {"solve": 0.5, "statistics": 0.0}
    with laps.lap("solve"), laps.lap("statistics"):
        pass
    laps.read(seconds)
    assert seconds == {"solve": 3.5, "statistics": 1.0}
    laps.read(seconds)
    assert seconds["solve"] == 3.5
    laps = Laps(torch.device("cpu"))
    with laps.lap("solve"):
        pass
    laps.read(seconds)
    assert 3.5 <= seconds["solve"] < 4.5
