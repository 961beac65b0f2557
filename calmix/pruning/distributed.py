"""Several processes prune one model: rows are shared out, and the solves of layers.

Every process holds the model (or the block at hand), runs its share of the calibration rows, and
gets the sum of all statistics. Each of the layers that share an input, or of as many experts as
there are processes, is solved by one process and sent to the others, so that all go on with the
same weights. What differs from one process is the order in which sums are taken, as it does with
the size of a micro-batch.

What concerns the host (files, text, mistakes) goes by groups of its own, without the devices.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calmix.errors import CalmixError, InputError, SolverError
from calmix.precision import widest
from calmix.pruning.gram import Gram, Statistic, relative_error
from calmix.pruning.methods import DTYPES, Method, Solution
from calmix.pruning.patterns import Pattern

T = TypeVar("T")
WAIT = timedelta(days=7)  # the first process may draw text or write files for hours meanwhile
TOLD, TIDY = "calmix/told", "calmix/tidy"  # who says what went wrong; the first one has tidied up
TIDYING = timedelta(seconds=20)  # a launcher waits for 30 s before it kills


class PeerError(CalmixError):
    """Another process has ended before the work was done."""


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Join the processes that torchrun has started, if it has; give the device of this one.

    Of what goes wrong in several of them one process tells: the others end without a word, with
    exit code 2.

    Args:
        device: as the user named it.

    Raises:
        InputError: there is no device for each process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    try:
        store, rank, world = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        line = next(iter(str(error).splitlines()), "")
        raise InputError(f"WORLD_SIZE is set, but no launcher is there: {line}") from error
    try:
        kind, own = _own_device(device)
        dist.init_process_group(
            dist.get_default_backend_for_device(kind), timeout=WAIT, store=store, rank=rank,
            world_size=world,
        )  # fmt: skip
        yield own
        dist.destroy_process_group()
    except Exception:
        tells = _tells(store, rank)
        _leave(store, rank)
        if not tells:
            sys.exit(2)
        raise
    finally:
        _groups.clear()


def _own_device(name: str) -> tuple[str, str]:
    """Return the kind and the name of this process's device."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "cpu" or (name == "auto" and (found is None or found.type == "mps")):
        return "cpu", "cpu"
    kind, local = name if name != "auto" or found is None else found.type, _local()
    if ":" in kind or kind == "mps":
        raise InputError(f"--device {name} is one device: several processes need one each")
    if found is None or found.type != kind:
        raise InputError(f"device '{kind}' cannot be used: there is none")
    if local >= (count := torch.accelerator.device_count()):
        raise InputError(
            f"there are {count} devices here, and more processes: start {count} (--nproc-per-node)"
        )
    torch.accelerator.set_device_index(local)
    return kind, f"{kind}:{local}"


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def here() -> int:
    """Return how many of the processes run on this machine."""
    world = processes()[1]
    return int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1


def _tells(store: Any, rank: int) -> bool:
    """Tell whether this process is the first in which something went wrong."""
    key = f"{TOLD}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        return bool(store.compare_set(key, "", str(rank)) == str(rank).encode())
    except RuntimeError:  # the process that keeps the store has ended, for a reason it has told
        return False


def _leave(store: Any, rank: int) -> None:
    """Let go of the others, so that they end too; the first one tidies up before any has ended.

    A launcher ends all that are left as soon as one has.
    """
    if dist.is_initialized():
        alone = dist.get_backend() == "gloo"  # a device's groups may wait for the others
        for group in [*_groups, *([None] * alone)]:
            dist.destroy_process_group(group)
    with contextlib.suppress(RuntimeError):  # nobody keeps the store any more, or it took too long
        if rank == 0:
            store.set(TIDY, "")
        else:
            store.wait([TIDY], TIDYING)


_groups: list[Any] = []  # of hosts; the first is for the thread at work


def host_group() -> Any:
    """Return a new group for what one thread of each host tells the others; None if there are none.

    All processes call it, in the same order.
    """
    if processes()[1] == 1:
        return None
    _together(lambda: _groups.append(dist.new_group(backend="gloo", timeout=WAIT)))
    return _groups[-1]


def once(act: Callable[[], T]) -> T:
    """Let the first process alone act; return what came of it, or raise its mistake, in all.

    Needs a `host_group`, as `everyone` does.
    """
    rank, world = processes()
    if world == 1:
        return act()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = act()
        except CalmixError as error:
            box[1] = error
    _together(lambda: dist.broadcast_object_list(box, 0, _groups[0], torch.device("cpu")))
    if box[1] is not None:
        raise box[1]
    return box[0]


def everyone(value: T, group: Any = None) -> list[T]:
    """Return the values of all processes, to each of them.

    Args:
        value: this process's.
        group: of threads beside those at work.
    """
    world = processes()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    _together(lambda: dist.all_gather_object(found, value, group or _groups[0]))
    return found


