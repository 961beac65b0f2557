"""Several processes prune one model: rows are shared out, and the solves of layers.

Every process holds the model (or the block at hand), runs its share of the calibration rows, and
gets the sum of all statistics. Each of the layers that share an input is solved by one process and
sent to the others, so that all go on with the same weights. What differs from one process is the
order in which sums are taken, as it does with the size of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from calmix.errors import InputError
from calmix.pruning.gram import Statistic
from calmix.pruning.methods import Method, Solution
from calmix.pruning.patterns import Pattern
from calmix.pruning.reading import agreed, widest


def processes() -> tuple[int, int]:
    """Return this process's number and how many share the work: (0, 1) without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own_rows(ids: Tensor) -> Tensor:
    """Return this process's share of the rows.

    Raises:
        InputError: there are fewer rows than processes.
    """
    rank, world = processes()
    if len(ids) < world:
        raise InputError(f"{len(ids)} calibration rows are too few for {world} processes")
    return ids.tensor_split(world)[rank]


def gather(statistic: Statistic) -> None:
    """Make a statistic that of all processes' rows."""
    if processes()[1] > 1:
        statistic.reduce(dist.all_reduce)


def agree() -> None:
    """Let all processes doubt what one doubts."""
    if processes()[1] > 1:
        agreed(lambda condition: dist.all_reduce(condition, dist.ReduceOp.MIN))


def solve(
    method: Method, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
) -> Solution:
    """Do what the method's `solve` does, each layer in one process; all get the whole.

    Numbers that a method does not give come as NaN.
    """
    rank, world = processes()
    if world == 1:
        return method.solve(weights, statistic, patterns)
    mine = range(rank, len(weights), world)
    own = None
    if mine:
        own = method.solve([weights[i] for i in mine], statistic, [patterns[i] for i in mine])
    made: list[Tensor] = []
    told: list[Tensor] = []
    for number, weight in enumerate(weights):
        source = number % world
        full = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        about = torch.full((3,), torch.nan, dtype=widest(weight.device), device=weight.device)
        if own is not None and source == rank:
            place = mine.index(number)
            full.copy_(own.weights[place])
            for at, value in enumerate((own.errors[place], own.damping, own.dead)):
                if value is not None:
                    about[at] = value
        dist.broadcast(full, source)
        dist.broadcast(about, source)
        made.append(full)
        told.append(about)
    dtype = None if own is None else own.dtype
    counts = method.counts(weights, patterns)
    return Solution(made, counts, [t[0] for t in told], told[0][1], dtype, told[0][2])
