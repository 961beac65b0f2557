"""The engine on a simulated device: sums in a fixed order, no float64 on MPS, and generation."""

import pytest
import torch

from calmix.calibration.selfgen.writing import Sampler, WriteRequest
from calmix.models.blocks import find_blocks
from calmix.pruning.engine import Run, prune, run_through
from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from calmix.pruning.methods.admm import Admm
from calmix.pruning.patterns import Unstructured
from calmix.pruning.trace import Batch, Calls
from tests.device.traced import empty_model, tracing
from tests.tiny import VOCABULARY, quick, tiny_config, tiny_ids, tiny_model

HALF = Unstructured(0.5)
QUICK = "admm,iterations=1,refit=1"


def one_block(kind, **how):
    config = tiny_config(kind)
    config.num_hidden_layers = 1
    return empty_model(config, **how)


@pytest.mark.parametrize("kind", quick(["mixtral"], ["llama"]))
def test_device_sums_in_fixed_order(monkeypatch, kind):
    """ADMM carries the last bit of a sum into the mask."""
    ordered = []
    for owner, name in ((Calls, "record"), (Gram, "add"), (Admm, "solve"), (Batch, "run")):
        act = getattr(owner, name)

        def acting(*given, act=act, **options):
            ordered.append(torch.are_deterministic_algorithms_enabled())
            return act(*given, **options)

        monkeypatch.setattr(owner, name, acting)
    add = torch.Tensor.scatter_add_

    def adding(self, *given):
        assert self.ndim == 1  # sums of more dimensions have no order on CUDA
        return add(self, *given)

    monkeypatch.setattr(torch.Tensor, "scatter_add_", adding)
    with tracing("cpu") as traced:
        model = one_block(kind)
        ids, plain = torch.zeros(5, 32, dtype=torch.int64), {"statistics": "plain"}
        prune(model, ids, method=QUICK, pattern=HALF, **plain)  # nothing traced has a gradient
    assert len(ordered) > 1
    assert all(ordered[1:])  # the first are the few tokens that blocks are observed on
    assert "kthvalue" not in traced.operations
    assert not torch.are_deterministic_algorithms_enabled()
    ordered.clear()
    prune(tiny_model(kind), tiny_ids(), method=QUICK, pattern=HALF)
    assert not any(ordered)


def test_no_float64_on_mps():
    """Nor is it made there on the way: the tracer refuses it, as they do."""
    with tracing("cpu") as traced:
        model = one_block("llama", device="mps")
        run = Run(model, find_blocks(model), get_method(QUICK), HALF)
        run_through(run, torch.zeros(5, 32, dtype=torch.int64))
        assert traced.operations
        with pytest.raises(TypeError, match="float64"):
            torch.zeros((), device="mps").double()


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
