"""What this process may use of its machine: a container's limits count, not the host's size."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import psutil
import torch

MICRO_TOKENS = 2048  # activations of so many tokens stay in a CPU's cache
WIDE_TOKENS = 8192  # elsewhere: products of so many fill an accelerator
CACHED_VALUES = 2**18  # float32 values that stay in the cache of one core: 1 MiB
CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def free_memory() -> int:
    """Return the bytes of memory this process can still take, without swapping."""
    # As kubelet and docker count it: file pages not used lately are given back when asked for.
    within = (limit - used for limit, used in _memory())
    return max(0, min([psutil.virtual_memory().available, *within]))


def total_memory() -> int:
    """Return the bytes of memory there are for this process and those it shares limits with."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory())])


def give_memory_back() -> None:
    """Give the system what this process has freed and keeps for later, where the C library can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc


def cores() -> int:
    """Return how many processor cores this process can keep busy."""
    try:
        most = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        most = os.cpu_count() or 1
    for folder in _groups():
        quota = _text(folder / "cpu.max").split()
        if len(quota) == 2 and all(map(str.isdecimal, quota)):
            most = min(most, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, most)


def device_memory(device: torch.device) -> tuple[int, int, int | None]:
    """Return the bytes this process holds on a device, those it may still take, and all there are;
    None for the last where what does not fit is swapped."""
    if device.type not in ("cuda", "xpu"):
        return psutil.Process().memory_info().rss, free_memory(), None
    backend = torch.get_device_module(device)
    free, total = backend.mem_get_info(device)
    held = backend.memory_allocated(device)
    return held, free + backend.memory_reserved(device) - held, total


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an accelerator had no memory left: its backends have no class in common."""
    told = any(part in str(error) for part in ("out of memory", "ALLOC_FAILED"))
    return told or isinstance(error, torch.OutOfMemoryError)


class Laps:
    """Seconds by activity: of the host's clock, or between marks in a device's queue."""

    def __init__(self, device: torch.device) -> None:
        there = device.type in ("cuda", "xpu") and torch.accelerator.is_available()
        self._device = device if there else None
        self._laps: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def lap(self, activity: str) -> Iterator[None]:
        """Count what is done within as an activity's."""
        began = self._mark()
        yield
        self._laps.append((activity, began, self._mark()))

    def _mark(self) -> Any:
        """Return the time, or an event in the device's own queue, whichever is the current one."""
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def read(self, seconds: MutableMapping[str, float]) -> None:
        """Add what was counted, and begin anew."""
        for activity, began, ended in self._laps:
            if self._device is None:
                seconds[activity] += ended - began
                continue
            ended.synchronize()
            seconds[activity] += began.elapsed_time(ended) / 1000
        self._laps.clear()


def tokens_at_once(device: torch.device) -> int:
    """Return how many tokens run through a block at a time where nothing else is asked for."""
    return MICRO_TOKENS if device.type == "cpu" else WIDE_TOKENS


def values_at_once(device: torch.device) -> int:
    """Return how many float32 values are worked on at a time, one operation after another."""
    return CACHED_VALUES * torch.get_num_threads() if device.type == "cpu" else 2**31


def _memory() -> Iterator[tuple[int, int]]:
    """Yield limit and use of every control group this process is in, in bytes."""
    for folder in _groups():
        stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
        for limit in ("memory.max", "memory.high"):
            most, used = _text(folder / limit).strip(), _text(folder / "memory.current").strip()
            if most.isdecimal() and used.isdecimal():  # it says `max` where there is none
                yield int(most), max(0, int(used) - int(stat.get("inactive_file", 0)))


def _groups() -> Iterator[Path]:
    """Yield the folders of the control groups (version 2) this process is in, innermost first."""
    # A container sees its own group at the root, under whatever path the host gives it.
    for line in _text(OWN).splitlines():
        if line.startswith("0::"):
            own = CGROUPS / line[3:].strip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(CGROUPS))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
