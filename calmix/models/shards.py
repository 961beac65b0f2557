"""Read and write safetensors files tensor by tensor, in any order, without mapping them.

The touched pages of a mapped file count as resident memory, and the safetensors library cannot
write a file piece by piece. The format is eight bytes (the length of a JSON header), the header
(name, type, shape and offsets of every tensor), and the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calmix.errors import ModelError
from calmix.files import check_readable, parse_json, replacing, write_json
from calmix.models.folder import INDEX, weight_files

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
MOST_FILE_BYTES = 5e9  # bytes of a weight file at most


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored: its file, type, shape, and offset from the file's start."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.count * self.dtype.itemsize


def stored_tensors(folder: Path) -> dict[str, Place]:
    """Return the tensors in the weight files of a model folder.

    Raises ModelError if a file is cut short, damaged, or has an unsupported type.
    """
    headers = (read_header(folder / name) for name in weight_files(folder))
    return {name: place for header in headers for name, place in header.items()}


def weight_dtype(stored: Mapping[str, Place]) -> torch.dtype:
    """Return the type of stored weights, that of the largest tensor."""
    return max(stored.values(), key=lambda place: place.size).dtype


def weight_bytes(folder: Path) -> int:
    """Return the total size of a model's weight files in bytes."""
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def header_bytes(path: Path) -> bytes:
    """Return the bytes of a safetensors file before the first tensor."""
    with path.open("rb") as file:
        first = file.read(8)
        return first + file.read(*struct.unpack("<Q", first))


def parse_header(header: bytes, path: Path) -> dict[str, Place]:
    """Return the tensors in a safetensors file's header, which is valid."""
    entries = parse_json(header[8:])
    entries.pop("__metadata__", None)
    return {
        name: Place(
            path,
            STORED_DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            len(header) + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }


def read_header(path: Path) -> dict[str, Place]:
    """Return the tensors of a safetensors file.

    Raises ModelError if it is cut short, damaged, or has an unsupported type.
    """
    try:
        with safe_open(path, "pt"):  # checks that the file's size fits the header
            return parse_header(header_bytes(path), path)
    except KeyError as error:
        raise ModelError(
            f"{path} has tensors of the unsupported type {error.args[0]}: convert them to bfloat16"
        ) from error
    except (OSError, SafetensorError) as error:
        check_readable(path)
        raise ModelError(f"{path} is cut short or damaged: fetch it again") from error


def read_tensor(place: Place) -> Tensor:
    """Return one tensor in newly allocated memory."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    view = tensor_bytes(tensor)
    with place.path.open("rb") as file:
        file.seek(place.start)
        if file.readinto(view) < len(view):
            raise ModelError(f"{place.path} is cut short: fetch it again")
    return tensor


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically and return its SHA-256.

    Tensors move to the host one at a time and are not copied there. Raises DiskError.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide types first, as in the safetensors library, so that every tensor is aligned.
    ordered, at = sorted(tensors.items(), key=lambda t: (-t[1].dtype.itemsize, t[0])), 0
    for name, tensor in ordered:
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + tensor.nbytes],
        }
    header = with_length(entries)
    digest = hashlib.sha256(header)
    with replacing(path) as file:
        file.write(header)
        for _, tensor in ordered:
            view = tensor_bytes(tensor.detach().to("cpu").contiguous())
            file.write(view)
            digest.update(view)
    return digest.hexdigest()


def read_file(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file in newly allocated memory."""
    return {name: read_tensor(place) for name, place in read_header(path).items()}


def write_index(folder: Path) -> None:
    """Write the index that transformers reads if a folder has several weight files."""
    places = stored_tensors(folder)
    if len({place.path for place in places.values()}) > 1:
        index = {
            "metadata": {"total_size": sum(place.size for place in places.values())},
            "weight_map": {name: place.path.name for name, place in sorted(places.items())},
        }
        write_json(folder / INDEX, index)


def write_model(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], most: float = MOST_FILE_BYTES
) -> None:
    """Write the tensors of a model, one by one, to `model.safetensors`, or to several files of at
    most that many bytes and an index."""
    parts, waiting, size = list[Path](), dict[str, Tensor](), 0

    def write() -> None:
        parts.append(folder / f"part-{len(parts)}.safetensors")
        write_file(parts[-1], waiting)
        waiting.clear()

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > most:
            write()
            size = 0
        waiting[name] = tensor
        size += tensor.nbytes
    write()
    for number, part in enumerate(parts, start=1):
        suffix = "" if len(parts) == 1 else f"-{number:05}-of-{len(parts):05}"
        part.rename(folder / f"model{suffix}.safetensors")
    write_index(folder)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without copying."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def with_length(entries: Mapping[str, Any]) -> bytes:
    """Return a header's bytes, padded to a multiple of 8 and preceded by their length."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
