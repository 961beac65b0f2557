"""Block types of GGML, the tensor library of llama.cpp: their levels, scales and bytes.

A row is cut into blocks of 32 or 256 weights. A weight is `scale * level - minimum`; in blocks of
256, the scale and minimum of a group are small integers times the block's float16 step. The types
`IQ2_*` and `IQ3_*` have no such levels: they look up 4 or 8 weights at a time in a codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calmix.errors import InputError, nearest

CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """A type of quantised weights.

    Attributes:
        name: as in GGML.
        size, bytes: of a block, in weights and in bytes.
        group: consecutive weights that share a scale; 0 if the type has no levels of its own.
        low, high: ends of the levels.
        scales: ends of a group's integer scale; None if a block has one scale, the step itself.
        minima: whether groups have a minimum, subtracted from all their weights.
        codebook: values that levels stand for; the levels themselves if empty.
    """

    name: str
    size: int
    bytes: int
    group: int = 0
    low: int = 0
    high: int = 0
    scales: tuple[int, int] | None = None
    minima: bool = False
    codebook: tuple[int, ...] = ()

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.size

    @property
    def steps(self) -> slice:
        """The bytes of a block with its float16 steps, in which all its weights are linear."""
        size = 4 if self.minima else 2
        first = self.bytes - size if self.name in ("Q2_K", "Q3_K", "Q6_K") else 0
        return slice(first, first + size)


TYPES = {
    one.name: one
    for one in (
        BlockType("Q2_K", 256, 84, 16, 0, 3, (0, 15), minima=True),
        BlockType("Q3_K", 256, 110, 16, -4, 3, (-32, 31)),
        BlockType("Q4_K", 256, 144, 32, 0, 15, (0, 63), minima=True),
        BlockType("Q5_K", 256, 176, 32, 0, 31, (0, 63), minima=True),
        BlockType("Q6_K", 256, 210, 16, -32, 31, (-128, 127)),
        BlockType("Q4_0", 32, 18, 32, -8, 7),
        BlockType("Q4_1", 32, 20, 32, 0, 15, minima=True),
        BlockType("Q5_0", 32, 22, 32, -16, 15),
        BlockType("Q5_1", 32, 24, 32, 0, 31, minima=True),
        BlockType("Q8_0", 32, 34, 32, -127, 127),
        BlockType("IQ4_NL", 32, 18, 32, 0, 15, codebook=CODEBOOK),
        BlockType("IQ4_XS", 256, 136, 32, 0, 15, (-32, 31), codebook=CODEBOOK),
        BlockType("IQ3_S", 256, 110),
        BlockType("IQ3_XXS", 256, 98),
        BlockType("IQ2_S", 256, 82),
        BlockType("IQ2_XS", 256, 74),
        BlockType("IQ2_XXS", 256, 66),
    )
}


def block_type(name: str) -> BlockType:
    """Return a type by its name, in capitals or not; InputError if there is none."""
    if (kind := TYPES.get(name.upper())) is None:
        raise InputError(f"unknown type '{name}': {nearest(name.upper(), TYPES)}")
    return kind


@dataclass(frozen=True)
class Encoded:
    """A matrix in the bytes of a GGUF file.

    Attributes:
        name: of its type.
        data: uint8 (rows, bytes).
    """

    name: str
    data: Tensor

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return TYPES[self.name].bits

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether these are the blocks of a matrix of this shape (rows, columns)."""
        kind, layout = TYPES[self.name], (self.data.dtype, *self.data.shape)
        return layout == (torch.uint8, shape[0], shape[-1] // kind.size * kind.bytes)

    def values(self) -> Tensor:
        """Return the weights, float32 (rows, columns)."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        decoded = dequantize(self.data.cpu().numpy(), GGMLQuantizationType[self.name])
        return torch.from_numpy(decoded).to(self.data.device)

    @property
    def steps(self) -> Tensor:
        """The steps of its blocks, float16 (rows, blocks, 1 or 2)."""
        kind = TYPES[self.name]
        return self._blocks[..., kind.steps].contiguous().view(torch.float16)

    def with_steps(self, steps: Tensor) -> Encoded:
        """Return the matrix with other steps."""
        data = self._blocks.clone()
        data[..., TYPES[self.name].steps] = steps.to(torch.float16).contiguous().view(torch.uint8)
        return replace(self, data=data.flatten(1))

    @property
    def _blocks(self) -> Tensor:
        return self.data.unflatten(1, (-1, TYPES[self.name].bytes))


BlockBytes = list[Tensor]  # uint8 (rows, blocks, bytes), in the order of the file
Layout = Callable[[BlockBytes, Tensor, Tensor, Tensor], BlockBytes]


def _join(numbers: Tensor, bits: int) -> Tensor:
    """Return bytes (..., size) of numbers (..., count, size), the first in the lowest bits."""
    shifts = torch.arange(0, 8, bits, device=numbers.device, dtype=numbers.dtype)[:, None]
    return (numbers << shifts).sum(-2, dtype=torch.int16).to(torch.uint8)


def _cut(numbers: Tensor, *sizes: int) -> Tensor:
    return numbers.unflatten(-1, sizes)


def _nibbles(numbers: Tensor, *sizes: int) -> Tensor:
    """Return bytes that hold the low four bits of two numbers."""
    return _join(_cut(numbers & 15, *sizes), 4).flatten(2)


def _pairs(numbers: Tensor) -> Tensor:
    """Return bytes that hold two bits of four numbers, 32 apart."""
    return _join(_cut(numbers, 2, 4, 32), 2).flatten(2)


def _flags(numbers: Tensor) -> Tensor:
    """Return bytes that hold one bit of eight numbers, 32 apart."""
    return _join(_cut(numbers, 8, 32), 1)


def _high(numbers: Tensor) -> Tensor:
    """Return four bytes with the fifth bit of 32 numbers in order."""
    return _join(_cut(numbers >> 4, 4, 8).transpose(-1, -2), 1)


def _sixes(scales: Tensor, minima: Tensor) -> Tensor:
    """Return 12 bytes with eight scales and eight minima of six bits (Q4_K and Q5_K)."""
    (first, last), (low, top) = scales.split(4, -1), minima.split(4, -1)
    parts = [first | (last >> 4 << 6), low | (top >> 4 << 6), (last & 15) | ((top & 15) << 4)]
    return torch.cat(parts, -1).to(torch.uint8)


def _q2_k(head: BlockBytes, levels: Tensor, scales: Tensor, minima: Tensor) -> BlockBytes:
    return [(scales | (minima << 4)).to(torch.uint8), _pairs(levels), *head]


def _q3_k(head: BlockBytes, levels: Tensor, scales: Tensor, minima: Tensor) -> BlockBytes:
    levels, scales = levels + 4, scales + 32
    six = [_nibbles(scales, 2, 8), _join(_cut(scales >> 4, 4, 4), 2)]
    return [_flags(levels >> 2), _pairs(levels & 3), *six, *head]


def _q4_k(head: BlockBytes, levels: Tensor, scales: Tensor, minima: Tensor) -> BlockBytes:
    return [*head, _sixes(scales, minima), _nibbles(levels, 4, 2, 32)]


def _q5_k(head: BlockBytes, levels: Tensor, scales: Tensor, minima: Tensor) -> BlockBytes:
    flags = _flags(levels >> 4)
    return [*head, _sixes(scales, minima), flags, _nibbles(levels, 4, 2, 32)]


def _q6_k(head: BlockBytes, levels: Tensor, scales: Tensor, minima: Tensor) -> BlockBytes:
    levels = levels + 32
    return [_nibbles(levels, 2, 2, 64), _pairs(levels >> 4), scales.to(torch.uint8), *head]


def _iq4_xs(head: BlockBytes, levels: Tensor, scales: Tensor, minima: Tensor) -> BlockBytes:
    scales = scales + 32
    top = _join(_cut(scales >> 4, 2, 4).transpose(-1, -2), 2)
    low = _join(_cut(scales & 15, 4, 2).transpose(-1, -2), 4)
    return [*head, top, low, _nibbles(levels, 8, 2, 16)]


def _small(low: int, high: bool = False) -> Layout:
    """Return the layout of a block of 32 levels of four or five bits."""

    def layout(head: BlockBytes, levels: Tensor, scales: Tensor, minima: Tensor) -> BlockBytes:
        levels = levels - low
        return [*head, *([_high(levels)] if high else []), _nibbles(levels, 2, 16)]

    return layout


LAYOUTS: dict[str, Layout] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "Q4_0": _small(-8),
    "Q4_1": _small(0),
    "Q5_0": _small(-16, True),
    "Q5_1": _small(0, True),
    "IQ4_NL": _small(0),
    "Q8_0": lambda head, levels, scales, minima: [*head, levels.to(torch.int8).view(torch.uint8)],
}


def encode(
    kind: BlockType, levels: Tensor, step: Tensor, scales: Tensor, least: Tensor, minima: Tensor
) -> Encoded:
    """Return a matrix on the grid of a type in the bytes of a file.

    Args:
        levels: integers (rows, columns).
        scales, minima: integers (rows, groups), not read if the type has none.
        step, least: float16 (rows, blocks), units of the groups' scales and minima.
    """
    steps = [step]
    if kind.minima:  # in blocks of 32, files hold the minimum to add
        steps.append(least if kind.scales else -least)
    head = [part.contiguous()[..., None].view(torch.uint8) for part in steps]
    numbers = (part.to(torch.int16).reshape(*step.shape, -1) for part in (levels, scales, minima))
    parts = LAYOUTS[kind.name](head, *numbers)
    return Encoded(kind.name, torch.cat(parts, dim=-1).flatten(1))
