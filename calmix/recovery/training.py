"""What both ways of recovery share: rows, steps, learning rate, and weights in float32.

The modules compute in the type they have (bfloat16); what is optimised are float32 copies, the
masters, which are rounded into the modules after every step. Zeros of a mask get no gradient, so
that Adam leaves them as they are. Masters of quantised weights are rounded to levels that occur,
with gradients as if they were not (the straight-through estimator, arXiv 1308.3432).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from calmix.errors import InputError, SolverError
from calmix.evaluation.likelihood import behind
from calmix.machine import MICRO_TOKENS
from calmix.models.blocks import find_blocks
from calmix.pruning.solvers.grids import Grid

T = TypeVar("T")
BETAS = (0.9, 0.95)
WARM_UP = 0.05  # of all steps, one at least
HELD_OUT = 16  # one row in so many, two at least
SIZES = (1e-3, 1.0)  # least and most size of a tensor that the learning rate is times
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
STEP = 4.0  # size of a quantised tensor in steps between its levels (ours)
NEAR = 0.4999  # steps that its masters are from their level at first, at most
PATIENCE = 3  # readings of the held-out rows without a better one before it stops


def held_out(rows: int) -> int:
    """Return how many rows of a set are held out: one in 16, two at least."""
    return max(2, rows // HELD_OUT)


def split_rows(sources: Sequence[str], batch: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the rows of a calibration set that train, and those that decide when to stop: one in
    16, two at least, by chance, spread over the sources of the rows.

    They are taken at even steps from the rows in order of their source, so that a source has as
    much say in when to stop as it has weight in the set.
    """
    rows = len(sources)
    held = held_out(rows)
    if rows - held < batch:
        raise InputError(
            f"a calibration set of {rows} rows is too small to recover on: with {held} held out "
            f"and {batch} rows a step it takes {batch + held} or more"
        )
    generator = torch.Generator().manual_seed(seed)
    order = sorted(torch.randperm(rows, generator=generator).tolist(), key=lambda i: sources[i])
    start = float(torch.rand(1, generator=generator))
    chosen = {order[int((number + start) * rows / held)] for number in range(held)}
    return [row for row in range(rows) if row not in chosen], sorted(chosen)


