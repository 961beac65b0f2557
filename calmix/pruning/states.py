"""Hidden states between two blocks: on the device, in pinned memory of the host, or in files."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from calmix.errors import disk_errors
from calmix.models.shards import tensor_bytes

Where = Literal["device", "host", "file"]


class States(MutableMapping[int, Tensor]):
    """The hidden states of micro-batches by number: one set replaces what was there.

    They stay on the device as far as there is room, then in pinned memory, which a device copies
    to and from beside its work; the rest lies in files, one each. A block may return another type
    or shape than it takes.

    Args:
        folder: for the files.
        device: where states are computed.
        on_device, on_host: bytes they may take there.
    """

    def __init__(
        self, folder: Path, device: torch.device, on_device: int = 0, on_host: int = 0
    ) -> None:
        self.folder, self.device = folder, device
        self._free: dict[Where, float] = {
            "device": on_device, "host": on_host, "file": math.inf,
        }  # fmt: skip
        self._held: dict[int, tuple[Where, Tensor]] = {}

    def __getitem__(self, number: int) -> Tensor:
        """Return a copy, on the device."""
        where, held = self._held[number]
        if where == "file":
            read: Any = torch.from_numpy(np.fromfile(self._file(number), np.uint8))
            return read.view(held.dtype).view(held.shape).to(self.device)
        return held.to(self.device, copy=True, non_blocking=True)

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        before, old = self._held.get(number, (None, hidden))
        if before is not None:
            del self[number]
        where = next(w for w, free in self._free.items() if free >= _taken(w, hidden))
        self._free[where] -= _taken(where, hidden)
        if where == "host":
            if before != "host" or old.nbytes != hidden.nbytes:
                old = torch.empty(hidden.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            same: Any = old.view(-1).view(torch.uint8)
            hidden = same.view(hidden.dtype).view(hidden.shape).copy_(hidden, non_blocking=True)
        elif where == "file":
            with disk_errors(self.folder):
                self._file(number).write_bytes(tensor_bytes(hidden.to("cpu").contiguous()))
            hidden = torch.empty_like(hidden, device="meta")
        self._held[number] = where, hidden

    def __delitem__(self, number: int) -> None:
        where, held = self._held.pop(number)
        self._free[where] += _taken(where, held)

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def _file(self, number: int) -> Path:
        return self.folder / str(number)


def _taken(where: Where, hidden: Tensor) -> int:
    """Return the bytes something takes: PyTorch rounds pinned memory up to a power of two."""
    return hidden.nbytes if where == "device" else 1 << (hidden.nbytes - 1).bit_length()
