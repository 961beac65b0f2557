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
from typing import Any

import torch
from torch import Tensor

from calmix.errors import InputError, disk_errors
from calmix.files import sync
from calmix.machine import mark
from calmix.models.shards import DTYPES, NAMES, read_bytes, tensor_bytes, write_bytes

FILES = 3  # one that is read, one that is written, and one that an interrupted run would read
DEVICE, HOST = range(2)

Entry = list[Any]  # of a micro-batch in a file: CRC-32, type, shape


@dataclass(frozen=True)
class Room:
    """Bytes that hidden states may take where they are computed, and in pinned memory beside."""

    device: int = 0
    host: int = 0


class KeptStates:
    """Hidden states of micro-batches: those that lead into a block, and then those it gives.

    A block may return another type or shape than it takes: each micro-batch is kept as it comes.
    All micro-batches of one block have the same number of bytes a row.

    Args:
        folder: where the files lie.
        rows: rows of each micro-batch.
        device: where they are computed.
        room: for states in memory.
        before_write: called before anything is overwritten that may still be read beside.

    Attributes:
        side: number of the file that is read.
        counted: numbers of files that an interrupted run would read.
        entries: what each file holds, by number of the micro-batch.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[int],
        device: torch.device,
        room: Room | None = None,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.paths = [folder / f"states-{number}" for number in range(FILES)]
        self.rows, self.device = list(rows), device
        self.side = 0
        self.counted: frozenset[int] = frozenset()
        self.entries: tuple[dict[int, Entry], ...] = ({}, {}, {})
        self._before_write = before_write
        self._held: dict[int, tuple[int, Tensor]] = {}
        self._free = [room.device, room.host] if room is not None else [0, 0]
        self._unread: set[int] = set()
        self._next: int | None = None
        self._moved = False

    def __getitem__(self, number: int) -> Tensor:
        """Return a copy of what a micro-batch brings into the block at hand."""
        if number in self._held:
            return self._held[number][1].to(self.device, copy=True, non_blocking=True)
        path = self.paths[self.side]
        if (entry := self.entries[self.side].get(number)) is None or not path.is_file():
            raise damaged(path)
        wanted, dtype, shape = entry
        hidden = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
        whole = read_bytes(path, self._start(number, hidden), hidden)
        if not whole or (number in self._unread and wanted != zlib.crc32(tensor_bytes(hidden))):
            raise damaged(path)
        self._unread.discard(number)
        return hidden.to(self.device)

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        """Keep what a micro-batch brings into the next block."""
        self._moved = True
        place, old = self._held.pop(number, (HOST, None))
        if old is not None:
            self._free[place] += _taken(place, old)
        fits = [one for one in (DEVICE, HOST) if self._free[one] >= _taken(one, hidden)]
        if not fits or fits[0] == HOST:
            self._before_write()
        if not fits:
            self._write(self._other(), number, hidden)
            return
        if fits[0] == HOST:
            like = hidden.shape, hidden.dtype
            if old is None or place != HOST or (old.shape, old.dtype) != like:
                old = _pinned(hidden)
            hidden = old.copy_(hidden, non_blocking=True)
        self._free[fits[0]] -= _taken(fits[0], hidden)
        self._held[number] = fits[0], hidden

    def restore(self, entries: Mapping[str, Entry], side: int) -> None:
        """Go on with what an earlier run has written to a file.

        Raises:
            InputError: there is no such file.
        """
        if side not in range(FILES):
            raise damaged(self.folder)
        self.side, self.counted = side, frozenset({side})
        self.entries[side].update((int(number), entry) for number, entry in entries.items())
        self._unread = set(self.entries[side])

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
        if any(place == HOST for place, _ in held.values()) and torch.accelerator.is_available():
            made = mark(self.device)

        def keep() -> dict[str, Any]:
            if made is not None:
                made.synchronize()
            for number, (_, hidden) in held.items():
                self._write(side, number, hidden)
            self.sync(side)
            return {"side": side, "entries": {str(n): e for n, e in self.entries[side].items()}}

        return keep

    def sync(self, side: int) -> None:
        """Wait until a file is on the disk."""
        with disk_errors(self.paths[side]):
            self.paths[side].touch()
            sync(self.paths[side])

    def _other(self) -> int:
        """Return the number of the file that is written: none that is read, now or later."""
        if self._next is None:
            read = {self.side} if len(self._held) < len(self.rows) else set()
            self._next = min(set(range(FILES)) - self.counted - read)
        return self._next

    def _write(self, side: int, number: int, hidden: Tensor) -> None:
        value = hidden.to("cpu")
        found = write_bytes(self.paths[side], self._start(number, value), value)
        self.entries[side][number] = [found, NAMES[value.dtype], list(value.shape)]

    def _start(self, number: int, hidden: Tensor) -> int:
        return sum(self.rows[:number]) * (hidden.nbytes // self.rows[number])


def _taken(place: int, hidden: Tensor) -> int:
    """Return the bytes something takes: PyTorch rounds pinned memory up to a power of two."""
    return hidden.nbytes if place == DEVICE else 1 << (hidden.nbytes - 1).bit_length()


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)


def damaged(path: Path) -> InputError:
    """Return the error about a file of the work folder that is not what was written."""
    return InputError(f"{path} is damaged: start over with --overwrite")
