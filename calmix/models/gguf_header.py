"""Check the header of a GGUF file before libraries read it.

They believe its counts: an array of 2^40 entries, or a file of 10^9 blocks, would keep them busy
until memory is full.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

GGUF_MAGIC = b"GGUF"
SCALARS = "BbHhIif?__Qqd"  # struct codes by number of the type; 8 is a string, 9 an array
STRING, ARRAY = 8, 9
DIMENSIONS, DEEPEST = 4, 4  # most dimensions of a tensor, and arrays within arrays
ENTRIES = 2**22  # most array entries of a file: a vocabulary of a million has four million
MOST_NAMES = 2**18  # most tensors and most values
SHOWN = 4096  # entries of an array whose values are kept, such as one for each layer


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its name or, as Ollama's blobs without a suffix, by its content."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == GGUF_MAGIC


def read_header(path: Path) -> Header:
    """Return a file's header; ValueError if libraries could not read it in bounded time and
    memory, or it is of another byte order."""
    with path.open("rb") as file:
        if not GGUF_MAGIC.startswith(file.read(4)):
            raise ValueError("it is not a GGUF file")
        if path.stat().st_size < 24:
            raise ValueError("it is cut short")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Header(data)


class Header:
    """The metadata of a GGUF file, without long arrays, and the shape of each tensor."""

    def __init__(self, data: mmap.mmap) -> None:
        self.values: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._data, self._at, self._entries = data, len(GGUF_MAGIC), 0
        version = self._number("I")
        if version & 0xFFFF == 0:
            raise ValueError("its numbers are big-endian: convert it with gguf_convert_endian.py")
        if version not in (2, 3):
            raise ValueError(f"it has version {version} of the format, not 2 or 3")
        tensors, pairs = self._count(MOST_NAMES), self._count(MOST_NAMES)
        for _ in range(pairs):
            name = self._text()
            self.values[name] = self._value(self._number("I"))
        for _ in range(tensors):
            name, dimensions = self._text(), self._number("I")
            if dimensions > DIMENSIONS:
                raise ValueError(f"tensor {name} has {dimensions} dimensions")
            self.shapes[name] = tuple(self._number("Q") for _ in range(dimensions))
            self._bytes(12)  # type and offset
        if not isinstance(self.values.get("general.architecture"), str):
            raise ValueError("it names no architecture")
        if (most := max(map(math.prod, self.shapes.values()), default=0)) > 8 * len(data):
            raise ValueError(f"it has a tensor of {most} weights, more than its bytes can hold")

    def _bytes(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("it is cut short, or its header is damaged")
        return self._data[start : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _count(self, most: int) -> int:
        count = self._number("Q")
        if count > most:
            raise ValueError(f"its header counts {count} entries, more than it can hold")
        return count

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _value(self, kind: int, depth: int = 0) -> Any:
        """Return a value of a type; None for a long array."""
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            return self._number(_code(kind))
        inner, count = self._number("I"), self._count(ENTRIES)
        self._entries += count
        if self._entries > ENTRIES or depth == DEEPEST:
            raise ValueError("its header has more array entries than any tokenizer needs")
        if count <= SHOWN or inner == ARRAY:
            return [self._value(inner, depth + 1) for _ in range(count)]
        if inner != STRING:
            self._bytes(count * struct.calcsize(f"<{_code(inner)}"))
            return None
        for _ in range(count):
            self._bytes(self._number("Q"))
        return None


def _code(kind: int) -> str:
    code = SCALARS[kind : kind + 1]
    if code in ("", "_"):
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return code
