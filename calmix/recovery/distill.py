"""Distillation: the whole pruned model towards the dense model's logits, KL(dense || pruned).

The dense model runs once: what its head sees is kept, and logits are made again from that when
they are needed. How many processes share the work, and how the weights lie among them, is
accelerate's business.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calmix.evaluation.likelihood import Head, behind, decoder_and_head
from calmix.models import find_blocks
from calmix.models.blocks import DecoderBlocks
from calmix.models.shards import read_file, write_file
from calmix.options import Recovering
from calmix.pruning.distributed import everyone, once
from calmix.recovery.job import Job
from calmix.recovery.losses import divergence
from calmix.recovery.training import Masters, Progress, grouped, steps_of, train, trained_names

READINGS = 2  # of the held-out rows, an epoch
WIDE = 0.2  # nats a token between two models, of less than which steps are as much smaller (ours)
SAVING = 20  # a state is kept whenever that takes less than 1/20 of the time


class Student(nn.Module):
    """A pruned model whose forward is the loss, so that whatever wraps it sees one pass.

    `dense_head` is None where the heads are the same; `fixed` weights are not trained. With
    `recompute` blocks run anew on the way back: the same numbers in less memory and more time.
    """

    def __init__(
        self,
        model: Any,
        found: DecoderBlocks,
        dense_head: Head | None,
        *,
        recompute: bool,
        fixed: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self._forwards = decoder_and_head(model)
        self._dense_head = dense_head
        self._vocabulary = model.get_output_embeddings().weight.shape[0]
        for name in trained_names(model, found):
            model.get_parameter(name).requires_grad_(name not in fixed)
        if recompute:
            for block in found.blocks:
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        """Return the sum of KL(dense || pruned) over all positions, in nats.

        `ids` are (rows, length), `target` is what the dense model's head sees of them.
        """
        decoder, head = self._forwards
        hidden = decoder(input_ids=ids, use_cache=False)[0].flatten(0, 1)
        dense_head = self._dense_head or head
        return divergence(hidden, target.flatten(0, 1), head, dense_head, self._vocabulary)

    def tie_weights(self) -> None:
        """Tie the model's weights again, once they have been moved."""
        self.model.tie_weights()


