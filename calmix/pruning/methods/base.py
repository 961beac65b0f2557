"""What a pruning method is: one class that says what it needs, what it takes, and how it prunes.

Everything else reads that: the engine, study files, the request's hash, the manifest, the memory
budget, the report. A method knows nothing of models, files or command lines.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from calmix.pruning.gram import Gram, Squares, Statistic
from calmix.pruning.patterns import Pattern, as_pattern, clear
from calmix.pruning.solvers import refit

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of factorisations
CACHED = 2**18  # weights worked on at a time on a CPU: larger buffers are asked of the system anew


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

    A field needs a default and a description. Options are numbers, texts or truth values.

    Attributes:
        name: what users write.
        title: what reports write; the name if empty.
        paper: where it is from.
        statistic: what it needs of the inputs; None if it looks at no calibration data.
        work: bytes that a solve takes beside the statistic, for every entry of a Gram matrix and
            for every weight of the layers that share it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    statistic: ClassVar[type[Statistic] | None]
    work: ClassVar[tuple[int, int]] = (0, 13)

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

        Raises:
            SolverError: weights or inputs cannot be used.
        """

    @property
    def needs(self) -> type[Statistic] | None:
        """The statistic with these options."""
        return self.statistic

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return the comparison groups of a layer, as (how many, entries each).

        An unstructured pattern prunes `pattern.count(entries)` of each; by default the layer is
        the one group.
        """
        return [(1, rows * columns)]

    def counts(self, weights: Sequence[Tensor], patterns: Sequence[Pattern]) -> list[int]:
        """Return how many weights of each layer its pattern prunes."""
        return [
            sum(number * pattern.count(size) for number, size in self.groups(*weight.shape))
            for weight, pattern in zip(weights, patterns, strict=True)
        ]

    def memory(self, columns: int, outputs: int) -> int:
        """Return the bytes held while one input is solved, its statistic among them.

        Args:
            columns: width of the input.
            outputs: rows of all layers that share it.
        """
        held = 0 if self.needs is None else self.needs.memory(columns)
        return held + self.work[0] * columns**2 + self.work[1] * columns * outputs

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


class Look(Method):
    """What a pass gathers that leaves all weights as they are."""

    name = "look"
    statistic = Squares
    work = 4, 13

    gram: bool = Field(default=False, description="Gram matrices, not square sums alone.")

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        return Solution([weight.float() for weight in weights], [0] * len(weights))

    @property
    def needs(self) -> type[Statistic] | None:
        return Gram if self.gram else Squares


class Refitted(Method):
    """A method whose mask may be followed by conjugate gradients on the kept weights.

    With `refit` the Gram matrix is gathered, whatever the mask alone looks at, and no layer's
    output error is larger than without.
    """

    refit: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Steps of conjugate gradients on the kept weights, after the mask.",
    )

    @abstractmethod
    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune by the method's own statistic; as `solve` otherwise."""

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune, and refit what is kept if that was asked for."""
        if not self.refit:
            return self.choose(weights, statistic, patterns)
        assert statistic is not None
        own = statistic if self.statistic is Gram else statistic.diagonal()
        chosen = self.choose(weights, own, patterns)
        made = refit.refit(weights, chosen.weights, statistic, steps=self.refit)
        return replace(chosen, weights=made.weights, dead=made.dead)

    @property
    def needs(self) -> type[Statistic] | None:
        """The Gram matrix for a refit, else the method's own statistic."""
        return Gram if self.refit else self.statistic

    def memory(self, columns: int, outputs: int) -> int:
        """The mask's, or what the refit works on."""
        fitting = self.refit and Gram.memory(columns) + refit.memory(outputs, columns)
        return max(super().memory(columns, outputs), fitting)


class Saliency(Refitted):
    """A method that scores every weight and prunes the least; kept weights are not changed.

    Attributes:
        by_row: whether scores are compared within an output row, else within a layer.
    """

    by_row: ClassVar[bool] = False
    work = 0, 8

    @abstractmethod
    def score(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """Return what every weight counts, float32, same shape.

        Args:
            weight: (rows, columns) of any float type; `by_row` it is some rows of a layer.
            statistic: of its input.
        """

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune, rows as many at a time as a processor's cache holds where that is possible."""
        made = [torch.empty_like(weight) for weight in weights]
        for weight, kept, pattern in zip(weights, made, patterns, strict=True):
            cached = self.by_row and weight.device.type == "cpu"
            rows = max(1, CACHED // weight.shape[1]) if cached else len(weight)
            for given, pruned in zip(weight.split(rows), kept.split(rows), strict=True):
                mask = pattern.mask(self.score(given, statistic), by_row=self.by_row)
                clear(pruned.copy_(given), mask)
        dead = 0 if statistic is None else int((statistic == 0).sum())
        return Solution(made, self.counts(weights, patterns), dead=dead)

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return every row, or the layer."""
        return [(rows, columns)] if self.by_row else super().groups(rows, columns)
