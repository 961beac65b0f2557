"""The engine on a device that is not there: a few reads a layer, and no copy between devices."""

from collections import Counter

import pytest
import torch
from torch.nn import functional

from benchmarks.traced import empty_model, tracing
from calmix.machine import Laps
from calmix.models import find_blocks
from calmix.pruning import SemiStructured, Unstructured, get_method, prune
from calmix.pruning.allocation import DensePass
from calmix.pruning.engine import Run, run_through
from calmix.pruning.expert_pruning import ScorePass
from calmix.pruning.gram import Gram
from calmix.pruning.methods.admm import Admm
from calmix.pruning.trace import Batch, Calls
from tests.pruning.test_experts import OldMixture
from tests.tiny import VOCABULARY, quick, tiny_config, tiny_ids, tiny_model

HALF = Unstructured(0.5)
FEW = 20  # times at most that the host reads numbers of an input and its layers


def by_block(traced, run, micro_tokens=64):
    """What was read and copied before the blocks, and in each of them."""
    ids = torch.randint(VOCABULARY, (5, 32), device="cpu") if run.needs_ids else None
    marks = []

    def mark(*_):
        marks.append((traced.reads.copy(), traced.copies.copy()))
        traced.reads.clear()
        traced.copies.clear()

    begin = run.block
    run.block = lambda index: (mark() if not index else None, begin(index))
    run_through(run, ids, micro_tokens, mark)
    return marks


def numbers(reads):
    """How often numbers are read; take that out of the reads."""
    return reads.pop("tolist", 0) + reads.pop("_local_scalar_dense", 0)


