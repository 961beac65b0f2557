"""What a pruning method is: one class that says what it needs, what it takes, and how it prunes.

Everything else reads that: the engine, study files, the request's hash, the manifest, the memory
budget, the report. A method knows nothing of models, files or command lines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from calmix.errors import InputError
from calmix.pruning.gram import OUTPUTS, Factor, Gram, Squares, Statistic, inverse_factor
from calmix.pruning.patterns import Pattern, Rate, Unstructured, clear
from calmix.pruning.solvers.grids import Grid, Symmetric, check_group
from calmix.pruning.solvers.refit import refit
from calmix.pruning.solvers.surgeon import solve_columns

DAMPING = 0.01
Damping = Annotated[
    float,
    Field(
        gt=0,
        allow_inf_nan=False,
        description="Share of the mean diagonal of the Gram matrix added to its diagonal.",
    ),
]
Refit = Annotated[
    int,
    Field(
        ge=0,
        le=1000,
        description="Steps of conjugate gradients on the kept weights, after the mask.",
    ),
]
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
        grids: the levels and scales of quantised layers; empty where none is.
    """

    weights: list[Tensor]
    pruned: list[int]
    errors: list[float | None] = field(default_factory=list)
    damping: float | None = None
    dtype: torch.dtype | None = None
    dead: int = 0
    grids: list[Grid] = field(default_factory=list)


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

    @abstractmethod
    def solve(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune layers that share one input.

        Args:
            weights: matrices (rows, columns) of any float type; not to be changed.
            statistic: what `needs` gave of their input, not to be changed; None if it is None.
            patterns: what share or pattern to prune, one a layer.

        Raises:
            SolverError: weights or inputs cannot be used.
        """

    @property
    def needs(self) -> type[Statistic] | None:
        """The statistic with these options."""
        return self.statistic

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        """Return the method and what it is to reach; InputError where that is not given."""
        if pattern is None:
            raise InputError("give either --sparsity (such as 0.5) or --pattern (such as 2:4)")
        return self, pattern

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        """Refuse a pattern that the method has no use for, or that does not fit a layer's width."""
        if isinstance(pattern, Rate):
            raise InputError(
                f"method {self.name} takes a sparsity, not {pattern} alone: give --sparsity, or "
                "choose --method ecq or gptq"
            )
        if columns % pattern.group:
            raise InputError(
                f"pattern {pattern} does not divide the {columns} inputs of {name}: choose "
                f"another, or leave such layers dense with --skip '*.{name.rsplit('.', 1)[-1]}'"
            )

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return the comparison groups of a layer, as (how many, entries each).

        An unstructured pattern prunes `pattern.count(entries)` of each; by default the layer is
        the one group.
        """
        return [(1, rows * columns)]

    def count(self, pattern: Pattern, rows: int, columns: int) -> int:
        """Return how many weights of a layer a pattern prunes."""
        return sum(number * pattern.count(size) for number, size in self.groups(rows, columns))

    def counts(self, weights: Sequence[Tensor], patterns: Sequence[Pattern]) -> list[int]:
        """Return how many weights of each layer its pattern prunes."""
        pairs = zip(weights, patterns, strict=True)
        return [self.count(pattern, *weight.shape) for weight, pattern in pairs]

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


def by_kind(
    choose: Callable[..., Solution],
    weights: Sequence[Tensor],
    statistic: Any,
    patterns: Sequence[Pattern],
) -> Solution:
    """Return what is chosen for layers: all with shares at once, and those of one other pattern."""
    kinds = [None if isinstance(pattern, Unstructured) else pattern for pattern in patterns]
    found: dict[int, tuple[Any, ...]] = {}  # weights, number pruned, grid if there is one
    for kind in dict.fromkeys(kinds):
        places = [place for place, own in enumerate(kinds) if own == kind]
        some, wanted = ([every[place] for place in places] for every in (weights, patterns))
        made = choose(some, statistic, wanted)
        parts = filter(None, (made.weights, made.pruned, made.grids))
        found |= zip(places, zip(*parts, strict=True), strict=True)
    kept, pruned, *grids = map(list, zip(*(found[at] for at in range(len(kinds))), strict=True))
    return replace(made, weights=kept, pruned=pruned, grids=grids[0] if grids else [])


def sampled(matrix: Tensor, size: int) -> Tensor:
    """Return about `size` entries of a matrix, of every column some."""
    step = max(1, matrix.numel() // size)
    while math.gcd(step, matrix.shape[1]) > 1:
        step += 1
    return matrix.reshape(-1)[::step]


class Look(Method):
    """What a pass gathers that leaves all weights as they are."""

    name = "look"
    statistic = Squares
    work = 4, 13

    gram: bool = Field(default=False, description="Gram matrices, not square sums alone.")

    def solve(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        return Solution([weight.float() for weight in weights], [0] * len(weights))

    @property
    def needs(self) -> type[Statistic] | None:
        return Gram if self.gram else Squares


class Quantiser(Method):
    """A method that rounds weights to a grid; it is asked for bits a weight."""

    statistic = Gram
    work = 7, 12  # the factor and what makes it; the weights transposed, and a group's scales

    bits: float = Field(
        default=0, ge=0, le=8, description="Bits a weight, as --bits says; 0: not said."
    )
    damping: Damping = DAMPING

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        if pattern is None and not self.bits:
            raise InputError(f"method {self.name} needs --bits, such as 4")
        if pattern is not None and self.bits:
            raise InputError(f"method {self.name} takes --bits alone; sparsegpt takes both")
        bare = type(self)(**self.changed | {"bits": 0})
        return bare, Rate(self.bits) if pattern is None else self.rate(pattern)

    def rate(self, pattern: Pattern) -> Rate:
        """Return the pattern, or refuse one that is no rate."""
        if not isinstance(pattern, Rate):
            raise InputError(
                f"method {self.name} takes --bits, not {pattern}: for zeros and bits together "
                "choose --method sparsegpt"
            )
        return pattern

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        self.rate(pattern)

    @abstractmethod
    def round(
        self, weights: Sequence[Tensor], factor: Factor, bits: float
    ) -> tuple[list[Tensor], list[Grid]]:
        """Return weights of layers that share an input on their grids, float32, and the grids."""

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Quantise layers; those of one rate together."""
        factor = inverse_factor(statistic, self.damping)

        def choose(some: Sequence[Tensor], _: Tensor, rates: Sequence[Pattern]) -> Solution:
            made, grids = self.round(some, factor, self.rate(rates[0]).bits)
            zeros = [weight.numel() - int(weight.count_nonzero()) for weight in made]
            dead = int(factor.dead.sum())
            return Solution(made, zeros, [], factor.damping, factor.dtype, dead, grids)

        return by_kind(choose, weights, statistic, patterns)


class Sparse(Method):
    """A method that prunes, and may refit and quantise what it keeps.

    With `refit` or `bits` the Gram matrix is gathered, whatever the mask alone looks at. No refit
    makes a layer's output error larger.

    Attributes:
        refits: whether `choose` refits by itself.
    """

    refits: ClassVar[bool] = False

    bits: int = Field(
        default=0, ge=0, le=8, description="Bits of a kept weight, 2 to 8; 0: as it is stored."
    )
    group: int = Field(default=64, ge=1, description="Inputs of a row that share a scale.")
    refit: Refit = 0

    @field_validator("bits")
    @classmethod
    def _more_than_one(cls, bits: int) -> int:
        if bits == 1:
            raise ValueError("a kept weight takes at least 2 bits")
        return bits

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        super().check(pattern, columns, name)
        if self.bits:
            check_group(self.group, columns, name)

    @abstractmethod
    def choose(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune by the method's own statistic; as `solve` otherwise, but all patterns are shares,
        or one and the same."""

    def solve(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune, and refit and quantise what is kept if that was asked for."""
        more = self.needs is not self.statistic  # a Gram matrix, for what follows the mask
        own = statistic.diagonal() if more else statistic
        chosen = by_kind(self.choose, weights, own, patterns)
        if self.refit and not self.refits:
            made = refit(weights, chosen.weights, statistic, steps=self.refit)
            chosen = replace(chosen, weights=made)
        if self.bits and not chosen.grids:  # GPTQ's loop with the mask held
            rounding = Symmetric(chosen.weights, self.group, self.bits)
            factor = inverse_factor(statistic, DAMPING)
            made, grids = solve_columns(chosen.weights, factor, None, rounding, chosen.pruned)
            chosen = replace(chosen, weights=made, grids=grids)
        return chosen

    @property
    def needs(self) -> type[Statistic] | None:
        """The Gram matrix for a refit or bits, else the method's own statistic."""
        return Gram if self.refit or self.bits else self.statistic

    def memory(self, columns: int, outputs: int) -> int:
        """The mask's, or what the refit or the rounding works on."""
        gram, held = Gram.memory(columns), super().memory(columns, outputs)
        if self.refit:  # the scaled Gram matrix, and some rows or a factor at work; chosen and made
            work = 6 * columns**2 + 16 * 4 * columns * min(outputs, OUTPUTS)
            held = max(held, gram + max(11 * columns**2, work) + 6 * columns * outputs)
        if self.bits:
            held = max(held, gram + 7 * columns**2 + 20 * columns * outputs)
        return held


class Saliency(Sparse):
    """A method that scores every weight and prunes the least; kept weights are not changed.

    Attributes:
        by_row: whether scores are compared within an output row, else within a layer.
    """

    by_row: ClassVar[bool] = False
    work = 0, 8

    @abstractmethod
    def score(self, weight: Tensor, statistic: Any) -> Tensor:
        """Return what every weight counts, float32, same shape.

        Args:
            weight: (rows, columns) of any float type; `by_row` it is some rows of a layer.
            statistic: of its input.
        """

    def choose(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
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
