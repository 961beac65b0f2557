"""Weights in packed integers (compressed-tensors, GPTQ, AWQ), and models made of them.

A matrix is integers of 1 to 8 bits, the first in the lowest bits of 32-bit words, with one scale
per group of inputs of an output row, or per row. A weight is `(integer - zero point) * scale`.

    compressed-tensors  rows are outputs; without zero points the middle of the integers is zero
    GPTQ                columns are outputs; zero points are stored one too low, but in gptq_v2
    AWQ                 columns are outputs, eight of them in a word out of order
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.errors import InputError, ModelError, first_line
from calmix.files import read_object
from calmix.models.shards import Place, read_tensor, stored_tensors

QUANTIZATION_CONFIG, PACKED_METHOD, PACKED_FORMAT = (
    "quantization_config",
    "compressed-tensors",
    "pack-quantized",
)
PACKED, SCALE, SHAPE, ZERO = (f"weight_{end}" for end in ("packed", "scale", "shape", "zero_point"))
GROUP_INDEX = "weight_g_idx"  # the group of each input, if they are not in order
# The same in GPTQ and AWQ.
INTEGERS, SCALES, ZEROS, GPTQ_INDEX = "qweight", "scales", "qzeros", "g_idx"
OF_A_MATRIX = PACKED, SCALE, SHAPE, ZERO, GROUP_INDEX, INTEGERS, SCALES, ZEROS, GPTQ_INDEX
AWQ_PLACES = 0, 4, 1, 5, 2, 6, 3, 7  # of eight outputs in a word


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Return int32 (rows, words) that hold unsigned integers, uint8 (rows, columns)."""
    parts = np.unpackbits(numbers.numpy()[..., None], axis=-1, count=bits, bitorder="little")
    flat = parts.reshape(len(numbers), -1)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i4"))


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the uint8 (rows, columns) that `pack` was given."""
    octets = words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    flat = np.unpackbits(octets, axis=1, count=columns * bits, bitorder="little")
    parts = flat.reshape(len(words), columns, bits)
    return torch.from_numpy(np.packbits(parts, axis=-1, bitorder="little")[..., 0])


def quantization(folder: Path) -> dict[str, Any]:
    """Return how a model folder's weights are quantised (`quantization_config`); {} if not."""
    settings: Any = None
    with suppress(InputError):  # raised again when the configuration is read
        settings = read_object(folder / "config.json", "").get(QUANTIZATION_CONFIG)
    return settings if isinstance(settings, dict) else {}


def is_packed(settings: Mapping[str, Any]) -> bool:
    """Whether weights are packed integers of a form that is read here, and nothing else is
    quantised."""
    method, bits = settings.get("quant_method"), settings.get("bits", settings.get("w_bit"))
    if method == "gptq":
        known = settings.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
        return known and settings.get("pack_dtype", "int32") == "int32" and bits in (2, 3, 4, 8)
    if method == "awq":
        return str(settings.get("version", "gemm")).lower() == "gemm" and bits == 4
    groups = settings.get("config_groups")
    parts = list(groups.values()) if isinstance(groups, dict) else []
    return (
        (method, settings.get("format")) == (PACKED_METHOD, PACKED_FORMAT)
        and all(isinstance(one, dict) and not one.get("input_activations") for one in parts)
        and not settings.get("kv_cache_scheme")
    )


def unpacked(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model with packed weights by name, its weights in the type of their
    scales; ModelError if they are damaged."""
    stored, settings = stored_tensors(folder), quantization(folder)
    main, weight = INTEGERS, partial(_turned_weight, settings=settings)
    if settings.get("quant_method") == PACKED_METHOD:
        main, weight = PACKED, partial(_weight)
    layers = [name.removesuffix(main) for name in stored if name.endswith(f".{main}")]
    beside = {f"{layer}{end}" for layer in layers for end in OF_A_MATRIX}
    yield from ((name, read_tensor(stored[name])) for name in stored if name not in beside)
    for layer in layers:
        try:
            yield f"{layer}weight", weight(layer, stored)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"{stored[layer + main].path} is damaged: the packed weights of "
                f"{layer.removesuffix('.')} do not fit their scales ({first_line(error)})"
            ) from error


def _weight(layer: str, stored: Mapping[str, Place]) -> Tensor:
    """Return one matrix."""
    words, scale, shape = (read_tensor(stored[layer + end]) for end in (PACKED, SCALE, SHAPE))
    rows, columns = map(int, shape)
    bits = 32 * words.shape[1] // columns
    if len(words) != rows or not 1 <= bits <= 8 or words.shape[1] != math.ceil(columns * bits / 32):
        raise ValueError(f"{tuple(words.shape)} words for a matrix of {rows} x {columns}")
    scale = scale.view(-1, scale.shape[-1] if scale.ndim else 1)
    levels, zero = unpack(words, bits, columns).to(scale.dtype), torch.tensor(2.0 ** (bits - 1))
    if layer + ZERO in stored:
        zero = read_tensor(stored[layer + ZERO])
        if zero.dtype == torch.int32:
            zero = unpack(zero.T, bits, rows).T
        else:  # as older versions store them, about the middle
            zero = zero.view(scale.shape).to(torch.int16) + 2 ** (bits - 1)
    if (
        layer + GROUP_INDEX in stored
        and (order := read_tensor(stored[layer + GROUP_INDEX])).min() >= 0
    ):
        scale = scale[:, order.long()]
        zero = zero[:, order.long()] if zero.ndim else zero
    levels = levels.view(rows, scale.shape[1], -1)
    zero = zero.to(scale.dtype)[..., None]
    return ((levels - zero) * scale[..., None]).add_(0.0).view(rows, columns)  # no -0.0


def _turned_weight(layer: str, stored: Mapping[str, Place], settings: Mapping[str, Any]) -> Tensor:
    """Return one matrix of GPTQ or AWQ."""
    words, scale, zero = (read_tensor(stored[layer + end]) for end in (INTEGERS, SCALES, ZEROS))
    groups, rows = scale.shape
    if settings["quant_method"] == "awq":
        bits, columns = 4, len(words)
        levels, zero = (
            unpack(one, bits, rows).view(len(one), -1, 8)[..., AWQ_PLACES].reshape(len(one), rows)
            for one in (words, zero)
        )
        levels = levels.T
    else:
        bits, columns = settings["bits"], 32 * len(words) // settings["bits"]
        levels, zero = unpack(words.T, bits, columns), unpack(zero, bits, rows)
        if settings.get("checkpoint_format") != "gptq_v2":
            zero = (zero + 1) & (2**bits - 1)
    index = torch.arange(columns) // -(-columns // groups)
    if layer + GPTQ_INDEX in stored:
        index = read_tensor(stored[layer + GPTQ_INDEX]).long()
    if len(levels) != rows or not 0 <= index.min() <= index.max() < groups or len(index) != columns:
        raise ValueError(f"{tuple(words.shape)} words for {groups} groups of {rows} outputs")
    zero = zero.T.to(scale.dtype)[:, index]
    return ((levels.to(scale.dtype) - zero) * scale.T[:, index]).add_(0.0)
