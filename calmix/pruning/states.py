"""Hidden states between two blocks: where they are computed, in the host's memory, or in files.

They stay where they are computed as far as there is room, then in pinned memory of the host, which
a device copies to and from beside its work, and the rest lies in a file. What is held is written to
a file only for an interrupted run to go on from.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calmix.errors import InputError, disk_errors
from calmix.files import sync
from calmix.models.shards import read_bytes, tensor_bytes, write_bytes

FILES = 3  # one that is read, one that is written, and one that an interrupted run would read


@dataclass(frozen=True)
class Room:
    """Bytes that hidden states may take where they are computed, and in pinned memory beside."""

    device: int = 0
    host: int = 0


class KeptStates:
    """Hidden states of micro-batches: those that lead into a block, and then those it gives.

    Args:
        folder: where the files lie.
        rows: rows of each micro-batch.
        like: hidden states of one micro-batch, for length, width, type and device.
        room: for states in memory.
        before_write: called before anything is overwritten that may still be read beside.

    Attributes:
        side: number of the file that is read.
        counted: numbers of files that an interrupted run would read.
        sums: CRC-32 of every micro-batch of each file.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[int],
        like: Tensor,
        room: Room | None = None,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.paths = [folder / f"states-{number}" for number in range(FILES)]
        self.rows = list(rows)
        self.shape, self.dtype, self.device = like.shape[1:], like.dtype, like.device
        self.side = 0
        self.counted: frozenset[int] = frozenset()
        self.sums: tuple[dict[int, int], ...] = ({}, {}, {})
        self._before_write = before_write
        self._held: dict[int, Tensor] = {}
        self._unread: dict[int, int] = {}
        self._next: int | None = None
        self._moved = False
        self._row_bytes = self.shape.numel() * self.dtype.itemsize
        self._places = _places([count * self._row_bytes for count in rows], room or Room())

    def __getitem__(self, number: int) -> Tensor:
        """Return a copy of what a micro-batch brings into the block at hand."""
        if (held := self._held.get(number)) is not None:
            return held.to(self.device, copy=True, non_blocking=True)
        hidden = self._empty(number)
        path = self.paths[self.side]
        whole = path.is_file() and read_bytes(path, self._start(number), hidden)
        wanted = self._unread.pop(number, None)
        if not whole or wanted not in (None, zlib.crc32(tensor_bytes(hidden))):
            raise damaged(path)
        return hidden.to(self.device)

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        """Keep what a micro-batch brings into the next block."""
        self._moved = True
        place = self._places[number]
        if place == "device":
            self._held[number] = hidden
            return
        self._before_write()
        if place == "file":
            self._write(self._other(), number, hidden)
            return
        if number not in self._held:
            self._held[number] = self._empty(number, pinned=True)
        self._held[number].copy_(hidden, non_blocking=True)

    def restore(self, sums: Mapping[str, int], side: int) -> None:
        """Go on with what an earlier run has written to a file.

        Raises:
            InputError: there is no such file.
        """
        if side not in range(FILES):
            raise damaged(self.folder)
        self.side, self.counted = side, frozenset({side})
        self._unread = {int(number): wanted for number, wanted in sums.items()}
        self.sums[side].update(self._unread)

    def turn(self) -> bool:
        """What was written is what is read from now on; tell whether anything was."""
        moved, self._moved = self._moved, False
        if moved:
            self.side, self._next = self._other(), None
        return moved

    def keeping(self) -> Callable[[], dict[str, Any]]:
        """Return what brings the states that are read to the disk, and tells where they are.

        It may be called while the next ones are made. The file counts until `counted` is set anew.
        """
        held, side = dict(self._held), self.side
        self.counted |= {side}
        made = None
        if "host" in self._places and torch.accelerator.is_available():
            made = torch.Event(self.device)
            made.record()

        def keep() -> dict[str, Any]:
            if made is not None:
                made.synchronize()
            for number, hidden in held.items():
                self._write(side, number, hidden)
            self.sync(side)
            return {"side": side, "sums": {str(n): found for n, found in self.sums[side].items()}}

        return keep

    def sync(self, side: int) -> None:
        """Wait until a file is on the disk."""
        with disk_errors(self.paths[side]):
            self.paths[side].touch()
            sync(self.paths[side])

    def _other(self) -> int:
        """Return the number of the file that is written: none that is read, now or later."""
        if self._next is None:
            read = {self.side} if "file" in self._places else set()
            self._next = min(set(range(FILES)) - self.counted - read)
        return self._next

    def _write(self, side: int, number: int, hidden: Tensor) -> None:
        start = self._start(number)
        self.sums[side][number] = write_bytes(self.paths[side], start, hidden.to("cpu"))

    def _empty(self, number: int, *, pinned: bool = False) -> Tensor:
        shape = self.rows[number], *self.shape
        return torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=pinned)

    def _start(self, number: int) -> int:
        return sum(self.rows[:number]) * self._row_bytes


def _places(sizes: Sequence[int], room: Room) -> list[Literal["device", "host", "file"]]:
    """Return where each micro-batch of so many bytes lies."""
    places: list[Literal["device", "host", "file"]] = []
    device, host = room.device, room.host
    for size in sizes:
        if device >= size:
            device -= size
            places.append("device")
        elif host >= size:
            host -= size
            places.append("host")
        else:
            places.append("file")
    return places


def damaged(path: Path) -> InputError:
    """Return the error about a file of the work folder that is not what was written."""
    return InputError(f"{path} is damaged: start over with --overwrite")