def steps_of(items: Sequence[T], at_once: int, epochs: int, seed: int) -> list[list[T]]:
    """Return the items of every step: each epoch in its own order, what is left over unused."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[T]] = []
    for _ in range(epochs):
        order = [items[at] for at in torch.randperm(len(items), generator=generator).tolist()]
        steps += grouped(order, at_once)[: len(items) // at_once]
    return steps


def grouped(items: Sequence[T], at_once: int) -> list[list[T]]:
    """Cut items into groups, the last of which may be smaller."""
    return [list(items[at : at + at_once]) for at in range(0, len(items), at_once)]


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: a short warm-up, then linearly towards zero.

    Masters take it times the `size_of` a tensor.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (steps - step) / (steps - warm + 1)


def trained_names(model: Any) -> list[str]:
    """Return what a distillation trains: all of the blocks, and the norm behind them.

    Embeddings, output head and what else is behind the decoder stay as they are.
    """
    embedded = {id(p) for p in model.get_input_embeddings().parameters()}
    embedded |= {id(p) for p in model.get_output_embeddings().parameters()}
    embedded |= {id(p) for p in behind(model).values()}
    prefix = f"{find_blocks(model).name}."
    return [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) or (parameter.ndim == 1 and id(parameter) not in embedded)
    ]


def size_of(stored: Tensor) -> float:
    """Return the root mean square of a tensor's kept weights, within `SIZES`.

    A learning rate times that moves weights by the same share in every model and layer (Adafactor,
    arXiv 1804.04235, section 8): those of one model may be ten times those of another. Vectors of
    a norm may hold hundreds beside nearly nothing: none is moved faster than by the rate itself.
    """
    kept = int(torch.count_nonzero(stored))
    exact = torch.promote_types(stored.dtype, torch.float32)
    whole = float(torch.linalg.vector_norm(stored, dtype=exact))
    least, most = SIZES
    return min(most, max(least, whole / math.sqrt(max(1, kept))))


def rows_at_once(batch: int, length: int) -> list[int]:
    """Return how many rows may run at a time, the most first: divisors of the batch."""
    most = max(1, MICRO_TOKENS // length)
    return [rows for rows in range(min(batch, most), 0, -1) if batch % rows == 0]


@dataclass
class Progress:
    """How far a training is: the mean loss a token of every step, and of the held-out rows with the
    steps taken before; after how many they were `best` (0: as they came).
    """

    steps: int
    done: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[list[Any]] = field(default_factory=list)
    best: int = 0
    stopped: bool = False


def train(
    progress: Progress,
    masters: Masters,
    steps: Sequence[list[int]],
    held_out: list[int],
    mean: Callable[[list[int], bool], Tensor],
    lr: float,
    *,
    every: int,
    where: str = "",
    wide: float = 0.0,
) -> Iterator[None]:
    """Train until all steps are taken or what is held out no longer gets better.

    Yields after every step; an earlier run's progress is resumed. `mean` returns the mean loss a
    token of some items, and collects its gradients where it is to learn. Held-out items are read
    `every` so many steps. Where they lose less than `wide` at first, steps are as much smaller.
    """

    def loss_of(items: list[int], learn: bool, at: str) -> float:
        loss = float(mean(items, learn))
        if not math.isfinite(loss):
            raise SolverError(
                f"the loss is not finite {where}{at} of {len(steps)}: lower --lr, or check the "
                "models' weights (--dtype float32 computes in more range)"
            )
        return loss

    def read() -> None:
        at = f"on the held-out rows after step {progress.done}"
        progress.held_out.append([progress.done, loss_of(held_out, False, at)])

    if not progress.held_out:
        read()
    peak = lr * min(1.0, progress.held_out[0][1] / wide) if wide else lr
    while progress.done < len(steps) and not progress.stopped:
        at = f"at step {progress.done + 1}"
        progress.losses.append(loss_of(steps[progress.done], True, at))
        masters.step(rate(progress.done, len(steps), peak))
        progress.done += 1
        if progress.done % every == 0 or progress.done == len(steps):
            read()
            losses = [loss for _, loss in progress.held_out]
            best = losses.index(min(losses))
            progress.best = progress.held_out[best][0]
            idle = len(losses) - 1 - best
            progress.stopped = idle >= PATIENCE and progress.done < len(steps)
        yield


def near_dense(grid: Grid, stored: Tensor, dense: Tensor) -> Tensor:
    """Return masters that round to stored weights on a grid, and lean to where dense ones are."""
    most = NEAR * grid.steps().abs().clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
    own, other = (one.float().view(len(one), most.shape[1], -1) for one in (stored, dense))
    return torch.tanh((other - own) / most).mul_(most).add_(own).view(stored.shape)


class Masters:
    """Float32 copies of parameters, with Adam's moments (arXiv 1412.6980, betas 0.9 and 0.95).

    `stored` returns a parameter by name in the precision of the files; `masked` says whether its
    zeros stay. Quantised ones have `grids`, and `dense` returns what they were.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        stored: Callable[[str], Tensor],
        masked: Callable[[str], bool],
        grids: Mapping[str, Grid] | None = None,
        dense: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.values: dict[str, nn.Parameter] = {}
        self._levels: dict[str, tuple[Grid, int, int]] = {}  # grids, and the levels that occur
        groups: list[dict[str, Any]] = []
        for name, parameter in self.parameters.items():
            full = stored(name)
            if grids and dense and name in grids:
                grid, full = grids[name].to(parameter.device), full.to(parameter.device)
                low, high = map(int, grid.levels(full).aminmax())
                self._levels[name] = grid, low, high
                size, zeros = STEP * float(grid.steps().abs().mean()), full == 0
                full = near_dense(grid, full, dense(name).to(parameter.device))
                if masked(name):
                    full.masked_fill_(zeros, 0)
            else:
                size = size_of(full)
            own = full.to(parameter.device, torch.float32, copy=True)
            self.values[name] = nn.Parameter(own)
            groups.append({"params": [self.values[name]], "size": size})
        self._masked = [value for name, value in self.values.items() if masked(name)]
        fused = next(iter(self.values.values())).device.type in ("cpu", "cuda")
        self._adam = torch.optim.Adam(groups, lr=0.0, betas=BETAS, fused=fused)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the parameters' gradients to the masters', and forget them."""
        for name, parameter in self.parameters.items():
            master, gradient = self.values[name], parameter.grad
            parameter.grad = None
            if gradient is not None and master.grad is not None:
                master.grad.add_(gradient)
            elif gradient is not None:
                master.grad = gradient.float()

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients collected; zeros stay exactly zero.

        The learning rate is a share of every tensor's size.
        """
        for master in self._masked:
            if master.grad is not None:
                master.grad.mul_(master != 0)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate * group["size"]
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Round the masters into the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.rounded(name))

    def rounded(self, name: str) -> Tensor:
        """Return the weights that a master stands for, float32."""
        value = self.values[name].detach()
        if name not in self._levels:
            return value
        grid, low, high = self._levels[name]
        return grid.nearest(value, low, high)

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments, all it takes to resume."""
        state = {f"value/{name}": value.detach() for name, value in self.values.items()}
        for name, value in self.values.items():
            for kind in MOMENTS if value in self._adam.state else ():
                state[f"{kind}/{name}"] = self._adam.state[value][kind]
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Resume from a state, after so many steps."""
        for name, value in self.values.items():
            value.copy_(state[f"value/{name}"])
            if f"{MOMENTS[0]}/{name}" in state:
                own = self._adam.state[value] = {
                    kind: torch.empty_like(value).copy_(state[f"{kind}/{name}"]) for kind in MOMENTS
                }
                own["step"] = torch.tensor(float(steps), device=value.device)
        self.round()