QUICK = "admm,iterations=1,refit=1"
CASES = quick(
    [(QUICK, HALF, "block"), ("wanda", SemiStructured(2, 4), "sequential")],
    [("sparsegpt", HALF, "sequential"), ("sparsegpt", SemiStructured(2, 4), "block"),
     ("wanda,refit=2", HALF, "sequential"), ("ria", HALF, "sequential"),
     ("magnitude", SemiStructured(2, 4), "sequential")],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_is_read_a_few_times_however_many_its_rows(case):
    method, pattern, propagation = case
    found = []
    for micro_tokens in (64, 160):
        with tracing() as traced:
            model = empty_model(tiny_config("llama"))
            run = Run(model, find_blocks(model), get_method(method), pattern, propagation)
            first, *blocks = by_block(traced, run, micro_tokens)
        assert not any(copies for _, copies in blocks)
        if run.needs_ids:  # the ids of the few tokens that are observed, and of the micro-batches
            assert first[1] == {("cpu", "cuda"): 1 + (3 if micro_tokens == 64 else 1)}
        assert len(run.report.layers) == 14
        found += [(numbers(reads), reads) for reads, _ in blocks]
    assert found == [found[0]] * 4
    assert found[0][0] <= FEW * 4  # inputs
    assert not found[0][1]


@pytest.mark.parametrize("kind", quick(["mixtral"], ["llama"]))
def test_a_device_sums_in_one_order(monkeypatch, kind):
    """ADMM carries the last bit of a sum into the mask."""
    ordered = []

    def told(owner, name):
        act = getattr(owner, name)

        def acting(*given, **options):
            ordered.append(torch.are_deterministic_algorithms_enabled())
            return act(*given, **options)

        monkeypatch.setattr(owner, name, acting)

    for owner, name in ((Calls, "record"), (Gram, "add"), (Admm, "solve"), (Batch, "run")):
        told(owner, name)
    add = torch.Tensor.scatter_add_

    def adding(self, *given):
        assert self.ndim == 1  # sums of more dimensions have no order on CUDA
        return add(self, *given)

    monkeypatch.setattr(torch.Tensor, "scatter_add_", adding)
    with tracing(None) as traced:
        model = empty_model(tiny_config(kind))
        prune(model, torch.zeros(5, 32, dtype=torch.int64), method=QUICK, pattern=HALF)
    assert ordered[1:]
    assert all(ordered[1:])  # the first are the few tokens that blocks are observed on
    assert "kthvalue" not in traced.operations
    assert not torch.are_deterministic_algorithms_enabled()
    ordered.clear()
    prune(tiny_model(kind), tiny_ids(), method=QUICK, pattern=HALF)
    assert not any(ordered)


def test_out_of_memory_a_prune_starts_over_with_fewer_rows(monkeypatch):
    """The first block is put back, as far as it was pruned."""
    add, seen, copies = Gram.add, [], Counter()

    def adding(self, inputs):
        if inputs.shape[1:] == (32, 64):  # the last input of a block
            seen.append(len(inputs))
            if len(inputs) > 2:
                copies.update(traced.copies)
                raise torch.OutOfMemoryError
        add(self, inputs)

    monkeypatch.setattr(Gram, "add", adding)
    with tracing() as traced:
        ids = torch.randint(VOCABULARY, (5, 32), device="cpu")
        report = prune(empty_model(tiny_config("llama")), ids, pattern=HALF, micro_tokens=4 * 32)
    assert seen == [4, 2, 2, 1, 2, 2, 1]
    assert report.rows_at_once == 2
    assert copies[("cuda", "cpu")] == 7  # the layers of one block
    assert traced.copies[("cpu", "cuda")] == copies[("cpu", "cuda")] + 7 + 4  # and ids anew


@pytest.mark.parametrize("kind", quick(["gpt2"], ["gemma3_text", "gemma4_text"]))
def test_other_blocks_are_read_a_few_times(kind):
    paused = 1 if kind == "gpt2" else None
    with tracing() as traced:
        model = empty_model(tiny_config(kind))
        run = Run(model, find_blocks(model), get_method("wanda"), HALF)
        run.paused = paused
        _, *blocks = by_block(traced, run)
    assert len(blocks) == len(run.found)
    for reads, copies in blocks:
        assert numbers(reads) <= FEW * 4
        assert not reads
        assert not copies


@pytest.mark.parametrize(("by", "times"), [("owl", 1), ("error", 7)])
def test_a_look_reads_a_few_times(by, times):
    with tracing() as traced:
        model = empty_model(tiny_config("llama"))
        look = DensePass(model, find_blocks(model), by, [0.5])
        _, *blocks = by_block(traced, look)
    assert [(numbers(reads), reads, copies) for reads, copies in blocks] == [(times, {}, {})] * 2
    assert len(look.importance[0.5]) == 14


def as_lists(model):
    """Experts as modules of their own."""
    for block in model.model.layers:
        block.mlp = OldMixture(block.mlp).requires_grad_(False).bfloat16()


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


@pytest.mark.parametrize(
    "case",
    quick([("wanda", "sequential", as_slices)],
          [("wanda", "sequential", as_lists), (QUICK, "block", as_slices)]),
)  # fmt: skip
def test_experts_are_read_a_few_times_besides_what_routing_asks(case):
    """A module that sends tokens to experts asks which; ours ask if experts see the same tokens."""
    method, propagation, change = case
    with tracing(None) as traced:
        model = empty_model(tiny_config("mixtral"), change=change)
        run = Run(model, find_blocks(model), get_method(method), HALF, propagation)
        _, *blocks = by_block(traced, run)
    for reads, copies in blocks:
        assert reads.pop("where") > 0
        assert reads.pop("nonzero") > 0
        assert numbers(reads) <= FEW * (2 + 2 * 4)  # inputs of attention, and of each expert
        assert reads == {"equal": 2}  # of the first two experts, a step
        # How many tokens reach each expert of all.
        counted = {} if change is as_lists else {("cuda", "cpu"): 1}
        told = 2 * 3 + 2 * (change is not as_lists)  # which tokens stand for all; at first, experts
        assert copies == {("cpu", "cuda"): told} | counted
    assert len(run.report.layers) == 2 * (4 + 4 * 3)


@pytest.mark.parametrize(
    ("kind", "look"),
    [("llama", lambda *given: DensePass(*given, "owl", [0.5])),
     ("llama", lambda *given: DensePass(*given, "error", [0.5])),
     ("llama", lambda *given: Run(*given, get_method(QUICK), HALF, "sequential")),
     pytest.param("mixtral", lambda *given: Run(*given, get_method("sparsegpt"), HALF, "block"),
                  marks=pytest.mark.long),
     ("mixtral", ScorePass)],
    ids=["owl", "error", "admm", "experts", "scores"],
)  # fmt: skip
def test_apples_gpus_are_given_no_float64(kind, look):
    """Nor is it made there on the way: the tracer refuses it, as they do."""
    change = as_slices if kind == "mixtral" else lambda model: None
    with tracing(None) as traced:
        model = empty_model(tiny_config(kind), device="mps", change=change)
        run_through(look(model, find_blocks(model)), torch.zeros(5, 32, dtype=torch.int64))
        assert traced.operations
        with pytest.raises(TypeError, match="float64"):
            torch.zeros((), device="mps").double()


def test_statistics_of_experts_are_counted_in_the_devices_queue(monkeypatch):
    counted, lap = Counter(), Laps.lap
    monkeypatch.setattr(
        Laps, "lap", lambda self, what: (counted.update([what, self._device]), lap(self, what))[1]
    )
    prune(tiny_model("mixtral"), tiny_ids(), method="wanda", pattern=HALF)
    # Of a block two inputs of attention; two of each of four experts, its own tokens and all.
    assert counted["statistics"] == 2 * (2 + 4 * (2 + 2) - 3)
