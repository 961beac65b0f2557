"""Several processes prune one model: each runs its share of the calibration rows.

Every process holds the model (or the current block), gets the sum of all statistics, and solves
every layer. Compared with one process only the order of summation differs, as it does with the
micro-batch size. Host data (files, text, errors) uses its own process group.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from calmix.errors import CalmixError, InputError, PassingError, first_line

T = TypeVar("T")
WAIT = timedelta(days=7)  # the first process may draw text or write files for hours
TIDYING = timedelta(seconds=20)  # the launcher waits 30 s before it kills
_hosts: list[Any] = []  # the host group, once created


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Join the processes started by torchrun, if any; yield this process's device.

    An error in several processes is raised in one; the others end with exit code 2.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    try:
        store, rank, world = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"WORLD_SIZE is set, but there is no launcher: {first_line(error)}"
        ) from error
    try:
        kind, own = _own_device(device)
        dist.init_process_group(
            dist.get_default_backend_for_device(kind), timeout=WAIT, store=store, rank=rank,
            world_size=world,
        )  # fmt: skip
        _host()
        yield own
        dist.destroy_process_group()
    except Exception:
        if not _leave(store, rank):
            sys.exit(2)
        raise
    finally:
        _hosts.clear()


def _own_device(name: str) -> tuple[str, str]:
    """Return the type and the name of this process's device."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "cpu" or (name == "auto" and (found is None or found.type == "mps")):
        return "cpu", "cpu"
    kind = found.type if name == "auto" and found is not None else name
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if ":" in kind or kind == "mps":
        raise InputError(f"--device {name} is one device: several processes need one each")
    if found is None or found.type != kind:
        raise InputError(f"device '{kind}' cannot be used: there is none")
    if local >= (count := torch.accelerator.device_count()):
        raise InputError(f"there are more processes than devices: start {count} (--nproc-per-node)")
    torch.accelerator.set_device_index(local)
    return kind, f"{kind}:{local}"


def _leave(store: Any, rank: int) -> bool:
    """Leave the group so that the others end too; return whether this process failed first.

    The launcher kills all processes as soon as one ends, so the first process cleans up before.
    """
    key, first = f"calmix/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", False
    with contextlib.suppress(RuntimeError):  # the process with the store has reported the error
        first = store.compare_set(key, "", str(rank)) == str(rank).encode()
    if dist.is_initialized():
        alone = dist.get_backend() == "gloo"  # destroying a device group may block
        for group in [*_hosts, *([None] * alone)]:
            dist.destroy_process_group(group)
    with contextlib.suppress(RuntimeError):  # the store is gone, or it took too long
        if rank == 0:
            store.set("calmix/tidy", "")
        else:
            store.wait(["calmix/tidy"], TIDYING)
    return first


def _host() -> Any:
    """Return the host group, created by all processes together."""
    if not _hosts:
        _hosts.append(dist.new_group(backend="gloo", timeout=WAIT))
    return _hosts[0]


def processes() -> tuple[int, int]:
    """Return this process's rank and the number of processes: (0, 1) without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def once(act: Callable[[], T]) -> T:
    """Act in the first process only; return its value, or raise its error, in all."""
    rank, world = processes()
    if world == 1:
        return act()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = act()
        except CalmixError as error:
            box[1] = error
    _together(lambda: dist.broadcast_object_list(box, 0, _host(), torch.device("cpu")))
    if box[1] is not None:
        raise box[1]
    return box[0]


def everyone(value: T) -> list[T]:
    """Return the values of all processes, to each of them."""
    world = processes()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    _together(lambda: dist.all_gather_object(values, value, _host()))
    return values


def _together(act: Callable[[], Any]) -> None:
    """Run a collective operation; report a process that has ended."""
    try:
        act()
    except RuntimeError as error:
        raise PassingError(
            f"another process ended before the work was done: {first_line(error)}"
        ) from error


def own_rows(rows: Tensor) -> Tensor:
    """Return this process's share of the rows."""
    rank, world = processes()
    if len(rows) < world:
        raise InputError(f"{len(rows)} calibration rows are too few for {world} processes")
    return rows.tensor_split(world)[rank]


def add_up(part: Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    if processes()[1] > 1:
        _together(lambda: dist.all_reduce(part))
