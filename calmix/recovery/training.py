"""Shared by both recovery methods: rows, steps, learning rate, and float32 master weights.

The modules compute in their own type (bfloat16). Adam optimises float32 copies, the masters, which
are rounded into the modules after every step. Masked zeros get no gradient, so Adam leaves them
unchanged. Masters of quantised weights are rounded to their layer's range of levels, with a
straight-through gradient (arXiv 1308.3432). In GGML's blocks only the steps are trained, as in
MLX's DWQ, and the levels stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from calmix.errors import InputError, SolverError
from calmix.evaluation.likelihood import behind
from calmix.machine import MICRO_TOKENS
from calmix.memory import plan_recovery
from calmix.models.blocks import find_blocks
from calmix.models.empty import EmptyModel
from calmix.options import Recovering
from calmix.pruning.solvers.ggml_types import Encoded
from calmix.pruning.solvers.grids import Grid

T = TypeVar("T")
BETAS = (0.9, 0.95)
WARM_UP = 0.05  # of all steps, at least one
HELD_OUT = 16  # one row in 16, at least two
SIZES = (1e-3, 1.0)  # bounds of a tensor's size, which scales its learning rate
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
LEVELS = 2**15  # largest level that a grid of up to 8 bits can have, with outliers
STEP = 4.0  # size of a quantised tensor, in steps between its levels (ours)
FACTOR = 1.0  # size of a factor of blocks' steps (ours)
NEAR_LEVEL = 0.4999  # maximum initial distance of its masters from their level, in steps
PATIENCE = 3  # evaluations without improvement before training stops


def held_out(rows: int) -> int:
    """Return the number of rows held out of a set: one in 16, at least two."""
    return max(2, rows // HELD_OUT)


def split_rows(sources: Sequence[str], batch: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the training rows and the held-out rows of a calibration set.

    Held-out rows are random but stratified: taken at even steps from rows sorted by source, so that
    each source has the same weight in early stopping as in the set.
    """
    rows = len(sources)
    count = held_out(rows)
    if rows - count < batch:
        raise InputError(
            f"a calibration set of {rows} rows is too small for recovery: with {count} held out "
            f"and {batch} per step, at least {batch + count} are needed (--rows)"
        )
    generator = torch.Generator().manual_seed(seed)
    order = sorted(torch.randperm(rows, generator=generator).tolist(), key=lambda i: sources[i])
    start = float(torch.rand(1, generator=generator))
    chosen = {order[int((number + start) * rows / count)] for number in range(count)}
    return [row for row in range(rows) if row not in chosen], sorted(chosen)


def steps_of(items: Sequence[T], at_once: int, epochs: int, seed: int) -> list[list[T]]:
    """Return the items of every step: each epoch is shuffled, and its remainder is unused."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[T]] = []
    for _ in range(epochs):
        order = [items[at] for at in torch.randperm(len(items), generator=generator).tolist()]
        steps += grouped(order, at_once)[: len(items) // at_once]
    return steps


def grouped(items: Sequence[T], at_once: int) -> list[list[T]]:
    """Split items into groups; the last may be smaller."""
    return [list(items[at : at + at_once]) for at in range(0, len(items), at_once)]


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: a short warm-up, then linear decay to zero.

    Masters multiply it by the `size_of` each tensor.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (steps - step) / (steps - warm + 1)


def trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that distillation trains: all of the blocks and the final norm.

    Embeddings, output head and all else after the decoder stay unchanged.
    """
    fixed = {id(p) for p in model.get_input_embeddings().parameters()}
    fixed |= {id(p) for p in model.get_output_embeddings().parameters()}
    fixed |= {id(p) for p in behind(model).values()}
    prefix = f"{find_blocks(model).name}."
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) or (parameter.ndim == 1 and id(parameter) not in fixed)
    }


def trained_weights(model: Any, method: str) -> int | None:
    """Return the number of weights that distillation trains; None if another method recovers."""
    if method != "distill":
        return None
    return sum(p.numel() for p in trained_parameters(model).values())


def size_of(stored: Tensor) -> float:
    """Return the root mean square of a tensor's nonzero weights, clamped to `SIZES`.

    Scaling the learning rate by it makes relative updates equal across models and layers
    (Adafactor, arXiv 1804.04235, section 8), whose weights can differ tenfold. Norm vectors can
    hold values in the hundreds beside tiny ones: the bound of 1 keeps the rate from growing.
    """
    nonzero = int(torch.count_nonzero(stored))
    exact = torch.promote_types(stored.dtype, torch.float32)
    whole = float(torch.linalg.vector_norm(stored, dtype=exact))
    least, most = SIZES
    return min(most, max(least, whole / math.sqrt(max(1, nonzero))))


