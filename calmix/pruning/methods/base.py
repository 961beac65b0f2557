"""The base classes of pruning methods: one class declares the statistic, options and solver.

The engine, study files, the request's hash, manifest, memory budget and report all read that class.
A method knows nothing about models, files or command lines.
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
from calmix.options import Statistics
from calmix.pruning.gram import OUTPUTS, Factor, Gram, Squares, Statistic, inverse_factor
from calmix.pruning.patterns import Blocks, Mixed, Pattern, Rate, Recipe, Unstructured, clear
from calmix.pruning.solvers.ggml_types import Encoded
from calmix.pruning.solvers.grids import Grid, Symmetric, check_group
from calmix.pruning.solvers.refit import refit
from calmix.pruning.solvers.surgeon import solve_columns

DAMPING = 0.01
Damping = Annotated[
    float,
    Field(
        gt=0,
        allow_inf_nan=False,
        description="Fraction of the Gram matrix's mean diagonal added to its diagonal.",
    ),
]
Refit = Annotated[
    int,
    Field(
        ge=0,
        le=1000,
        description="Conjugate gradient steps on the kept weights, after masking.",
    ),
]
# Weights processed at a time on a CPU: larger buffers are reallocated each time.
MASKED_AT_ONCE = 2**18


@dataclass(frozen=True)
class Solution:
    """Pruned weights of layers that share one input.

    Attributes:
        weights: matrices (rows, columns) in float32, or in their original type if kept weights are
            unchanged; may be transposed views. Pruned entries are exactly zero.
        pruned: number of entries removed by each layer's mask.
        damping: the damping used, None if the method has none.
        dtype: precision of the factorisation, None if there is none.
        dead: inputs that were zero on every token.
        grids: the grids of quantised layers, or the blocks that hold their levels and scales; empty
            if nothing is quantised.
    """

    weights: list[Tensor]
    pruned: list[int]
    damping: float | None = None
    dtype: torch.dtype | None = None
    dead: int = 0
    grids: Sequence[Grid | Encoded] = field(default_factory=list)


class Method(BaseModel, ABC):
    """A pruning method; its fields are its options.

    A field needs a default and a description. Options are numbers, strings or booleans.

    Attributes:
        name: the name on the command line.
        title: the name in reports; `name` if empty.
        paper: reference.
        statistic: of the inputs; None if the method uses no calibration data.
        dense_inputs: whether the statistic is of the dense model's inputs, with all tokens alike,
            whatever the run's propagation and statistics.
        work: bytes a solve takes besides the statistic: per entry of a Gram matrix, and per weight
            of the layers that share it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    statistic: ClassVar[type[Statistic] | None]
    dense_inputs: ClassVar[bool] = False
    work: ClassVar[tuple[int, int]] = (0, 13)

    @abstractmethod
    def solve(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune layers that share one input.

        Args:
            weights: matrices (rows, columns) of any float type; must not be modified.
            statistic: of type `needs`, of their input; must not be modified. None if `needs` is.
            patterns: one per layer.

        Raises:
            SolverError: weights or inputs are unusable.
        """

    @property
    def needs(self) -> type[Statistic] | None:
        """The statistic needed with these options."""
        return self.statistic

    @property
    def importance_file(self) -> str:
        """A file with an importance matrix in place of statistics; empty if there is none."""
        return ""

    def has_dense_targets(self, statistics: Statistics | None) -> bool:
        """Whether layers also make up for the errors of those before them (`held_out`)."""
        return self.is_robust(statistics) and self.needs is Gram

    def is_robust(self, statistics: Statistics | None) -> bool:
        """Whether statistics that a run asks for, robust by default, are so with this method."""
        return statistics != "plain" and self.needs is not None and not self.dense_inputs

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        """Return the method to run and its target; an InputError if no target is given."""
        if pattern is None:
            raise InputError("give either --sparsity (such as 0.5) or --pattern (such as 2:4)")
        return self, pattern

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        """Refuse a pattern that the method cannot use or that does not fit a layer's width."""
        if isinstance(pattern, Rate | Blocks | Mixed | Recipe):
            others = "ecq or gptq" if isinstance(pattern, Rate) else "ggml"
            raise InputError(
                f"method {self.name} takes a sparsity, not {pattern} alone: add --sparsity, or "
                f"choose --method {others}"
            )
        if columns % pattern.group:
            raise InputError(
                f"pattern {pattern} does not divide the {columns} inputs of {name}: choose another "
                f"pattern, or leave such layers dense with --skip '*.{name.rsplit('.', 1)[-1]}'"
            )

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return the comparison groups of a layer as (number of groups, entries in each).

        An unstructured pattern prunes `pattern.count(entries)` of each; the default is one group
        per layer.
        """
        return [(1, rows * columns)]

    def count(self, pattern: Pattern, rows: int, columns: int) -> int:
        """Return how many weights a pattern prunes in a layer."""
        groups = [(1, rows * columns)] if pattern.group > 1 else self.groups(rows, columns)
        return sum(number * pattern.count(size) for number, size in groups)

    def counts(self, weights: Sequence[Tensor], patterns: Sequence[Pattern]) -> list[int]:
        """Return how many weights each layer's pattern prunes."""
        pairs = zip(weights, patterns, strict=True)
        return [self.count(pattern, *weight.shape) for weight, pattern in pairs]

    def memory(self, columns: int, outputs: int) -> int:
        """Return the bytes held while solving the layers of one input, its statistic included.

        Args:
            columns: width of the input.
            outputs: total rows of the layers that share it.
        """
        statistic = 0 if self.needs is None else self.needs.memory(columns)
        return statistic + self.work[0] * columns**2 + self.work[1] * columns * outputs

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
        """The method as on the command line, with its non-default options."""
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.changed.items())])