def _together(act: Callable[[], Any]) -> None:
    """Do what all processes do.

    Raises:
        PeerError: one does not.
    """
    try:
        act()
    except RuntimeError as error:
        line = next(iter(str(error).splitlines()), "")
        raise PeerError(f"another process has ended before the work was done: {line}") from error


def processes() -> tuple[int, int]:
    """Return this process's number and how many share the work: (0, 1) without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(rows: int) -> range:
    """Return the numbers of this process's rows, of all there are."""
    rank, world = processes()
    each, more = divmod(rows, world)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def own_rows(ids: Tensor) -> Tensor:
    """Return this process's share of the rows.

    Raises:
        InputError: there are fewer rows than processes.
    """
    if len(ids) < (world := processes()[1]):
        raise InputError(f"{len(ids)} calibration rows are too few for {world} processes")
    own = share(len(ids))
    return ids[own.start : own.stop]


def of_all_rows(own: Tensor, rows: int, device: torch.device) -> Tensor:
    """Return what all processes know of their rows, (rows, ...), from what this one does."""
    if processes()[1] == 1:
        return own
    whole = own.new_zeros(rows, *own.shape[1:])
    at = share(rows)
    whole[at.start : at.stop] = own
    return total(whole, device)


def total(own: Tensor, device: torch.device) -> Tensor:
    """Return the sum of what all processes have; of several it lies on the device they work on."""
    if processes()[1] == 1:
        return own
    whole = own.to(device, copy=True)
    _together(lambda: dist.all_reduce(whole))
    return whole


def gather(statistic: Statistic) -> None:
    """Make a statistic that of all processes' rows."""
    if processes()[1] > 1:
        statistic.reduce(lambda part: _together(lambda: dist.all_reduce(part)))


@dataclass(frozen=True)
class Task:
    """Layers that share an input, to be solved together.

    Attributes:
        name: what a mistake is told of.
        weights, statistic, patterns: as `Method.solve` takes them.
    """

    name: str
    weights: Sequence[Tensor]
    statistic: Tensor | None
    patterns: Sequence[Pattern]


def solve(method: Method, tasks: Sequence[Task]) -> Iterator[Solution]:
    """Yield what the method's `solve` makes of each task, with errors; all processes get the whole.

    Of several each solves tasks of its own, or layers where tasks are fewer, before any is sent.

    Raises:
        SolverError: as the method's `solve`.
    """
    rank, world = processes()
    if world == 1:
        yield from (_solved(method, task, range(len(task.weights))) for task in tasks)
        return
    counted = itertools.count()
    owners = [
        [(at if len(tasks) >= world else next(counted)) % world for _ in task.weights]
        for at, task in enumerate(tasks)
    ]
    places = [[at for at, owner in enumerate(of) if owner == rank] for of in owners]
    own = [
        _solved(method, task, mine) if mine else None
        for task, mine in zip(tasks, places, strict=True)
    ]
    for number, task in enumerate(tasks):
        solved, own[number] = own[number], None
        made: list[Tensor] = []
        told: list[list[float | None]] = []
        for at, weight in enumerate(task.weights):
            source = owners[number][at]
            full = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            about = torch.full((4,), torch.nan, dtype=widest(weight.device), device=weight.device)
            if solved is not None and source == rank:
                place = places[number].index(at)
                full.copy_(solved.weights[place])
                kind = None if solved.dtype is None else DTYPES.index(solved.dtype)
                numbers = solved.errors[place], solved.damping, solved.dead, kind
                for slot, value in enumerate(numbers):
                    if value is not None:
                        about[slot] = value
            for part in (full, about):
                _together(functools.partial(dist.broadcast, part, source))
            made.append(full)
            told.append([None if math.isnan(value) else value for value in about.tolist()])
        counts = method.counts(task.weights, task.patterns)
        _, damping, dead, precision = told[0]
        dtype = None if precision is None else DTYPES[int(precision)]
        yield Solution(made, counts, [one[0] for one in told], damping, dtype, int(dead or 0))


def _solved(method: Method, task: Task, places: Sequence[int]) -> Solution:
    weights = [task.weights[at] for at in places]
    try:
        made = method.solve(weights, task.statistic, [task.patterns[at] for at in places])
    except SolverError as error:
        raise SolverError(f"{task.name}: {error}") from error
    errors: list[float | None] = [None] * len(weights)
    if method.needs is not None and issubclass(method.needs, Gram):
        assert task.statistic is not None
        pairs = zip(weights, made.weights, strict=True)
        errors = [relative_error(weight, kept, task.statistic) for weight, kept in pairs]
    return replace(made, errors=errors)
