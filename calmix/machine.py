"""Memory and cores this process may use: a container's limits count, not the host's size."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

MICRO_TOKENS = 2048  # tokens whose activations fit in a CPU's cache
WIDE_TOKENS = 8192  # tokens that keep an accelerator busy
CACHED_VALUES = 2**18  # float32 values that fit in one core's cache: 1 MiB
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def host_memory() -> tuple[int, int]:
    """Return the bytes of memory this process can still allocate without swapping, and the total
    for it and those that share its limits."""
    host = psutil.virtual_memory()
    free, total = host.available, host.total
    for folder in _groups():
        stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
        for limit in ("memory.max", "memory.high"):
            most, used = _text(folder / limit).strip(), _text(folder / "memory.current").strip()
            if most.isdecimal() and used.isdecimal():  # `max` means no limit
                # As kubelet and docker count it: inactive file pages can be reclaimed.
                in_use = max(0, int(used) - int(stat.get("inactive_file", 0)))
                free, total = min(free, int(most) - in_use), min(total, int(most))
    return max(0, free), total


def give_memory_back() -> None:
    """Return freed memory to the system, if the C library can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc


def cores() -> int:
    """Return how many processor cores this process can keep busy."""
    on_all = not hasattr(os, "sched_getaffinity")  # not on every system
    most = os.cpu_count() or 1 if on_all else len(os.sched_getaffinity(0))
    for folder in _groups():
        quota = _text(folder / "cpu.max").split()
        if len(quota) == 2 and all(map(str.isdecimal, quota)):
            most = min(most, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, most)


def tokens_at_once(device: torch.device) -> int:
    """Return the default number of tokens to run through a block at a time."""
    return MICRO_TOKENS if device.type == "cpu" else WIDE_TOKENS


def values_at_once(device: torch.device) -> int:
    """Return how many float32 values to process at a time in a chain of operations."""
    return CACHED_VALUES * torch.get_num_threads() if device.type == "cpu" else 2**31


def _groups() -> Iterator[Path]:
    """Yield the folders of this process's control groups (version 2), innermost first."""
    # A container sees its own group at the root, whatever the path on the host.
    for line in _text(OWN_GROUP).splitlines():
        if line.startswith("0::"):
            leaf = CGROUPS / line[3:].strip("/")
            yield from (path for path in (leaf, *leaf.parents) if path.is_relative_to(CGROUPS))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
