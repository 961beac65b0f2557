"""Recovery block by block: each block learns the dense block's outputs.

Two streams of hidden states run through the dense and the pruned model. A pruned block reads the
pruned stream and learns to return what the dense block returns on the dense stream, so it also
corrects errors of earlier blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calmix.models.streaming import StreamedModel
from calmix.options import Recovering
from calmix.precision import widest
from calmix.pruning.trace import TRACED_TOKENS, Batch, Calls
from calmix.pruning.work import CHECKPOINT, States
from calmix.recovery.running import RecoveryRun
from calmix.recovery.training import Masters, TrainingState, grouped, rows_at_once, steps_of, train


class Stream:
    """The hidden states of one model's micro-batches, and the other arguments of its blocks.

    Each group of rows is a micro-batch, known by its first row. The weights outside the blocks and
    those of the first block must be in memory.
    """

    @torch.no_grad()
    def __init__(
        self, model: StreamedModel, states: States, ids: Tensor, groups: Sequence[list[int]]
    ) -> None:
        self.states, self.batches, self.length = states, dict[int, Batch](), ids.shape[1]
        calls = Calls(model.model, model.blocks, ids[:1, :TRACED_TOKENS].to(model.device))
        for group in groups:
            states[group[0]], self.batches[group[0]] = calls.record(ids[group].to(model.device))

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the states of every micro-batch by a block's outputs."""
        for number, batch in self.batches.items():
            self.states[number] = batch.run(index, self.states[number])


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the sum over tokens of |output - target|^2 / |target|^2.

    A plain mean square is dominated by the few tokens (mostly the first) whose states are a
    thousand times larger than the rest; here every token counts the same. Ours.
    """
    target = target.float()
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output.float() - target).square().sum(-1) / energy).sum()


def tune(
    stream: Stream,
    index: int,
    masters: Masters,
    targets: States,
    steps: Sequence[list[int]],
    held_out: list[int],
    request: Recovering,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train one block until its epochs end or the held-out loss stops improving.

    `stream` is the pruned one, `targets` the dense block's outputs; `steps` hold micro-batch
    numbers. Returns a report and the best weights, none if the initial ones are. The report has
    mean relative errors per token: `before` and `after` on the held-out rows, and per epoch
    `losses` (training rows) and `held_out`; `epochs` is the epoch kept, or 0.
    """

    def mean(numbers: list[int], learn: bool) -> Tensor:
        tokens = stream.length * sum(stream.batches[number].rows for number in numbers)
        total: Any = 0
        for number in numbers:
            with torch.set_grad_enabled(learn):
                hidden = stream.states[number]
                output = stream.batches[number].run(index, hidden, keep=False)
                loss = relative_error(output, targets[number]) / tokens
            if learn:
                loss.backward()
                masters.collect()
            total += loss.detach().to(widest(loss.device))
        return total

    progress, every = TrainingState(len(steps)), len(steps) // request.epochs
    lr, where = request.lr, f"in block {index} "
    best_weights: dict[str, Tensor] = {}
    for _ in train(progress, masters, steps, held_out, mean, lr, every=every, where=where):
        if progress.best == progress.done:
            best_weights.clear()  # only one set at a time is in memory
            best_weights = masters.stored(copy=True)
    readings, epochs = [loss for _, loss in progress.held_out], grouped(progress.losses, every)
    best = progress.best // every
    report = {
        "block": index,
        "before": readings[0],
        "after": readings[best],
        "losses": [sum(losses) / len(losses) for losses in epochs],
        "held_out": readings[1:],
        "epochs": best,
    }
    return report, best_weights


def recover_blocks(job: RecoveryRun) -> tuple[float, float, Any]:
    """Recover block by block; return the mean error per token before and after, and all reports.

    Finished blocks are files of the checkpoint; a resumed run recomputes the streams.
    """
    work, ids, blocks = job.work, job.calibration.ids, job.pruned.blocks
    together = rows_at_once(job.request.batch, ids.shape[1])[0]  # shuffled as one, for any plan
    units = [*grouped(job.training, together), job.held_out]
    parts = [grouped(rows, job.rows) for rows in units]
    numbers = [[rows[0] for rows in part] for part in parts]  # micro-batches of each unit
    reports: list[dict[str, Any]] = list(work.state.get("blocks", []))
    at_once = job.request.batch // together
    grouped_steps = steps_of(numbers[:-1], at_once, job.request.epochs, job.seed)
    steps = [list(itertools.chain(*step)) for step in grouped_steps]
    streams = []
    for name, model in (("dense", job.dense), ("pruned", job.pruned)):
        states = States(work.scratch(name), model.device)  # in files
        model.fetch_outside()
        model.fetch(0)
        streams.append(Stream(model, states, ids, [group for part in parts for group in part]))
        model.drop_outside()
    dense, pruned = streams
    files = list(job.pruned.layout)
    for index in range(len(blocks)):
        job.dense.fetch(index, ahead=not job.sparing)
        dense.advance(index)
        job.dense.drop(index)
        job.pruned.fetch(index, ahead=not job.sparing)
        if index < len(reports):
            tensors = work.load(f"{CHECKPOINT}/{files[index]}")
        else:
            named = blocks.blocks[index].named_parameters(prefix=f"{blocks.name}.{index}")
            trained = {name: value for name, value in named if name not in job.fixed}
            for parameter in trained.values():
                parameter.requires_grad_(True)
            masters = job.masters(trained)
            report, best = tune(
                pruned, index, masters, dense.states, steps, numbers[-1], job.request
            )
            reports.append(report)
            del masters, trained
            tensors = job.write(files[index], job.pruned.as_stored(best))
            del best
            job.keep(index + 1, blocks=reports)
        job.pruned.refill(index, tensors)
        del tensors
        pruned.advance(index)
        job.pruned.drop(index)
        job.run.progress(index + 1, len(blocks), f"error {reports[index]['after']:.4f}")
    for file in files[len(blocks) :]:
        job.write(file, {})
    first, last = (
        sum(report[at] for report in reports) / len(reports) for at in ("before", "after")
    )
    return first, last, reports
