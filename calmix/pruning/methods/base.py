"""What a pruning method is: one class that says what it needs, what it takes, and how it prunes.

Everything else reads that: the engine, the command line's options, study files, the request's
hash, the manifest and the memory budget. A method knows nothing of models, files
or command lines.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from calmix.pruning.gram import Statistic
from calmix.pruning.patterns import Pattern, as_pattern

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of factorisations


@dataclass(frozen=True)
class Solution:
    """Pruned weights of layers that share one input.

    Attributes:
        weights: matrices (rows, columns) in float32, or in their own type where kept weights are
            what they were; may be transposed views. Pruned entries are exactly zero.
        pruned: number of entries each layer's mask removes.
        errors: not a method's to give: the engine takes `relative_error` of each layer, or None
            where the method asks for no Gram matrix.
        damping: damping that was used, None if the method has none.
        dtype: precision of the factorisation, None if there is none.
        dead: inputs that were zero on every token.
    """

    weights: list[Tensor]
    pruned: list[int]
    errors: list[float | None] = field(default_factory=list)
    damping: float | None = None
    dtype: torch.dtype | None = None
    dead: int = 0


class Method(BaseModel, ABC):
    """A pruning method; its fields are its options, an instance has their values.

    A field needs a default and a description, which become the command line's. Options are
    numbers, texts or truth values.

    Attributes:
        name: what users write.
        statistic: what it needs of the inputs; None if it looks at no calibration data.
        paper: where it is from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    statistic: ClassVar[type[Statistic] | None]
    paper: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let `solve` take parameters that require gradients, and patterns as users write them."""
        super().__init_subclass__(**options)
        if "solve" in vars(cls):
            cls.solve = _solving(cls.solve)  # type: ignore[method-assign]

    @abstractmethod
    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune layers that share one input.

        Args:
            weights: matrices (rows, columns) of any float type; not to be changed.
            statistic: what `needs` gave of their input, not to be changed; None if it is None.
            patterns: what share or pattern to prune, one a layer, as `as_pattern` takes them.
        """

    @property
    def needs(self) -> type[Statistic] | None:
        """The statistic with these options."""
        return self.statistic

    def counts(self, weights: Sequence[Tensor], patterns: Sequence[Pattern]) -> list[int]:
        """Return how many weights of each layer its pattern prunes."""
        return [
            sum(number * pattern.count(size) for number, size in self.groups(*weight.shape))
            for weight, pattern in zip(weights, patterns, strict=True)
        ]

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return the comparison groups of a layer, as (how many, entries each).

        An unstructured pattern prunes `pattern.count(entries)` of each; by default the layer is
        the one group.
        """
        return [(1, rows * columns)]

    def memory(self, columns: int, outputs: int, widest: int) -> int:
        """Return the bytes held while one input is solved, its statistic among them.

        Args:
            columns: width of the input.
            outputs: rows of all layers that share it.
            widest: rows of the largest of them.
        """
        held = 0 if self.needs is None else self.needs.memory(columns)
        return held + 4 * columns * outputs + 9 * columns * widest

    @property
    def options(self) -> dict[str, Any]:
        """All options with their values, JSON-serialisable."""
        return self.model_dump(mode="json")

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, JSON-serialisable."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def text(self) -> str:
        """The method as a user writes it, with the options that differ from their defaults."""
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.changed.items())])

    def __str__(self) -> str:
        return self.text


def _solving(solve: Callable[..., Solution]) -> Callable[..., Solution]:
    @functools.wraps(solve)
    def solving(
        self: Method, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Any]
    ) -> Solution:
        with torch.no_grad():
            return solve(self, weights, statistic, [as_pattern(one) for one in patterns])

    return solving