def rows_at_once(batch: int, length: int) -> list[int]:
    """Return the numbers of rows that may run at a time, largest first: divisors of the batch."""
    most = max(1, MICRO_TOKENS // length)
    return [rows for rows in range(min(batch, most), 0, -1) if batch % rows == 0]


def recovery_memory(
    model: EmptyModel, request: Recovering, length: int, room: float = math.inf
) -> int:
    """Return the bytes that recovery needs besides the program; less if `room` is limited."""
    source: Any = model
    rows = rows_at_once(request.batch, length)
    trained = trained_weights(model.model, request.method)
    return plan_recovery(source, length, rows, room, trained)[-1]


@dataclass
class TrainingState:
    """The state of a training run: mean loss per token of each step, pairs of (steps done, loss) of
    the held-out rows, and the number of steps with the best held-out loss (0: initial weights).
    """

    steps: int
    done: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[list[Any]] = field(default_factory=list)
    best: int = 0
    stopped: bool = False


def train(
    progress: TrainingState,
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
    """Train until all steps are done or the held-out loss stops improving.

    Yields after every step and resumes an earlier run's progress. `mean` returns the mean loss per
    token of some items and, if its second argument is true, collects gradients. Held-out items are
    evaluated `every` so many steps. If their first loss is below `wide`, the learning rate is
    reduced in proportion.
    """

    def loss_of(items: list[int], learn: bool) -> float:
        loss, done = float(mean(items, learn)), progress.done
        if not math.isfinite(loss):
            at = f"at step {done + 1}" if learn else f"on the held-out rows after step {done}"
            raise SolverError(
                f"the loss is not finite {where}{at} of {len(steps)}: lower --lr, use --dtype "
                "float32, or check the models' weights"
            )
        return loss

    def evaluate() -> None:
        progress.held_out.append([progress.done, loss_of(held_out, False)])

    if not progress.held_out:
        evaluate()
    peak = lr * min(1.0, progress.held_out[0][1] / wide) if wide else lr
    while progress.done < len(steps) and not progress.stopped:
        progress.losses.append(loss_of(steps[progress.done], True))
        masters.step(rate(progress.done, len(steps), peak))
        progress.done += 1
        if progress.done % every == 0 or progress.done == len(steps):
            evaluate()
            losses = [loss for _, loss in progress.held_out]
            best = losses.index(min(losses))
            progress.best = progress.held_out[best][0]
            idle = len(losses) - 1 - best
            progress.stopped = idle >= PATIENCE and progress.done < len(steps)
        yield


def near_dense(grid: Grid, stored: Tensor, dense: Tensor) -> Tensor:
    """Return masters that round to the stored weights on a grid but lie towards the dense ones."""
    most = NEAR_LEVEL * grid.steps().abs().clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
    start, goal = (one.float().view(len(one), most.shape[1], -1) for one in (stored, dense))
    return torch.tanh((goal - start) / most).mul_(most).add_(start).view(stored.shape)


class Steps:
    """The steps of a matrix's blocks, in which its weights are linear.

    Attributes:
        blocks: as they were; their steps are multiplied by trained factors.
    """

    def __init__(self, blocks: Encoded, device: torch.device) -> None:
        self.blocks, first = blocks, blocks.steps
        self._steps = first.float().to(device)
        self._parts = []  # the weights for a step of one, and none for the other
        for number in range(first.shape[-1]):
            one = torch.zeros_like(first)
            one[..., number] = 1
            self._parts.append(self._by_block(blocks.with_steps(one).values().to(device)))

    def _by_block(self, weights: Tensor) -> Tensor:
        return weights.unflatten(1, (self._steps.shape[1], -1))

    def ones(self) -> Tensor:
        """Return the factors that change nothing, (rows, blocks, 1 or 2)."""
        return torch.ones_like(self._steps)

    def gradient(self, slopes: Tensor) -> Tensor:
        """Return the gradient by the factors, given that by the weights."""
        slopes = self._by_block(slopes.float())
        return torch.stack([(slopes * part).sum(-1) for part in self._parts], -1) * self._steps

    def values(self, factors: Tensor) -> Tensor:
        """Return the weights as GGML decodes them, float32 (rows, columns)."""
        steps = self._rounded(factors).float()
        terms = [part * steps[..., n, None] for n, part in enumerate(self._parts)]
        return sum(terms[1:], start=terms[0]).flatten(1)

    def encoded(self, factors: Tensor) -> Encoded:
        """Return the blocks with the factors' steps."""
        return self.blocks.with_steps(self._rounded(factors).to(self.blocks.data.device))

    def _rounded(self, factors: Tensor) -> Tensor:
        return (self._steps * factors).half()


def ends(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest level that weights may have: those of the matrix, or of
    each group (rows, groups, 1) if no group spans these, as with zero points."""
    levels = grid.levels(weight)
    low, high = levels.aminmax()
    groups = levels.view(len(weight), grid.scale.shape[1], -1)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    span = (most.clamp_(min=0) - least.clamp_(max=0)).max()
    if len(grid.scale) == 1 or high - low <= span:
        return low, high
    return least, (least + span).clamp_(max=high)


class Masters:
    """Float32 copies of parameters, with Adam's moments (arXiv 1412.6980, betas 0.9 and 0.95).

    `stored` returns a parameter by name in the precision of the files; `masked` are the names of
    those whose zeros are kept. Quantised parameters have `grids`, and `dense` returns their dense
    weights; those in `blocks` of GGML have factors of their steps as masters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        stored: Callable[[str], Tensor],
        masked: Collection[str],
        grids: Mapping[str, Grid],
        dense: Callable[[str], Tensor],
        blocks: Mapping[str, Encoded],
    ) -> None:
        self.parameters = dict(parameters)
        self.values: dict[str, nn.Parameter] = {}
        self._levels: dict[str, tuple[Grid, Tensor, Tensor]] = {}  # grid, lowest and highest level
        self._steps: dict[str, Steps] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # in the files
        groups: list[dict[str, Any]] = []
        for name, parameter in self.parameters.items():
            full = stored(name)
            self._dtypes[name] = full.dtype
            if name in blocks:
                self._steps[name] = Steps(blocks[name], parameter.device)
                full, size = self._steps[name].ones(), FACTOR
            elif name in grids:
                grid, full = grids[name].to(parameter.device), full.to(parameter.device)
                low, high = ends(grid, full)
                if not -LEVELS <= float(low.min()) <= float(high.max()) <= LEVELS:
                    raise InputError(
                        f"the scales of {name} are not those of its weights: fetch the model "
                        "again, or delete its calmix-scales to use the weights as they are"
                    )
                self._levels[name] = grid, low, high
                size, zeros = STEP * float(grid.steps().abs().mean()), full == 0
                full = near_dense(grid, full, dense(name).to(parameter.device))
                if name in masked:
                    full.masked_fill_(zeros, 0)
            else:
                size = size_of(full)
            master = full.to(parameter.device, torch.float32, copy=True)
            self.values[name] = nn.Parameter(master)
            groups.append({"params": [self.values[name]], "size": size})
        self._masked = [
            value for name, value in self.values.items() if name in masked and name not in blocks
        ]
        fused = next(iter(self.values.values())).device.type in ("cpu", "cuda")
        self._adam = torch.optim.Adam(groups, lr=0.0, betas=BETAS, fused=fused)

    @torch.no_grad()
    def collect(self) -> None:
        """Move the parameters' gradients to the masters, adding to theirs."""
        for name, parameter in self.parameters.items():
            master, gradient = self.values[name], parameter.grad
            parameter.grad = None
            if gradient is not None and name in self._steps:
                gradient = self._steps[name].gradient(gradient)
            if gradient is not None and master.grad is not None:
                master.grad.add_(gradient)
            elif gradient is not None:
                master.grad = gradient.float()

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients collected; masked zeros stay exactly zero.

        The learning rate is relative to each tensor's size.
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
        """Copy the rounded masters to the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.rounded(name))

    def rounded(self, name: str) -> Tensor:
        """Return a master as float32 weights, on its grid if quantised."""
        value = self.values[name].detach()
        if name in self._steps:
            return self._steps[name].values(value)
        if name not in self._levels:
            return value
        grid, low, high = self._levels[name]
        levels = grid.levels(value).view(len(value), grid.scale.shape[1], -1)
        return grid.values(levels.clamp_(low, high).view(value.shape))

    def stored(self, *, copy: bool = False) -> dict[str, Tensor]:
        """Return the rounded masters in the types of the files."""
        return {
            name: self.rounded(name).to(dtype, copy=copy) for name, dtype in self._dtypes.items()
        }

    def blocks(self) -> dict[str, Encoded]:
        """Return GGML's blocks of the rounded masters."""
        return {name: one.encoded(self.values[name].detach()) for name, one in self._steps.items()}

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments, enough to resume."""
        state = {f"value/{name}": value.detach() for name, value in self.values.items()}
        for name, value in self.values.items():
            for kind in MOMENTS if value in self._adam.state else ():
                state[f"{kind}/{name}"] = self._adam.state[value][kind]
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Restore a state saved after `steps` steps."""
        for name, value in self.values.items():
            value.copy_(state[f"value/{name}"])
            if f"{MOMENTS[0]}/{name}" in state:
                adam = self._adam.state[value] = {
                    kind: torch.empty_like(value).copy_(state[f"{kind}/{name}"]) for kind in MOMENTS
                }
                adam["step"] = torch.tensor(float(steps), device=value.device)
        self.round()
