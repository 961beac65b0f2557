"""Sparsity patterns and their exact masks.

A mask is True where a weight is pruned. Counts are exact: `round(p * size)` of a comparison
group, or M - N of every group of M columns; ties are pruned in order of index. A new pattern is a
subclass of `Pattern`, parsed by `as_pattern`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.errors import InputError
from calmix.models.blocks import outer_layers
from calmix.pruning.solvers.ggml_types import block_type
from calmix.pruning.type_recipes import recipe_name, recipe_types


class Pattern:
    """How many of a layer's weights are pruned, and within which groups they are compared.

    Attributes:
        sparsity: the share of weights pruned.
        group: consecutive inputs of a row that are compared; 1 if the method chooses the groups.
    """

    sparsity: float = 0.0
    group: int = 1

    def count(self, size: int) -> int:
        """Return how many of `size` entries, a multiple of `group`, are pruned; by default none."""
        return 0

    def mask(self, score: Tensor, *, by_row: bool = False) -> Tensor:
        """Return the mask that prunes the lowest of finite scores.

        Args:
            score: (rows, columns), compared within groups if `group` > 1, else `by_row` or overall.
        """
        if self.group > 1:
            groups = score.view(len(score), -1, self.group).permute(2, 0, 1).contiguous()
            return self.group_mask(groups).permute(1, 2, 0).reshape(score.shape)
        groups = score if by_row else score.reshape(1, -1)
        return smallest(groups, self.count(groups.shape[1])).view(score.shape)

    def group_mask(self, score: Tensor) -> Tensor:
        """Return the mask of groups along the first dimension, (group, ...)."""
        count = self.count(self.group)
        if self.group > 16:
            return score.argsort(dim=0, stable=True).argsort(dim=0) < count
        # For small groups, comparing all pairs is faster than sorting and exact about ties.
        rank = torch.zeros_like(score, dtype=torch.uint8)
        for i in range(self.group):
            for j in range(i):
                later = score[j] <= score[i]
                rank[i] += later
                rank[j] += ~later
        return rank < count


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Prune the share `sparsity` (in (0, 1)) of every comparison group."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InputError(f"sparsity {self.sparsity} is not between 0 and 1 (exclusive)")

    def __str__(self) -> str:
        return f"{self.sparsity:g}"

    def count(self, size: int) -> int:
        return round(self.sparsity * size)  # half to even


@dataclass(frozen=True)
class SemiStructured(Pattern):
    """Keep `n` of every `m` consecutive inputs of a row (N:M sparsity; 2:4 keeps two of four)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise InputError(f"pattern {self.n}:{self.m}: N must be at least 1 and less than M")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        return 1 - self.n / self.m

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.m

    def count(self, size: int) -> int:
        return size // self.m * (self.m - self.n)


@dataclass(frozen=True)
class Rate(Pattern):
    """A number of bits per weight, all storage included; zeros are not prescribed."""

    bits: float

    def __post_init__(self) -> None:
        if not 0.1 <= self.bits <= 8:
            raise InputError(f"{self.bits:g} bits per weight is not between 0.1 and 8")

    def __str__(self) -> str:
        return f"{self.bits:g} bits"


@dataclass(frozen=True)
class Blocks(Pattern):
    """A type of GGML, such as Q3_K, whose blocks hold the weights."""

    type: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", block_type(self.type).name)

    def __str__(self) -> str:
        return f"{self.type} blocks"


@dataclass(frozen=True)
class Recipe(Pattern):
    """A file of llama.cpp, such as Q3_K_M, which has a type for every matrix."""

    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", recipe_name(self.name))

    def __str__(self) -> str:
        return self.name

    def types(self, model: Any, blocks: Any) -> dict[str, Pattern]:
        """Return the type of each layer to prune, and of embeddings and output head, by name."""
        types = recipe_types(self.name, model.config, blocks, outer_layers(model))
        return {name: Blocks(kind) for name, kind in types.items()}


@dataclass(frozen=True)
class Mixed(Pattern):
    """A number of bits per weight on average: of a whole GGUF file, with a type of GGML for every
    matrix, or of GPTQ's levels, with whole bits for the layers of each input."""

    bits: float

    def __str__(self) -> str:
        return f"{self.bits:g} bits mixed"


def as_pattern(value: Pattern | str | float) -> Pattern:
    """Return a pattern from a `Pattern`, a sparsity such as `0.5`, `N:M`, `2.8 bits`, a recipe such
    as `Q3_K_M`, or one type of GGML, such as `Q3_K blocks`."""
    if isinstance(value, Pattern):
        return value
    text = str(value)
    if match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return SemiStructured(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"\s*(\d+\.?\d*)\s*bits?( mixed)?\s*", text):
        return (Mixed if match[2] else Rate)(float(match[1]))
    if match := re.fullmatch(r"\s*(\w+)\s+blocks\s*", text):
        return Blocks(match[1])
    with suppress(InputError):
        return Recipe(text.strip())
    try:
        return Unstructured(float(text))
    except ValueError:
        raise InputError(
            f"pattern '{value}' is neither a sparsity, such as 0.5, nor N:M, such as 2:4"
        ) from None


def check_embeddings(bits: float | None, *patterns: Pattern) -> None:
    """Refuse bits of embeddings and output head beside types of GGML or bits chosen by matrix."""
    typed = next((one for one in patterns if isinstance(one, Blocks | Mixed | Recipe)), None)
    if bits is not None and typed is not None:
        raise InputError(f"--embeddings has no effect with {typed}: leave it out")


def clear(weight: Tensor, mask: Tensor) -> Tensor:
    """Set finite weights to +0.0 in place where a mask (bool, or 1.0 and 0.0) is set.

    Subtracting w * 1.0 gives +0.0 and is five times faster than masked_fill on a CPU.
    """
    return weight.addcmul_(weight, mask.to(weight.dtype), value=-1)


def smallest(score: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` smallest entries of every row; ties go to the lower index.

    Args:
        score: finite numbers, shape (groups, size).
        count: entries to mark in each group, 0 <= count <= size.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if score.device.type != "cpu":
        lowest = score.argsort(dim=1, stable=True)[:, :count]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)
    # NumPy selects with SIMD instructions: about ten times faster than kthvalue.
    ordered = np.partition(score.numpy(), count - 1, axis=1)
    bound = torch.from_numpy(ordered[:, count - 1 : count].copy())
    marked = score <= bound
    # Summing bytes is up to twenty times faster than count_nonzero on long rows.
    extra = np.add.reduce(marked.numpy().view(np.uint8), axis=1, dtype=np.int64) - count
    for group in extra.nonzero()[0].tolist():  # mark only the first ties at the bound
        tied = (score[group] == bound[group]).nonzero().flatten()
        marked[group, tied[len(tied) - int(extra[group]) :]] = False
    return marked
