"""The engine on a simulated device: a few reads per layer, and no copy between devices."""

import pytest
import torch
from torch.nn import functional

from calmix.models.blocks import find_blocks
from calmix.pruning.engine import Run, prune, run_through
from calmix.pruning.expert_pruning import ScorePass
from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from calmix.pruning.methods.admm import Admm
from calmix.pruning.patterns import SemiStructured, Unstructured
from calmix.pruning.trace import Batch, Calls
from tests.device.traced import empty_model, tracing
from tests.tiny import VOCABULARY, quick, tiny_config, tiny_ids, tiny_model

HALF = Unstructured(0.5)
FEW = 20  # times at most that the host reads numbers of an input and its layers
QUICK = "admm,iterations=1,refit=1"


def a_run(method, propagation="sequential", pattern=HALF, paused=None):
    """Return what makes a run of a model."""

    def make(model):
        run = Run(model, find_blocks(model), get_method(method), pattern, propagation)
        run.paused = paused
        return run

    return make


def one_block(kind, **how):
    config = tiny_config(kind)
    config.num_hidden_layers = 1
    return empty_model(config, **how)


def by_block(kind, make, micro_tokens, change=lambda model: None, device="cuda"):
    """Run; return how often numbers are read in each block, what else is read, and copies; `copies`
    before the first one are the ids of the few tokens that are observed, and of micro-batches."""
    marks = []
    with tracing(device) as traced:
        run = make(empty_model(tiny_config(kind), change=change))

        def mark(*_):
            reads = traced.reads.copy()
            numbers = reads.pop("tolist", 0) + reads.pop("_local_scalar_dense", 0)
            marks.append((numbers, reads, traced.copies.copy()))
            traced.reads.clear()
            traced.copies.clear()

        begin = run.block
        run.block = lambda index: (mark() if not index else None, begin(index))
        ids = torch.randint(VOCABULARY, (5, 32), device="cpu") if run.needs_ids else None
        run_through(run, ids, micro_tokens, mark)
    (_, _, copies), *blocks = marks
    if run.needs_ids:
        assert copies == {("cpu", "cuda"): 1 + -(-5 // (micro_tokens // 32))}
    assert len(blocks) == len(run.blocks)
    return run, blocks


@pytest.mark.parametrize(
    "case",
    quick(
        [("gpt2", "wanda", "sequential", SemiStructured(2, 4), 1)],
        [
            ("llama", QUICK, "block", HALF),
            ("llama", "sparsegpt", "sequential", HALF),
            ("llama", "sparsegpt", "block", SemiStructured(2, 4)),
            ("llama", "wanda,refit=2", "sequential", HALF),
            ("llama", "magnitude", "sequential", SemiStructured(2, 4)),
            ("gemma4_text", "wanda", "sequential", HALF),
        ],
    ),
    ids=str,
)
def test_reads_do_not_grow_with_rows(case):
    kind, *how = case
    found = []
    for micro_tokens in (64, 160):
        _, blocks = by_block(kind, a_run(*how), micro_tokens)
        assert not any(reads or copies for _, reads, copies in blocks)
        assert max(numbers for numbers, *_ in blocks) <= FEW * 4  # inputs
        found.append(blocks)
    assert found[0] == found[1]


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


def as_slices(model):
    """Experts as slices of parameters, one after another whichever of them tokens reach."""

    def forward(self, hidden, index, gates):
        result = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            token, place = torch.where(index == number)
            made = functional.linear(hidden[token], self.gate_up_proj[number])
            gate, up = made.chunk(2, -1)
            own = functional.linear(functional.silu(gate) * up, self.down_proj[number])
            result.index_add_(0, token, own * gates[token, place, None])
        return result

    for block in model.model.layers:
        kind = type(block.mlp.experts)
        block.mlp.experts.__class__ = type(kind.__name__, (kind,), {"forward": forward})


@pytest.mark.long
@pytest.mark.parametrize("case", [("wanda", "sequential"), (QUICK, "block")])
def test_experts_reads(case):
    """A module that sends tokens to experts asks which; ours ask if experts see the same tokens."""
    run, blocks = by_block("mixtral", a_run(*case), 64, as_slices, "cpu")
    for numbers, reads, copies in blocks:
        assert reads.pop("where") > 0
        assert reads.pop("nonzero") > 0
        assert numbers <= FEW * (2 + 2 * 4)  # inputs of attention, and of each expert
        assert reads == {"equal": 2}  # of the first two experts, a step
        # How many tokens reach each expert; which tokens stand for all, and at first experts; the
        # random signs of each Gram matrix: of attention, experts, and all tokens together.
        signs = 2 + 4 * 2 + 2 if case[0] == QUICK else 0
        assert copies == {("cuda", "cpu"): 1, ("cpu", "cuda"): 2 * 3 + 2 + signs}
    assert len(run.report.layers) == 2 * (4 + 4 * 3)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("llama", a_run(QUICK)),
        pytest.param("mixtral", a_run("sparsegpt", "block"), marks=pytest.mark.long),
        ("mixtral", lambda model: ScorePass(model, find_blocks(model))),
    ],
    ids=["admm", "experts", "scores"],
)
def test_no_float64_on_mps(kind, make):
    """Nor is it made there on the way: the tracer refuses it, as they do."""
    change = as_slices if kind == "mixtral" else lambda model: None
    with tracing("cpu") as traced:
        model = one_block(kind, device="mps", change=change)
        run_through(make(model), torch.zeros(5, 32, dtype=torch.int64))
        assert traced.operations
        with pytest.raises(TypeError, match="float64"):
            torch.zeros((), device="mps").double()