def by_kind(
    choose: Callable[..., Solution],
    weights: Sequence[Tensor],
    statistic: Any,
    patterns: Sequence[Pattern],
) -> Solution:
    """Call `choose` once for all unstructured layers and once per other pattern; merge results."""
    kinds = [None if isinstance(pattern, Unstructured) else pattern for pattern in patterns]
    merged: dict[int, tuple[Any, ...]] = {}  # weights, number pruned, grid if there is one
    for kind in dict.fromkeys(kinds):
        indices = [index for index, other in enumerate(kinds) if other == kind]
        some, targets = ([every[index] for index in indices] for every in (weights, patterns))
        solved = choose(some, statistic, targets)
        parts = filter(None, (solved.weights, solved.pruned, solved.grids))
        merged |= zip(indices, zip(*parts, strict=True), strict=True)
    weights_left, pruned, *grids = map(
        list, zip(*(merged[at] for at in range(len(kinds))), strict=True)
    )
    return replace(solved, weights=weights_left, pruned=pruned, grids=grids[0] if grids else [])


def sampled(matrix: Tensor, size: int) -> Tensor:
    """Return about `size` entries of a matrix, some from every column."""
    step = max(1, matrix.numel() // size)
    while math.gcd(step, matrix.shape[1]) > 1:
        step += 1
    return matrix.reshape(-1)[::step]


class Look(Method):
    """A method that only gathers square sums of inputs and leaves all weights unchanged."""

    name = "look"
    statistic = Squares
    work = 4, 13

    def solve(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        return Solution([weight.float() for weight in weights], [0] * len(weights))


class Quantiser(Method):
    """A method that rounds weights to a grid, at a given number of bits per weight."""

    statistic = Gram
    work = 7, 12  # factorisation; transposed weights and a group's scales

    bits: float = Field(
        default=0, ge=0, le=8, description="Bits per weight, as in --bits; 0: not given."
    )
    damping: Damping = DAMPING

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        if pattern is None and not self.bits:
            raise InputError(f"method {self.name} needs --bits, such as 4")
        if pattern is not None and self.bits:
            raise InputError(f"method {self.name} takes --bits alone; use sparsegpt for both")
        bare = type(self)(**self.changed | {"bits": 0})
        return bare, Rate(self.bits) if pattern is None else self.rate(pattern)

    def rate(self, pattern: Pattern) -> Rate:
        """Return the pattern if it is a rate, else raise."""
        if not isinstance(pattern, Rate):
            raise InputError(
                f"method {self.name} takes --bits, not {pattern}: for sparsity and bits together "
                "choose --method sparsegpt"
            )
        return pattern

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        self.rate(pattern)

    @abstractmethod
    def round(
        self, weights: Sequence[Tensor], factor: Factor, bits: float
    ) -> tuple[list[Tensor], list[Grid]]:
        """Return the rounded float32 weights of layers that share an input, and their grids."""

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Quantise layers, those with equal rates together."""
        return self.solve_factored(weights, inverse_factor(statistic, self.damping), patterns)

    def solve_factored(
        self, weights: Sequence[Tensor], factor: Factor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Do the same with the factor of the Gram matrix."""

        def choose(some: Sequence[Tensor], _: None, rates: Sequence[Pattern]) -> Solution:
            rounded, grids = self.round(some, factor, self.rate(rates[0]).bits)
            zeros = [weight.numel() - int(weight.count_nonzero()) for weight in rounded]
            dead = int(factor.dead.sum())
            return Solution(rounded, zeros, factor.damping, factor.dtype, dead, grids)

        return by_kind(choose, weights, None, patterns)


class Sparse(Method):
    """A method that prunes, and can refit and quantise the kept weights.

    `refit` and `bits` gather the Gram matrix, whatever the mask needs. A refit never increases a
    layer's output error.

    Attributes:
        refits: whether `choose` does the refit.
    """

    refits: ClassVar[bool] = False

    bits: int = Field(
        default=0, ge=0, le=8, description="Bits of a kept weight, 2 to 8; 0: unquantised."
    )
    group: int = Field(default=64, ge=1, description="Inputs of a row that share a scale.")
    refit: Refit = 0

    @field_validator("bits", mode="before")
    @classmethod
    def _whole(cls, bits: Any) -> Any:
        try:
            whole = float(bits) in (0, *range(2, 9))
        except (TypeError, ValueError):
            whole = False
        if not whole:
            raise ValueError("kept weights take whole bits from 2 to 8")
        return int(float(bits))

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        method, target = super().aim(pattern)
        method.check(target, 0)
        return method, target

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        super().check(pattern, columns, name)
        if "group" in self.changed and not self.bits:
            raise InputError(
                f"group={self.group} has no effect with method {self.name} without bits: add "
                "bits=4, or leave it out"
            )
        if self.needs is not self.statistic and self.statistic not in (None, Squares):
            raise InputError(
                f"method {self.name} has a statistic of its own, which a refit and bits replace by "
                "a Gram matrix: leave out refit and bits"
            )
        if self.bits:
            check_group(self.group, columns, name)

    @abstractmethod
    def choose(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune by the method's own statistic. As `solve`, but the patterns are all unstructured or
        all equal."""

    def solve(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune, then refit and quantise the kept weights if requested."""
        widened = self.needs is not self.statistic  # to a Gram matrix, for the refit or the bits
        narrow = statistic.diagonal() if widened else statistic
        chosen = by_kind(self.choose, weights, narrow, patterns)
        if self.refit and not self.refits:
            refitted = refit(weights, chosen.weights, statistic, steps=self.refit)
            chosen = replace(chosen, weights=refitted)
        if self.bits and not chosen.grids:  # GPTQ's loop, with a fixed mask
            chosen = self.rounded(chosen, inverse_factor(statistic, self.rounding_damping))
        return chosen

    def rounded(self, pruned: Solution, factor: Factor) -> Solution:
        """Return pruned layers with their kept weights rounded."""
        rounding = Symmetric(pruned.weights, self.group, self.bits)
        rounded, grids = solve_columns(pruned.weights, factor, None, rounding, pruned.pruned)
        return replace(pruned, weights=rounded, grids=grids)

    @property
    def rounding_damping(self) -> float:
        """The damping of the Gram matrix when kept weights are rounded."""
        return DAMPING

    @property
    def needs(self) -> type[Statistic] | None:
        """The Gram matrix for a refit or bits, else the statistic of the mask."""
        return Gram if self.refit or self.bits else self.statistic

    def memory(self, columns: int, outputs: int) -> int:
        """Return the larger of the bytes for the mask, the refit and the rounding."""
        gram, needed = Gram.memory(columns), super().memory(columns, outputs)
        if self.refit:  # scaled Gram matrix, some rows or a factorisation; two sets of weights
            work = 6 * columns**2 + 16 * 4 * columns * min(outputs, OUTPUTS)
            needed = max(needed, gram + max(11 * columns**2, work) + 6 * columns * outputs)
        if self.bits:
            needed = max(needed, gram + 7 * columns**2 + 20 * columns * outputs)
        return needed


class Saliency(Sparse):
    """A method that scores every weight and prunes the lowest; kept weights are unchanged.

    Attributes:
        by_row: whether scores are compared within an output row instead of a layer.
    """

    by_row: ClassVar[bool] = False
    work = 0, 8

    @abstractmethod
    def score(self, weight: Tensor, statistic: Any) -> Tensor:
        """Return the float32 score of every weight, same shape.

        Args:
            weight: (rows, columns) of any float type; some rows of a layer if `by_row`.
            statistic: of its input.
        """

    def choose(
        self, weights: Sequence[Tensor], statistic: Any, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune; on a CPU with `by_row`, as many rows at a time as fit in the cache."""
        masked = [torch.empty_like(weight) for weight in weights]
        for weight, out, pattern in zip(weights, masked, patterns, strict=True):
            cached = self.by_row and weight.device.type == "cpu"
            rows = max(1, MASKED_AT_ONCE // weight.shape[1]) if cached else len(weight)
            for part, pruned in zip(weight.split(rows), out.split(rows), strict=True):
                mask = pattern.mask(self.score(part, statistic), by_row=self.by_row)
                clear(pruned.copy_(part), mask)
        dead = 0 if statistic is None else int((statistic == 0).sum())
        return Solution(masked, self.counts(weights, patterns), dead=dead)

    def groups(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return one group per row, or one per layer."""
        return [(rows, columns)] if self.by_row else super().groups(rows, columns)
