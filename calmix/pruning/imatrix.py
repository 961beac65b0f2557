"""Importance matrices made elsewhere, by llama.cpp: a mean square for each input of each matrix."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calmix.errors import InputError, ModelError
from calmix.files import check_readable
from calmix.models.blocks import DecoderBlocks
from calmix.models.gguf import gguf_names

SUMS_SUFFIX = ".in_sum2"


def read_imatrix(file: Path) -> dict[str, Tensor]:
    """Return float32 (inputs,) by the names of GGUF, known up to a factor; reads both formats of
    llama.cpp. InputError for any other file."""
    try:
        content = file.read_bytes()
        sums = _read_gguf(file) if content[:4] == b"GGUF" else _read_legacy(content)
        if not sums or not all((np.isfinite(part) & (part >= 0)).all() for part in sums.values()):
            raise ValueError("no finite sums of squares")
        return {name: torch.from_numpy(part) for name, part in sums.items()}
    except OSError as error:
        check_readable(file)
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{file} is damaged, or no importance matrix of llama.cpp") from error


def importance(file: Path, model: Any, blocks: DecoderBlocks) -> dict[str, Tensor]:
    """Return the importance of the inputs of every layer, by its name; InputError unless the file
    is of this model. Its weights may be empty."""
    sums = read_imatrix(file)
    try:
        _, names = gguf_names(model, "the model", model.config.model_type)
    except ModelError as error:
        raise InputError(f"{file}: {error}") from error
    places, squares = {parameter: name for name, parameter in names.items()}, {}
    for layer in blocks.layers:
        vector = sums.get(places.get(layer.parameter_name, ""))
        if vector is None or vector.shape != layer.shape[1:]:
            has = "no values" if vector is None else f"{len(vector)} values"
            raise InputError(
                f"{file} is of another model: it has {has} for the {layer.shape[1]} inputs of "
                f"{layer.name}"
            )
        squares[layer.name] = vector if vector.any() else torch.ones_like(vector)  # never called
    return squares


def _read_gguf(file: Path) -> dict[str, NDArray[np.float32]]:
    from gguf import GGUFReader

    return {
        tensor.name.removesuffix(SUMS_SUFFIX): np.array(tensor.data, np.float32).reshape(-1)
        for tensor in GGUFReader(file).tensors
        if tensor.name.endswith(SUMS_SUFFIX)
    }


def _read_legacy(content: bytes) -> dict[str, NDArray[np.float32]]:
    """Read the format of files named `.dat`: count, then length, name, calls, length, values."""
    at, sums = 4, {}
    (count,) = struct.unpack_from("<i", content)
    for _ in range(count):
        (length,) = struct.unpack_from("<i", content, at)
        name, at = content[at + 4 : at + 4 + length].decode(), at + 4 + length
        _, size = struct.unpack_from("<ii", content, at)
        sums[name] = np.frombuffer(content, "<f4", size, at + 8).astype(np.float32)
        at += 8 + 4 * size
    return sums
