"""Recovery block by block: each towards what the dense block makes of the dense stream.

Two streams of hidden states run through the model, of the dense weights and of the pruned ones. A
block reads the pruned stream and learns to give what the dense block gives on the dense stream, so
that it mends what the blocks before it have left too. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calmix.errors import SolverError
from calmix.models.blocks import DecoderBlocks
from calmix.precision import widest
from calmix.pruning.trace import TOKENS, BlockCall, Calls
from calmix.recovery.losses import relative_error
from calmix.recovery.training import Masters, Stop, finite, rate, steps_of


class States(Protocol):
    """Hidden states of the micro-batches: those that lead into a block, and those out of it."""

    def __getitem__(self, number: int) -> Tensor:
        """Return what micro-batch `number` brings into the block at hand."""

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        """Keep what micro-batch `number` brings into the next block."""

    def turn(self) -> bool:
        """What was kept is what is read from now on."""


class Stream:
    """The hidden states of one model's micro-batches, and what its decoder hands to its blocks.

    Args:
        model: causal language model; `record` needs its weights outside the blocks and those of
            the first, `run` those of the block at hand.
        found: its blocks.
    """

    states: States

    def __init__(self, model: nn.Module, found: DecoderBlocks) -> None:
        self._model, self._found = model, found
        self._calls: list[list[BlockCall]] = []
        self.written: list[list[Any]] = []

    @torch.no_grad()
    def record(self, ids: Tensor, groups: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Yield the hidden states each group of rows brings into the first block.

        Raises:
            ModelError: as `Calls`.
        """
        device = next(self._found.blocks[0].parameters()).device
        calls = Calls(self._model, self._found, ids[:1, :TOKENS].to(device))
        for group in groups:
            hidden, recorded, written = calls.record(ids[list(group)].to(device))
            self._calls.append(recorded)
            self.written.append(written)
            yield hidden

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
        self.states.turn()


@dataclass
class BlockReport:
    """What became of one block.

    Attributes:
        block: its number.
        before, after: mean relative error a token of the held-out rows.
        losses: the same of the training rows, the mean of every epoch.
        held_out: of the held-out rows, after every epoch.
        epochs: the epoch whose weights were kept; 0: as they came.
    """

    block: int
    before: float
    after: float
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    epochs: int = 0


def tune(
    stream: Stream,
    index: int,
    masters: Masters,
    targets: States,
    groups: Sequence[Sequence[int]],
    held_out: Sequence[int],
    sizes: Sequence[int],
    *,
    at_once: int,
    epochs: int,
    lr: float,
    seed: int,
    keep: Callable[[], None],
) -> BlockReport:
    """Train one block until its epochs are over or the held-out rows no longer get better.

    Args:
        stream: the pruned one.
        index: the block, whose weights are in memory.
        masters: of its parameters.
        targets: what it is to give: the dense stream behind the dense block.
        groups: numbers of the micro-batches that train, those together that share a step whatever
            their size.
        held_out: of those that decide.
        sizes: tokens of every micro-batch.
        at_once: groups a step.
        epochs, lr, seed: as for `distill`.
        keep: called whenever the masters are the best so far; never, if they are best as they
            came.

    Raises:
        SolverError: a loss is not finite.
    """

    def error(numbers: Sequence[int], *, learn: bool) -> Tensor:
        """Return the mean error a token, which stays on the device until an epoch is over."""
        tokens, total = sum(sizes[number] for number in numbers), None
        for number in numbers:
            with torch.set_grad_enabled(learn):
                output = stream.run(index, number, keep=False)
                loss = relative_error(output, targets[number]) / tokens
            if learn:
                loss.backward()
                masters.collect()
            value = loss.detach().to(widest(loss.device))
            total = value if total is None else total + value
        assert total is not None
        return total

    def told(losses: Sequence[Tensor]) -> list[float]:
        values = torch.stack(list(losses)).tolist()
        if all(map(finite, values)):
            return values
        raise SolverError(
            f"the loss is not finite in block {index}: lower --lr, or check the models' weights "
            "(--dtype float32 computes in more range)"
        )

    stop = Stop(told([error(held_out, learn=False)])[0])
    report = BlockReport(index, stop.best, stop.best)
    steps = steps_of(len(groups), at_once, epochs, seed)
    an_epoch = len(steps) // epochs
    for epoch in range(epochs):
        losses = []
        for step in range(epoch * an_epoch, (epoch + 1) * an_epoch):
            losses.append(error([n for group in steps[step] for n in groups[group]], learn=True))
            masters.step(rate(step, len(steps), lr))
        *values, reading = told([*losses, error(held_out, learn=False)])
        report.losses.append(sum(values) / len(values))
        report.held_out.append(reading)
        if stop.better(report.held_out[-1], epoch + 1):
            keep()
        if stop.due:
            break
    report.after, report.epochs = stop.best, stop.at
    return report
