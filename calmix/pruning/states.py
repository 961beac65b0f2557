"""Hidden states between two blocks: on the device, or in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.errors import disk_errors
from calmix.models.shards import tensor_bytes


class States:
    """The hidden states of micro-batches by number: one set replaces what was there.

    They stay on the device as far as there is room; the rest lies in files, one each. A block may
    return another type or shape than it takes.

    Args:
        folder: for the files.
        device: where states are computed.
        room: bytes they may take there.
    """

    def __init__(self, folder: Path, device: torch.device, room: int = 0) -> None:
        self.folder, self.device, self._room = folder, device, room
        self._held: dict[int, Tensor] = {}  # without numbers where those are in a file

    def __getitem__(self, number: int) -> Tensor:
        """Return a copy, on the device."""
        held = self._held[number]
        if not held.is_meta:
            return held.clone()
        read: Any = torch.from_numpy(np.fromfile(self.folder / str(number), np.uint8))
        return read.view(held.dtype).view(held.shape).to(self.device)

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        old = self._held.pop(number, None)
        if old is not None and not old.is_meta:
            self._room += old.nbytes
        if hidden.nbytes <= self._room:
            self._room -= hidden.nbytes
        else:
            with disk_errors(self.folder):
                path = self.folder / str(number)
                path.write_bytes(tensor_bytes(hidden.to("cpu").contiguous()))
            hidden = torch.empty_like(hidden, device="meta")
        self._held[number] = hidden
