"""Recovery block by block: each towards what the dense block makes of the dense stream.

Two streams of hidden states run through the model, of the dense weights and of the pruned ones. A
block reads the pruned stream and learns to give what the dense block gives on the dense stream, so
that it also corrects errors of earlier blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calmix.models.blocks import DecoderBlocks
from calmix.models.streaming import StreamedModel
from calmix.options import Recovering
from calmix.precision import widest
from calmix.pruning.states import States
from calmix.pruning.trace import TOKENS, BlockCall, Calls
from calmix.pruning.work import CHECKPOINT
from calmix.recovery.job import Job
from calmix.recovery.losses import relative_error
from calmix.recovery.training import (
    Masters,
    best_of,
    finite,
    grouped,
    rate,
    rows_at_once,
    steps_of,
)


class Stream:
    """The hidden states of one model's micro-batches, and what its decoder hands to its blocks.

    `record` needs the model's weights outside the blocks and those of the first, `run` those of
    the block at hand.
    """

    def __init__(
        self, model: nn.Module, found: DecoderBlocks, states: MutableMapping[int, Tensor] | States
    ) -> None:
        self._model, self._found, self.states = model, found, states
        self._calls: list[list[BlockCall]] = []
        self.written: list[list[Any]] = []
        self.tokens: list[int] = []  # of each micro-batch

    @torch.no_grad()
    def record(self, ids: Tensor, groups: Sequence[Sequence[int]]) -> None:
        """Keep the hidden states each group of rows, a micro-batch, brings into the first block."""
        device = next(self._found.blocks[0].parameters()).device
        calls = Calls(self._model, self._found, ids[:1, :TOKENS].to(device))
        for number, group in enumerate(groups):
            hidden, recorded, written = calls.record(ids[list(group)].to(device))
            self._calls.append(recorded)
            self.written.append(written)
            self.tokens.append(len(group) * ids.shape[1])
            self.states[number] = hidden

    def run(self, index: int, number: int, *, keep: bool) -> Tensor:
        """Run a block on a micro-batch; what it writes into its arguments stays if `keep`."""
        written = self.written[number]
        return self._calls[number][index].run(
            self._found.blocks[index], self.states[number], written if keep else list(written)
        )

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Run a block on every micro-batch: its outputs are the states from now on."""
        for number in range(len(self._calls)):
            self.states[number] = self.run(index, number, keep=True)


def tune(
    stream: Stream,
    index: int,
    masters: Masters,
    targets: MutableMapping[int, Tensor] | States,
    groups: Sequence[Sequence[int]],
    held_out: Sequence[int],
    request: Recovering,
    *,
    at_once: int,
    seed: int,
    keep: Callable[[], dict[str, Tensor]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train one block until its epochs are over or the held-out rows no longer get better.

    `stream` is the pruned one, `targets` the dense stream behind the dense block. `groups` are the
    numbers of the micro-batches that train, those together that share a step whatever their size.
    Returned are mean relative errors a token (of the held-out rows `before` and `after`; by epoch
    of the training rows, `losses`, and of the others; `epochs` is the one that was kept, or 0), and
    what `keep` gave when the masters were the best.
    """

    def error(numbers: Sequence[int], *, learn: bool) -> Tensor:
        """Return the mean error a token, which stays on the device until an epoch is over."""
        tokens, values = sum(stream.tokens[number] for number in numbers), []
        for number in numbers:
            with torch.set_grad_enabled(learn):
                output = stream.run(index, number, keep=False)
                loss = relative_error(output, targets[number]) / tokens
            if learn:
                loss.backward()
                masters.collect()
            values.append(loss.detach().to(widest(loss.device)))
        return sum(values[1:], values[0])

    def read(losses: Sequence[Tensor]) -> Sequence[float]:
        return finite(torch.stack(list(losses)).tolist(), f"in block {index}")

    readings = list(read([error(held_out, learn=False)]))
    best, losses = 0, []
    kept: dict[str, Tensor] = {}
    steps = steps_of(len(groups), at_once, request.epochs, seed)
    an_epoch = len(steps) // request.epochs
    for epoch in range(request.epochs):
        errors = []
        for step in range(epoch * an_epoch, (epoch + 1) * an_epoch):
            errors.append(error([n for group in steps[step] for n in groups[group]], learn=True))
            masters.step(rate(step, len(steps), request.lr))
        *values, reading = read([*errors, error(held_out, learn=False)])
        losses.append(sum(values) / len(values))
        readings.append(reading)
        best, due = best_of(readings)
        if best == epoch + 1:
            kept.clear()  # one set lives at a time
            kept = keep()
        if due:
            break
    return {"block": index, "before": readings[0], "after": readings[best], "losses": losses,
            "held_out": readings[1:], "epochs": best}, kept  # fmt: skip


def recover_blocks(job: Job) -> tuple[float, float, Any]:
    """Recover block by block; return the mean error a token before and after, and by block.

    A finished block lies in its file of the checkpoint; the streams are made again when resumed.
    """
    work, ids, found = job.work, job.calibration.ids, job.pruned.blocks
    together = rows_at_once(job.request.batch, ids.shape[1])[0]  # in steps, whatever runs at a time
    groups: list[list[int]] = []
    numbers: list[list[int]] = []
    for rows in (*grouped(job.rows.training, together), job.rows.held_out):
        parts = grouped(rows, job.plan.rows)
        numbers.append(list(range(len(groups), len(groups) + len(parts))))
        groups += parts
    reports: list[dict[str, Any]] = list(work.kept.get("blocks", []))
    dense, pruned = (_stream(job, model, groups) for model in (job.dense, job.pruned))
    files = list(job.pruned.layout)
    for index in range(len(found)):
        job.dense.fetch(index, ahead=not job.plan.sparing)
        dense.advance(index)
        job.dense.drop(index)
        job.pruned.fetch(index, ahead=not job.plan.sparing)
        if index < len(reports):
            made = work.load(f"{CHECKPOINT}/{files[index]}")
        else:
            own = dict(found.blocks[index].named_parameters(prefix=f"{found.name}.{index}"))
            for parameter in own.values():
                parameter.requires_grad_(True)
            masters = Masters(own, job.pruned.stored, job.masked.__contains__)
            report, best = tune(
                pruned, index, masters, dense.states, numbers[:-1], numbers[-1], job.request,
                at_once=job.request.batch // together, seed=job.seed,
                keep=functools.partial(job.as_stored, masters, copy=True),
            )  # fmt: skip
            reports.append(report)
            del masters, own
            made = job.write(files[index], best)
            del best
            job.keep(index + 1, blocks=reports)
        job.pruned.refill(index, made)
        del made
        pruned.advance(index)
        job.pruned.drop(index)
        job.progress(index + 1, len(found), f"error {reports[index]['after']:.4f}")
    for file in files[len(found) :]:
        job.write(file, {})
    first, last = (sum(report[at] for report in reports) / len(reports)
                   for at in ("before", "after"))  # fmt: skip
    return first, last, reports


def _stream(job: Job, streamed: StreamedModel, groups: Sequence[Sequence[int]]) -> Stream:
    """Return a model's stream before its first block, its states in files."""
    folder = job.work.scratch("dense" if streamed is job.dense else "pruned")
    streamed.fetch_outside()
    streamed.fetch(0)
    stream = Stream(streamed.model, streamed.blocks, States(folder, streamed.device))
    stream.record(job.calibration.ids, groups)
    streamed.drop_outside()
    return stream