def distill(
    student: Any,
    masters: Masters,
    ids: Tensor,
    targets: Callable[[list[int]], Tensor],
    steps: Sequence[list[int]],
    held_out: list[int],
    request: Recovering,
    accelerator: Any,
    progress: Progress,
    at_once: int,
) -> Iterator[None]:
    """Train a student on the rows of every step, which the processes share; as `train` otherwise.

    `targets` returns what the dense model's head sees of rows, of which `at_once` run at a time in
    a process.
    """
    device = next(student.parameters()).device
    world, rank = accelerator.num_processes, accelerator.process_index
    share = request.batch // world

    def mean(numbers: list[int], learn: bool) -> Tensor:
        own = numbers[rank * share : (rank + 1) * share] if learn else numbers
        tokens = len(own) * ids.shape[1]
        total = torch.zeros((), dtype=torch.float32, device=device)
        for part in grouped(own, at_once):
            with torch.set_grad_enabled(learn):
                loss = student(ids[part].to(device), targets(part).to(device)) / tokens
            total += loss.detach()
            if learn:
                accelerator.backward(loss)
                masters.collect()
        reduced: Tensor = accelerator.reduce(total, reduction="mean")
        return reduced

    every = max(1, -(-len(steps) // (READINGS * request.epochs)))
    return train(
        progress, masters, steps, held_out, mean, request.lr, every=every, wide=WIDE, eager=True
    )


def distill_model(job: Job) -> tuple[float, float, Any]:
    """Distill the whole model; return the held-out loss before and after, and on the way.

    The work folder holds masters and moments in `state-N/RANK`, and the best weights so far, as
    they are to be written, in `best-N`. Of both there are two, one that counts and one to write.
    """
    request, work, accelerator = job.request, job.work, job.accelerator
    folder, dense_head, weights = _dense_states(job)
    model = job.open(job.pruned.name)
    if shared := all(
        torch.equal(own.bfloat16(), other.bfloat16())
        for own, other in zip(_head_weights(model), weights, strict=True)
    ):
        dense_head = None
    del weights
    student: Any = Student(
        model, find_blocks(model), dense_head, recompute=job.plan.sparing, fixed=job.fixed
    )
    if getattr(accelerator, "is_fsdp2", False):
        # Accelerate shards a model only together with an optimiser; ours comes after.
        held = [p for p in student.parameters() if p.requires_grad]
        student, _ = accelerator.prepare(student, torch.optim.SGD(held, lr=0.0))
    else:
        student = accelerator.prepare_model(student, device_placement=job.processes > 1)
    trained = {
        name.removeprefix("module.").removeprefix("model."): p
        for name, p in student.named_parameters()
        if p.requires_grad
    }
    masters = job.masters(trained)
    steps = steps_of(job.rows.training, request.batch, request.epochs, job.seed)
    progress = Progress(len(steps))
    state, best = counted = tuple(work.kept.get("counted", (0, 0)))
    if work.done:
        run = work.kept["run"]
        progress = Progress(**run | {"held_out": [tuple(one) for one in run["held_out"]]})
        masters.restore(work.load(f"state-{state}/{job.rank}"), progress.done)
    saved, took = time.monotonic(), 0.0
    for _ in distill(
        student, masters, job.calibration.ids,
        lambda rows: torch.stack([read_file(folder / str(row))["hidden"] for row in rows]),
        steps, job.rows.held_out, request, accelerator, progress, job.plan.rows,
    ):  # fmt: skip
        at, loss = progress.held_out[-1]
        job.progress(progress.done, progress.steps, f"KL {loss:.4f}")
        if at != progress.done:
            continue
        if progress.best == progress.done:
            best = 1 - counted[1]
            made = job.as_stored(masters)
            if job.main:
                work.save(f"best-{best}", made)
        now = time.monotonic()
        over = progress.stopped or progress.done == progress.steps
        due = not over and now - saved >= SAVING * took
        if once(functools.partial(bool, due)):
            state = 1 - counted[0]
            own = f"state-{state}/{job.rank}"
            work.save(own, masters.state())
            counted = state, best
            job.keep(progress.done, own, run=asdict(progress), counted=counted)
            saved = time.monotonic()
            took = saved - now
    if job.main:
        made = work.load(f"best-{best}") if progress.best else {}
        parts = [job.pruned.block_names(index) for index in range(len(job.pruned.blocks))]
        others = made.keys() - {name for part in parts for name in part}
        for number, file in enumerate(job.pruned.layout):
            names = parts[number] if number < len(parts) else others
            job.write(file, {name: made[name] for name in names if name in made})
    losses = dict(progress.held_out)
    return losses[0], losses[progress.best], asdict(progress) | {"shared_head": shared}


def _dense_states(job: Job) -> tuple[Path, Head | None, list[Tensor]]:
    """Write what the dense model's head sees, a file a row, in the type computed in.

    Each process makes its share. Returns the folder, the head and its weights.
    """
    folder, ids = once(lambda: job.work.scratch("dense")), job.calibration.ids
    model = job.open(job.dense.name)
    decoder, head = decoder_and_head(model)
    for part in grouped(range(job.rank, len(ids), job.processes), job.plan.rows):
        with torch.inference_mode():
            hidden = decoder(input_ids=ids[part].to(job.device), use_cache=False)[0]
        for row, value in zip(part, hidden, strict=True):
            write_file(folder / str(row), {"hidden": value})
    everyone(None)
    return folder, head, _head_weights(model)


def _head_weights(model: Any) -> list[Tensor]:
    """Return the parameters of a model's output head, and what else is behind its decoder."""
    return [*model.get_output_embeddings().parameters(), *behind(model).values()]
