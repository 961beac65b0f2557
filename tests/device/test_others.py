"""Recovery, scoring, distance and generation on a device that is not there.

Gradients are given, not computed: a CPU build keeps no graph of what another device does.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from benchmarks.traced import empty_model, tracing
from calmix.calibration.selfgen.writing import Request, Sampler
from calmix.evaluation.likelihood import Head, decoder_and_head, divergences, row_nll
from calmix.evaluation.packing import Row, Target
from calmix.evaluation.scorer import Scorer
from calmix.models import find_blocks
from calmix.precision import reproducible
from calmix.recovery.blocks import Stream, tune
from calmix.recovery.distill import Student, distill
from calmix.recovery.losses import divergence
from calmix.recovery.training import Masters, Progress, trained_names
from calmix.specs import recover_request
from tests.tiny import VOCABULARY, quick, tiny_config

CUDA = torch.device("cuda")


def masters_of(model, names):
    own = {name: model.get_parameter(name).requires_grad_() for name in names}
    return Masters(own, lambda name: own[name].detach(), lambda name: "proj" in name)


@pytest.fixture
def gradients(monkeypatch):
    """Say which tensors get a gradient, of its own type, where one is asked for."""
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


def some_ids(rows, length):
    return torch.randint(VOCABULARY, (rows, length))


@pytest.mark.parametrize("kind", quick(["llama"], ["gemma3_text"]))
def test_a_block_learns_with_a_read_an_epoch(kind, gradients):
    with tracing(None) as traced:
        model = empty_model(tiny_config(kind))
        found = find_blocks(model)
        stream = Stream(model, found, {})
        stream.record(some_ids(4, 16), [[0], [1], [2], [3]])
        targets = {n: torch.randn(1, 16, 32, device=CUDA) for n in range(4)}
        names = [n for n, _ in model.named_parameters() if n.startswith(f"{found.name}.0.")]
        masters = masters_of(model, names)
        gradients += masters.parameters.values()
        traced.reads.clear()
        traced.copies.clear()
        with reproducible(torch.device("cpu")):
            tune(
                stream, 0, masters, targets, [[0, 1]] * 2, [2, 3],
                recover_request(calibration="", method="blocks", epochs=2, lr=1e-3), dict,
            )  # fmt: skip
        assert all(value.device.type == "cuda" for value in masters.values.values())
    assert traced.reads == {"tolist": 5}  # before the first epoch, and after each twice
    assert not traced.copies


def test_distillation_reads_once_a_step(gradients):
    with tracing(None) as traced:
        model = empty_model(tiny_config("llama"))
        student = Student(model, find_blocks(model), None, recompute=False)
        masters = masters_of(model, trained_names(model, find_blocks(model)))
        gradients += masters.parameters.values()
        traced.reads.clear()
        traced.copies.clear()
        alone = SimpleNamespace(
            num_processes=1, process_index=0, backward=lambda loss: loss.backward(),
            reduce=lambda total, reduction: total,
        )  # fmt: skip
        request = recover_request(calibration="", epochs=1, lr=1e-3, batch=2)
        progress = Progress(2)
        for _ in distill(
            student, masters, some_ids(6, 16), lambda part: torch.randn(len(part), 16, 32),
            [[0, 1], [2, 3]], [4, 5], request, alone, progress, 2,
        ):  # fmt: skip
            pass
    assert progress.done == 2
    assert traced.reads == {"tolist": 5}  # two steps, and three readings
    assert set(traced.copies) == {("cpu", "cuda")}  # ids and targets
    assert traced.copies.total() == 2 * (2 + 3)


def test_a_head_may_lie_on_another_device(gradients, monkeypatch):
    """As hooks of accelerate leave it: its logits are not where the hidden states are."""
    monkeypatch.setattr(torch, "is_grad_enabled", lambda: True)
    asked = []

    def gradient(scores, by, slope):
        assert scores.device == slope.device
        asked.append((slope.device, by.device))
        return (torch.empty_like(by),)

    monkeypatch.setattr(torch.autograd, "grad", gradient)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    with tracing(None):
        weight = torch.randn(VOCABULARY, 32, device=second)
        apart = Head(lambda states: functional.linear(states.to(second), weight))
        here = Head(lambda states: functional.linear(states, weight.to(first)))
        hidden = torch.randn(7, 32, device=first, requires_grad=True)
        for ours, theirs in ((apart, here), (here, apart)):
            target = torch.randn(7, 32, device=first)
            assert divergence(hidden, target, ours, theirs, VOCABULARY).device == first
    assert asked == [(second, second), (second, first), (first, first), (first, first)]


def test_perplexity_and_distance_read_at_the_end():
    with tracing(None) as traced:
        model = empty_model(tiny_config("gemma2"))
        decoder_and_head(model)  # compares once
        traced.reads.clear()
        traced.copies.clear()
        nll = row_nll(model, some_ids(3, 20))
        assert nll.shape == (3, 19)
        assert not traced.reads
        assert traced.copies[("cuda", "cpu")] == 1
        traced.copies.clear()
        logits = decoder_and_head(model)[1]
        both = (logits(torch.randn(7, 32, device=CUDA).bfloat16()) for _ in "ab")
        assert divergences(*both).device == nll.to(CUDA).device
        assert not traced.reads


def test_scores_are_read_once_a_batch():
    row = Row([5, 6, 7, 8], [-1, 0, 1, 2], [0, 1, 2, 3], [Target(0, 1, 7), Target(0, 2, 8)])
    with tracing(None) as traced:
        model = empty_model(tiny_config("llama"))
        scorer = SimpleNamespace(
            _head=decoder_and_head(model)[1], model=model, device=CUDA,
            _decoder=model.get_decoder(), _cache_key="past_key_values",
        )  # fmt: skip
        traced.reads.clear()
        hidden = Scorer._run_plain(scorer, [row])
        packed = Scorer._run_packed(scorer, [row, row], None, 0)
        assert (hidden.shape, packed.shape) == ((1, 4, 32), (2, 4, 32))
        traced.copies.clear()
        values = Scorer._values(scorer, [row], hidden)
        assert values.device == torch.device("cpu")
    assert not traced.reads
    assert traced.copies == {("cpu", "cuda"): 2, ("cuda", "cpu"): 1}


@pytest.mark.parametrize("cut", [{}, {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_a_step_of_writing_reads_once(cut):
    request = Request([[[3, 4]], [[5]]], 6, [1.0, 0.9], seed=0, **cut)
    with tracing(None) as traced:
        sampler = Sampler(request, 0, [2], CUDA, lambda tokens: None)
        ids = torch.ones(2, 1, dtype=torch.int64, device=CUDA)
        for _ in range(3):
            traced.reads.clear()
            traced.copies.clear()
            left = sampler(ids, torch.randn(2, VOCABULARY, device=CUDA).bfloat16())
            ids = torch.cat([ids, left.argmax(-1, keepdim=True)], 1)
            assert traced.reads == {"tolist": 1}
            assert traced.copies == {("cpu", "cuda"): 1}
    assert sampler.nll.device.type == "cuda"


def test_where_float64_is_not_known_tokens_are_drawn_on_the_cpu():
    request = Request([[[3]]], 4, [1.0], seed=0)
    with tracing(None):
        sampler = Sampler(request, 0, [2], torch.device("mps"), lambda tokens: None)
        ids = torch.ones(1, 1, dtype=torch.int64, device="mps")
        left = sampler(ids, torch.randn(1, VOCABULARY, device="mps"))
    assert left.device.type == "mps"
    assert sampler.uniform.device.type == "cpu"
