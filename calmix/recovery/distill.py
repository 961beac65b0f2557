"""Distillation of the dense model's logits into the whole pruned model, KL(dense || pruned).

The dense model runs once: its head's inputs are kept, and logits are recomputed from them when
needed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calmix.evaluation.likelihood import Head, behind, decoder_and_head, divergences, in_cache
from calmix.memory import LOGIT_POSITIONS, LOGITS_AT_ONCE
from calmix.models.blocks import find_blocks
from calmix.models.opening import open_model
from calmix.models.shards import read_file, write_file
from calmix.pruning.solvers.grids import stored
from calmix.recovery.running import RecoveryRun
from calmix.recovery.training import TrainingState, grouped, steps_of, train, trained_parameters

READINGS = 2  # evaluations of the held-out rows per epoch
WIDE_LOSS = 0.2  # nats per token: a smaller initial loss reduces the learning rate (ours)
SAVING = 20  # states are saved so that saving takes less than 1/20 of the time


class _Given(torch.autograd.Function):
    """A loss with a precomputed gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def divergence(
    hidden: Tensor, target: Tensor, head: Head, dense_head: Head, vocabulary: int
) -> Tensor:
    """Return the sum over tokens of KL(dense || pruned), in nats.

    Logits are computed for a few tokens at a time, together with the gradient by `hidden`, and
    never kept. The heads' weights get no gradient. The heads may be on different devices.

    Args:
        hidden, target: inputs of the pruned and the dense model's head, shape (tokens, width).
        vocabulary: width of the logits.
    """
    learns = torch.is_grad_enabled() and hidden.requires_grad
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    chunk = max(LOGIT_POSITIONS, LOGITS_AT_ONCE // vocabulary)
    gradients: list[Tensor] = []
    for states, dense_states in zip(hidden.detach().split(chunk), target.split(chunk), strict=True):
        states.requires_grad_(learns)
        with torch.no_grad():
            dense = dense_head(dense_states)
        logits = head(states)
        slopes: list[Tensor] = []
        for theirs, ours in zip(in_cache(dense), in_cache(logits.detach()), strict=True):
            p, q = theirs.float().to(ours.device), ours.float()
            total += divergences(p, q).sum().to(total.device)
            if learns:
                # The derivative of KL by the pruned model's logits is q - p.
                slopes.append(q.sub_(p).to(ours.dtype))
        if learns:
            gradients += torch.autograd.grad(logits, states, torch.cat(slopes))
    if not learns:
        return total
    loss: Tensor = _Given.apply(hidden, total, torch.cat(gradients))
    return loss


def student_loss(
    model: Any, dense_head: Head | None, *, recompute: bool, fixed: Collection[str] = ()
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a pruned model ready to train; return what computes the sum of KL(dense || pruned) over
    all positions, in nats, from ids (rows, length) and the dense model's head inputs for them.

    `dense_head` is None if the heads are equal; `fixed` weights are not trained. With `recompute`,
    blocks are recomputed in the backward pass: the same numbers in less memory and more time.
    """
    decoder, head = decoder_and_head(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for name, parameter in trained_parameters(model).items():
        parameter.requires_grad_(name not in fixed)
    if recompute:
        for block in find_blocks(model).blocks:
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )

    def loss(ids: Tensor, target: Tensor) -> Tensor:
        hidden = decoder(input_ids=ids, use_cache=False)[0].flatten(0, 1)
        return divergence(hidden, target.flatten(0, 1), head, dense_head or head, vocabulary)

    return loss


def distill_model(job: RecoveryRun) -> tuple[float, float, Any]:
    """Distil the whole model; return the held-out loss before and after, and the curve.

    The work folder holds masters and moments in `state-N`, and the best weights so far, in their
    output types, in `best-N`. There are two of each: the valid one and the one being written.
    """
    request, work = job.request, job.work
    folder, dense_head, weights = _dense_states(job)
    model = open_model(job.pruned.name, **job.opening).model
    if shared := all(
        torch.equal(one.bfloat16(), dense.bfloat16())
        for one, dense in zip(_head_weights(model), weights, strict=True)
    ):
        dense_head = None
    del weights
    loss_of = student_loss(model, dense_head, recompute=job.sparing, fixed=job.fixed)
    masters = job.masters({name: p for name, p in model.named_parameters() if p.requires_grad})
    ids = job.calibration.ids

    def mean(rows: list[int], learn: bool) -> Tensor:
        tokens = len(rows) * ids.shape[1]
        total = torch.zeros((), dtype=torch.float32, device=job.device)
        for part in grouped(rows, job.rows):
            seen = torch.stack([read_file(folder / str(row))["hidden"] for row in part])
            with torch.set_grad_enabled(learn):
                loss = loss_of(ids[part].to(job.device), seen.to(job.device)) / tokens
            total += loss.detach()
            if learn:
                loss.backward()
                masters.collect()
        return total

    steps = steps_of(job.training, request.batch, request.epochs, job.seed)
    progress = TrainingState(len(steps))
    state, best = counted = tuple(work.state.get("counted", (0, 0)))
    if work.done:
        progress = TrainingState(**work.state["run"])
        masters.restore(work.load(f"state-{state}"), progress.done)
    saved, took = time.monotonic(), 0.0
    every = max(1, -(-len(steps) // (READINGS * request.epochs)))
    held_out, lr = job.held_out, request.lr
    for _ in train(progress, masters, steps, held_out, mean, lr, every=every, wide=WIDE_LOSS):
        at, loss = progress.held_out[-1]
        job.run.progress(progress.done, progress.steps, f"KL {loss:.4f}")
        if at != progress.done:
            continue
        if progress.best == progress.done:
            best = 1 - counted[1]
            work.save(f"best-{best}", masters.stored() | stored(masters.blocks()))
        now = time.monotonic()
        over = progress.stopped or progress.done == progress.steps
        if not over and now - saved >= SAVING * took:
            state = 1 - counted[0]
            work.save(f"state-{state}", masters.state())
            counted = state, best
            job.keep(progress.done, run=asdict(progress), counted=counted)
            saved = time.monotonic()
            took = saved - now
    best_weights = work.load(f"best-{best}") if progress.best else {}
    for name, blocks in job.encoded.items():
        if (data := best_weights.pop(f"{name}|{blocks.name}", None)) is not None:
            job.encoded[name] = replace(blocks, data=data)
    parts = [job.pruned.block_names(index) for index in range(len(job.pruned.blocks))]
    others = best_weights.keys() - {name for part in parts for name in part}
    # File by file: splitting merged weights copies them.
    for number, file in enumerate(job.pruned.layout):
        names = parts[number] if number < len(parts) else others
        present = {name: best_weights[name] for name in names if name in best_weights}
        job.write(file, job.pruned.as_stored(present))
    losses = dict(progress.held_out)
    return losses[0], losses[progress.best], asdict(progress) | {"shared_head": shared}


def _dense_states(job: RecoveryRun) -> tuple[Path, Head | None, list[Tensor]]:
    """Write the dense model's head inputs, one file per row, in the compute type.

    Returns the folder, the head and its weights.
    """
    folder, ids = job.work.scratch("dense"), job.calibration.ids
    model = open_model(job.dense.name, **job.opening).model
    decoder, head = decoder_and_head(model)
    for part in grouped(range(len(ids)), job.rows):
        with torch.inference_mode():
            hidden = decoder(input_ids=ids[part].to(job.device), use_cache=False)[0]
        for row, value in zip(part, hidden, strict=True):
            write_file(folder / str(row), {"hidden": value})
    for block in find_blocks(model).blocks:  # the head holds the model
        block.to("meta")
    return folder, head, _head_weights(model)


def _head_weights(model: Any) -> list[Tensor]:
    """Return the parameters of a model's output head and of all else after its decoder."""
    return [*model.get_output_embeddings().parameters(), *behind(model).values()]
