"""Pruning from disk to disk on a simulated device: what is copied, and when it is read."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from calmix.memory import Plan
from calmix.models.streaming import StreamedModel
from calmix.pruning.checkpoint import prune_streamed
from calmix.pruning.engine import Run
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Unstructured
from calmix.pruning.work import WorkFolder
from tests.device.traced import tracing
from tests.tiny import VOCABULARY, quick

BATCHES, ROWS, LENGTH = 3, 2, 32


@pytest.fixture
def numberless(monkeypatch, tiny_folder):
    """Let files give and take tensors without numbers; return the model on its device."""
    streamed = StreamedModel(str(tiny_folder))
    streamed._pool.shutdown()
    streamed.device = torch.device("cuda", 1)
    streamed._pool = Mock()  # which works at once, in this thread
    streamed._pool.submit = lambda act, *given: Mock(result=Mock(return_value=act(*given)))
    pinned, waited = [], []
    streamed._queue = SimpleNamespace(device=streamed.device, record_event=lambda: "copied")
    now = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "stream", lambda queue: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {streamed.device: now}[device])
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, queue: None if queue is now else 1 / 0
    )

    def read(self, name):
        place = self.places[name]
        return torch.empty(place.shape, dtype=place.dtype, device="cpu")

    def written(self, name, tensors):
        for tensor in tensors.values():
            tensor.to("cpu")

    empty = torch.empty
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.append(1), self)[1])
    monkeypatch.setattr(StreamedModel, "read", read)
    monkeypatch.setattr(WorkFolder, "save", written)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    yield streamed, pinned, waited
    streamed.close()


@pytest.mark.parametrize("method", quick(["wanda,refit=2"], ["sparsegpt"]))
def test_block_is_copied_once(numberless, tmp_path, monkeypatch, method):
    """Its weights come and go; hidden states stay."""
    streamed, pinned, waited = numberless
    work = WorkFolder(tmp_path / "out")
    work.claim({}, resume=False, overwrite=False)
    run = Run(streamed.model, streamed.blocks, get_method(method), Unstructured(0.5))
    plan = Plan(ROWS * LENGTH, None, True, 0, states=2**30)
    seen = []
    with tracing() as traced:

        def mark(*_):
            seen.append((Counter(traced.reads), Counter(traced.copies)))
            traced.reads.clear()
            traced.copies.clear()

        fetch = streamed.fetch

        def fetched(index, *, ahead=False):
            if index == 0 and ahead:  # what was recorded before the blocks
                mark()
            fetch(index, ahead=ahead)

        monkeypatch.setattr(streamed, "fetch", fetched)
        ids = torch.randint(VOCABULARY, (BATCHES * ROWS, LENGTH), device="cpu")
        prune_streamed(streamed, ids, run, work, plan, lambda done: mark() if done else None)
    work.abandon()
    weights = len(streamed.block_names(0))
    first, *blocks = seen
    assert all(reads.total() <= 50 for reads, _ in blocks)
    # A block's weights come while the one before is at work, and the last block gives no states.
    last = {("cuda", "cpu"): weights}
    assert [copies for _, copies in blocks] == [last | {("cpu", "cuda"): weights}, last]
    assert waited == ["copied"] * 3  # for what is outside, and for each block
    assert len(pinned) == 2 * weights + len(streamed.outside_names())
    # Before the blocks, what is handed to them is compared with what other micro-batches brought.
    assert first[0] == {"equal": 3 * BATCHES}
