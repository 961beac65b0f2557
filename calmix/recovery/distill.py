"""Distillation: the whole pruned model towards the dense model's logits, KL(dense || pruned).

The dense model runs once: what its head sees is kept, and logits are made again from that when
they are needed. Knows nothing about files or command lines; how many processes share the work,
and how the weights lie among them, is accelerate's business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calmix.errors import SolverError
from calmix.evaluation.likelihood import Head, behind, decoder_and_head
from calmix.models.blocks import DecoderBlocks
from calmix.recovery.losses import divergence
from calmix.recovery.training import (
    Masters,
    Rows,
    Stop,
    finite,
    grouped,
    rate,
    steps_of,
)

READINGS = 2  # of the held-out rows, an epoch
WIDE = 0.2  # nats a token between two models, of less than which steps are as much smaller (ours)


class Student(nn.Module):
    """A pruned model whose forward is the loss, so that whatever wraps it sees one pass.

    Args:
        model: causal language model in evaluation mode.
        found: its decoder blocks.
        dense_head: the dense model's output head; None where the heads are the same.
        recompute: whether blocks forget their activations and run anew on the way back: the same
            numbers in less memory and more time.
    """

    def __init__(
        self, model: Any, found: DecoderBlocks, dense_head: Head | None, *, recompute: bool
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self._forwards = decoder_and_head(model)
        self._dense_head = dense_head
        self._vocabulary = model.get_output_embeddings().weight.shape[0]
        for name in trained_names(model, found):
            model.get_parameter(name).requires_grad_(True)
        if recompute:
            for block in found.blocks:
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        """Return the sum of KL(dense || pruned) over all positions, in nats.

        Args:
            ids: token ids, shape (rows, length).
            target: what the dense model's head sees of them, shape (rows, length, width).
        """
        decoder, head = self._forwards
        hidden = decoder(input_ids=ids, use_cache=False)[0].flatten(0, 1)
        dense_head = self._dense_head or head
        return divergence(hidden, target.flatten(0, 1), head, dense_head, self._vocabulary)

    def tie_weights(self) -> None:
        """Tie the model's weights again, once they have been moved."""
        self.model.tie_weights()


def trained_names(model: Any, found: DecoderBlocks) -> list[str]:
    """Return what is trained: all of the blocks, and the norm behind them.

    Embeddings, output head and what else is behind the decoder stay as they are.
    """
    embedded = {id(p) for p in model.get_input_embeddings().parameters()}
    embedded |= {id(p) for p in model.get_output_embeddings().parameters()}
    embedded |= {id(p) for p in behind(model).values()}
    prefix = f"{found.name}."
    return [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) or (parameter.ndim == 1 and id(parameter) not in embedded)
    ]


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        epochs: passes over the training rows.
        lr: the learning rate at its peak, of models `WIDE` apart or more.
        batch: rows a step, of all processes together.
        at_once: rows that run at a time in a process.
        seed: of the rows held out and of the order of the others.
    """

    epochs: int
    lr: float
    batch: int
    at_once: int
    seed: int


@dataclass
class Progress:
    """How far a distillation is.

    Attributes:
        done, steps: steps taken, and in all.
        losses: mean KL a token of every step, in nats.
        held_out: [steps taken, mean KL a token of the held-out rows], first before any step.
        best: the steps after which the held-out rows were best; 0: as they came.
        stopped: whether it ended early, because they no longer got better.
    """

    steps: int
    done: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    stopped: bool = False


class Keeper(Protocol):
    """Where a distillation keeps what it makes."""

    def best(self, masters: Masters, step: int) -> None:
        """Keep the weights: the held-out rows were never better than after `step`."""

    def reached(self, masters: Masters, progress: Progress) -> None:
        """Called after every reading of the held-out rows: all it takes to go on is at hand."""


def distill(
    student: Any,
    masters: Masters,
    ids: Tensor,
    targets: Callable[[list[int]], Tensor],
    rows: Rows,
    settings: Settings,
    accelerator: Any,
    keeper: Keeper,
    *,
    progress: Progress,
    tick: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train a student until its steps are taken or the held-out rows no longer get better.

    Args:
        student: a `Student`, as accelerate has prepared it.
        masters: of its parameters; restored, where `progress` tells of steps.
        ids: token ids of all rows, int64 (rows, length).
        targets: returns what the dense model's head sees of rows.
        rows: which rows train.
        settings: how.
        accelerator: accelerate's.
        keeper: where weights and states go.
        progress: how far an earlier run has come.
        tick: called after every step.

    Raises:
        SolverError: a loss is not finite.
    """
    device = next(student.parameters()).device
    world, rank = accelerator.num_processes, accelerator.process_index
    length = ids.shape[1]
    training = rows.training.tolist()
    steps = steps_of(len(training), settings.batch, settings.epochs, settings.seed)
    every = max(1, -(-len(steps) // (READINGS * settings.epochs)))

    def mean(numbers: list[int], *, learn: bool) -> float:
        """Return the mean KL a token of rows; collect its gradients if `learn`."""
        tokens = len(numbers) * length
        total = torch.zeros((), dtype=torch.float32, device=device)
        for part in grouped(numbers, settings.at_once):
            with torch.set_grad_enabled(learn):
                loss = student(ids[part].to(device), targets(part).to(device)) / tokens
            total += loss.detach()
            if learn:  # all processes, whatever the loss: they wait for each other
                accelerator.backward(loss)
                masters.collect()
        return float(accelerator.reduce(total, reduction="mean"))

    def checked(loss: float, where: str) -> float:
        if finite(loss):
            return loss
        raise SolverError(
            f"the loss is not finite {where}: lower --lr, or check the models' weights "
            "(--dtype float32 computes in more range)"
        )

    def reading() -> float:
        return checked(
            mean(rows.held_out.tolist(), learn=False),
            f"on the held-out rows after step {progress.done} of {len(steps)}",
        )

    if not progress.held_out:
        progress.held_out.append((0, reading()))
    peak = settings.lr * min(1.0, progress.held_out[0][1] / WIDE)
    stop = Stop(progress.held_out[0][1])
    for at, loss in progress.held_out[1:]:
        stop.better(loss, at)
    while progress.done < len(steps) and not progress.stopped:
        chosen = [training[number] for number in steps[progress.done]]
        share = settings.batch // world
        loss = mean(chosen[rank * share : (rank + 1) * share], learn=True)
        progress.losses.append(checked(loss, f"at step {progress.done + 1} of {len(steps)}"))
        masters.step(rate(progress.done, len(steps), peak))
        progress.done += 1
        tick(progress)
        if progress.done % every and progress.done < len(steps):
            continue
        progress.held_out.append((progress.done, reading()))
        if stop.better(progress.held_out[-1][1], progress.done):
            progress.best = progress.done
            keeper.best(masters, progress.done)
        progress.stopped = stop.due and progress.done < len(steps)
        keeper.reached(masters, progress)
    return progress
