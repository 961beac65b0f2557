"""Recovery, distance and generation on a simulated device: gradients are given, not computed, as a
CPU build keeps no graph of what another device does."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from calmix.calibration.selfgen.writing import Sampler, WriteRequest
from calmix.models.blocks import find_blocks
from calmix.precision import reproducible
from calmix.pruning.requests import recover_request
from calmix.pruning.solvers.grids import Grid
from calmix.recovery.blocks import Stream, tune
from calmix.recovery.distill import divergence
from calmix.recovery.training import Masters
from tests.device.traced import empty_model, tracing
from tests.tiny import VOCABULARY, quick, tiny_config

CUDA = torch.device("cuda")


@pytest.fixture
def gradients(monkeypatch):
    """A list of tensors that get an empty gradient instead of a computed one."""
    learning = []

    def backward(loss):
        for value in learning:
            value.grad = torch.empty_like(value)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda scores, by, slope: (torch.empty_like(by),))
    switch = torch.set_grad_enabled
    monkeypatch.setattr(torch, "set_grad_enabled", lambda on: switch(False))
    switch(False)
    yield learning
    switch(True)


@pytest.mark.parametrize("kind", quick(["llama"], ["gemma3_text"]))
def test_block_recovery_reads_once_per_step(kind, gradients):
    with tracing("cpu") as traced:
        model = empty_model(tiny_config(kind))
        found = find_blocks(model)
        opened = SimpleNamespace(model=model, blocks=found, device=CUDA)
        ids = torch.randint(VOCABULARY, (4, 16))
        stream = Stream(opened, {}, ids, [[0], [1], [2], [3]])
        targets = {n: torch.randn(1, 16, 32, device=CUDA) for n in range(4)}
        names = [n for n, _ in model.named_parameters() if n.startswith(f"{found.name}.0.")]
        own = {name: model.get_parameter(name).requires_grad_() for name in names}
        stored = {name: value.detach().cpu() for name, value in own.items()}.__getitem__
        grids, sparse = {names[0]: Grid(torch.ones(1, 1), 4.0)}, [n for n in names if "proj" in n]
        masters = Masters(own, stored, sparse, grids, stored, {})
        gradients += masters.parameters.values()
        traced.reads.clear()
        traced.copies.clear()
        request = recover_request(calibration="", method="blocks", epochs=2, lr=1e-3)
        with reproducible(torch.device("cpu")):
            tune(stream, 0, masters, targets, [[0, 1]] * 2, [2, 3], request)
        assert all(value.device.type == "cuda" for value in masters.values.values())
    assert traced.reads == {"_local_scalar_dense": 5}  # two steps, and three readings
    assert not traced.copies


def test_head_on_another_device(gradients, monkeypatch):
    """As hooks of accelerate leave it: its logits are not where the hidden states are."""
    monkeypatch.setattr(torch, "is_grad_enabled", lambda: True)
    asked = []

    def gradient(scores, by, slope):
        assert scores.device == slope.device
        asked.append((slope.device, by.device))
        return (torch.empty_like(by),)

    monkeypatch.setattr(torch.autograd, "grad", gradient)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    with tracing("cpu"):
        weight = torch.randn(VOCABULARY, 32, device=second)
        heads = [
            lambda states: functional.linear(states.to(second), weight),
            lambda states: functional.linear(states, weight.to(first)),
        ]
        hidden = torch.randn(7, 32, device=first, requires_grad=True)
        for ours, theirs in (heads, heads[::-1]):
            target = torch.randn(7, 32, device=first)
            assert divergence(hidden, target, ours, theirs, VOCABULARY).device == first
    assert asked == [(second, first), (first, first)]


CUT = {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}


@pytest.mark.parametrize(("kind", "cut"), [("cuda", {}), ("cuda", CUT), ("mps", {})])
def test_generation_step_reads_once(kind, cut):
    """Where float64 is not known, tokens are drawn on the CPU."""
    request = WriteRequest([[[3, 4]], [[5]]], 6, [1.0, 0.9], seed=0, **cut)
    with tracing("cpu") as traced:
        sampler = Sampler(request, range(2), [2], torch.device(kind), lambda *of: None)
        ids = torch.ones(2, 1, dtype=torch.int64, device=kind)
        for _ in range(3):
            traced.reads.clear()
            traced.copies.clear()
            left = sampler(ids, torch.randn(2, VOCABULARY, device=kind).bfloat16())
            ids = torch.cat([ids, left.argmax(-1, keepdim=True)], 1)
            if kind == "cuda":
                assert (traced.reads, traced.copies) == ({"tolist": 1}, {("cpu", "cuda"): 1})
    at = {sampler.nll.device.type, sampler.uniform.device.type}
    assert (left.device.type, at) == (kind, {"cuda" if kind == "cuda" else "cpu"})
