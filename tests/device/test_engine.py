"""The engine on a device that is not there: one read a block, and no copy between devices."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.traced import empty_model, tracing
from calmix.models import find_blocks
from calmix.pruning import SemiStructured, Unstructured, get_method
from calmix.pruning.allocation import DensePass
from calmix.pruning.engine import Run, run_through
from tests.tiny import VOCABULARY, tiny_config

HALF = Unstructured(0.5)
ONCE = Counter({"tolist": 1})


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


QUICK = "admm,iterations=2,refit=1"
CASES = [
    ("sparsegpt", HALF, "sequential"), ("sparsegpt", SemiStructured(2, 4), "block"),
    (QUICK, HALF, "block"), ("wanda,refit=2", HALF, "sequential"), ("ria", HALF, "sequential"),
    ("magnitude", SemiStructured(2, 4), "sequential"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "pattern", "propagation"), CASES, ids=str)
def test_a_block_is_read_once(method, pattern, propagation):
    with tracing() as traced:
        model = empty_model(tiny_config("llama"))
        run = Run(model, find_blocks(model), get_method(method), pattern, propagation)
        first, *blocks = by_block(traced, run)
    assert blocks == [(ONCE, Counter())] * 2
    if run.needs_ids:  # the ids of the few tokens that are observed, and of three micro-batches
        assert first[1] == {("cpu", "cuda"): 4}
    assert len(run.report.layers) == 14
    assert all(type(layer.dead_inputs) is int for layer in run.report.layers)


OTHERS = [("gemma3_text", None), ("gemma4_text", None), ("gpt2", 1)]


@pytest.mark.parametrize(("kind", "paused"), OTHERS)
def test_other_blocks_are_read_once(kind, paused):
    with tracing() as traced:
        model = empty_model(tiny_config(kind))
        run = Run(model, find_blocks(model), get_method("wanda"), HALF, "sequential", paused)
        _, *blocks = by_block(traced, run)
    assert blocks == [(ONCE, Counter())] * len(run.found)


@pytest.mark.parametrize("by", ["owl", "error"])
def test_a_look_reads_once(by):
    with tracing() as traced:
        model = empty_model(tiny_config("llama"))
        look = DensePass(model, find_blocks(model), by, [0.5])
        _, *blocks = by_block(traced, look)
    assert blocks == [(ONCE, Counter())] * 2
    assert len(look.importance[0.5]) == 14
