"""When the host reads what a device has computed.

Reading waits until the device has done all it was given, and leaves it idle until it is given more.
On a CPU that is free: conditions are tested where they arise. On other devices a block is pruned on
trust: conditions and the numbers of its report are kept, and read together, once. Where one does
not hold, the caller does the block over without trust, which meets the same condition and mends it
or says what is wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from calmix.machine import mark
from calmix.precision import widest

Number = float | Tensor  # a tensor of no dimensions, which the host has not read yet

_kept = threading.local()


class DoubtError(Exception):
    """Something that was taken to hold does not."""


@contextmanager
def trusting() -> Iterator[None]:
    """Take conditions to hold until `read` has read them."""
    before = _tests()
    _kept.tests = []
    try:
        yield
    finally:
        _kept.tests = before


def _tests() -> list[Tensor] | None:
    return getattr(_kept, "tests", None)


def holds(condition: Tensor) -> bool:
    """Tell whether a condition (bool, no dimensions) holds; within `trusting` it is said to."""
    tests = _tests()
    if tests is None:
        return bool(condition)
    tests.append(condition)
    return True


def agreed(among: Callable[[Tensor], Any]) -> None:
    """Make one condition of those kept until now, true if `among` leaves it true.

    Args:
        among: changes an int32 tensor of 0 or 1 to the least of all processes'.
    """
    tests = _tests()
    if tests is not None:
        whole = torch.stack(tests).all().int()
        among(whole)
        tests[:] = [whole]


def read(values: Sequence[Number | None]) -> list[float | None]:
    """Return numbers, those on a device in one read, with the conditions kept until now.

    Raises:
        DoubtError: a condition does not hold.
    """
    tests = _tests() or []
    told = _fetch([*tests, *(value for value in values if isinstance(value, Tensor))])
    if not all(told[: len(tests)]):
        raise DoubtError
    numbers = iter(told[len(tests) :])
    tests.clear()
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]


def _fetch(values: Sequence[Tensor]) -> list[float]:
    """Copy tensors of no dimensions to the host, all at once."""
    if not values:
        return []
    return torch.stack([value.to(widest(value.device)) for value in values]).tolist()


class Laps:
    """Seconds by activity: of the host's clock, or between marks in a device's queue.

    A host that only hands work over cannot tell how long it takes; marks are read once a block,
    after its numbers, when all of them have been passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type in ("cuda", "xpu") else None
        if not torch.accelerator.is_available():
            self._device = None
        self._laps: list[tuple[str, Any, Any]] = []

    @contextmanager
    def lap(self, activity: str) -> Iterator[None]:
        """Count what is done within as an activity's."""
        began = self._mark()
        yield
        self._laps.append((activity, began, self._mark()))

    def _mark(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        return mark(self._device, timed=True)

    def read(self, seconds: MutableMapping[str, float]) -> None:
        """Add what was counted, and begin anew."""
        for activity, began, ended in self._laps:
            if self._device is None:
                seconds[activity] += ended - began
                continue
            ended.synchronize()  # what only looks at a block may have read nothing yet
            seconds[activity] += began.elapsed_time(ended) / 1000
        self._laps.clear()


def quotient(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole in the widest type, or 0 if the whole is 0."""
    part, whole = (value.to(widest(value.device)) for value in (part, whole))
    return torch.where(whole == 0, 0.0, part / whole)
