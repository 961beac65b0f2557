"""Types of GGML, which llama.cpp runs, by GPTQ's loop (arXiv 2210.17323) with llama.cpp's scales.

llama.cpp searches the scales of each block for the least error, weighted by the importance of each
input, and lets no weight make up for another's rounding. Research code corrects weights but
searches scales without weights (gptq-gguf-toolkit). Both together are ours: scales are searched on
the corrected weights when the loop reaches a block, weighted by 1 / U_jj^2, then frozen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from pydantic import Field, field_validator
from torch import Tensor

from calmix.errors import InputError
from calmix.pruning.gram import Factor, Gram, Squares, Statistic, inverse_factor
from calmix.pruning.methods.base import DAMPING, Damping, Method, Solution, by_kind
from calmix.pruning.patterns import Blocks, Mixed, Pattern, Rate, Recipe
from calmix.pruning.solvers.ggml_scales import BlockGrid, fitting, rounded_alone, solve_blocks
from calmix.pruning.solvers.ggml_types import BlockType, Encoded
from calmix.pruning.solvers.libggml import load_library, quantise
from calmix.pruning.solvers.surgeon import solve_columns
from calmix.pruning.type_recipes import recipe_name


class Typed(Method):
    """A method that quantises to the types of a file of llama.cpp, such as Q3_K_M or IQ4_XS.

    Rows that are not a multiple of 256 get another type (`calmix.pruning.solvers.ggml_scales`).
    """

    work = 8, 26  # factorisation; dense and rounded weights, transposed, their errors and bytes

    type: str = Field(default="Q4_K_M", description="File of llama.cpp, such as Q3_K_M or IQ4_XS.")
    bits: float = Field(
        default=0, ge=0, le=9, description="Bits per weight of the file, in place of a type."
    )

    @field_validator("type")
    @classmethod
    def _known(cls, name: str) -> str:
        return recipe_name(name)

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        aims = {name: one for name, one in self.changed.items() if name in ("type", "bits")}
        if len(aims) + (pattern is not None) > 1:
            several = [*map(str, aims.values()), *([] if pattern is None else [str(pattern)])]
            raise InputError(f"the type is given twice: {' and '.join(several)}")
        target: Pattern = Mixed(self.bits) if self.bits else Recipe(self.type)
        if pattern is not None:
            target = Mixed(pattern.bits) if isinstance(pattern, Rate) else pattern
        bare = type(self)(**{k: v for k, v in self.changed.items() if k not in aims})
        return bare, target

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        later = isinstance(pattern, Mixed | Recipe)  # types are chosen later
        kind = type_of(Blocks("Q8_0") if later else pattern, columns, name, self.name)
        searched = str(pattern).startswith(("IQ2", "IQ3")) if later else not kind.group
        if searched or isinstance(pattern, Mixed):
            load_library()

    @abstractmethod
    def solve_outer(
        self, parts: Sequence[Tensor], gram: Tensor | None, pattern: Blocks
    ) -> Iterator[Encoded]:
        """Yield the rows of embeddings or output head in blocks, some at a time.

        Args:
            gram: (columns, columns), of the inputs; None if there is none.
        """


class Ggml(Typed):
    """Quantise to the types of a file of llama.cpp, by error feedback on their grids."""

    name, title = "ggml", "GGML"
    paper = "arXiv 2210.17323; weighted scales are ours"
    statistic = Gram

    damping: Damping = DAMPING
    sweeps: int = Field(default=1, ge=0, le=10, description="Passes that choose all levels again.")

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Quantise layers, those of equal types together."""
        factor = inverse_factor(statistic, self.damping)
        return self.solve_factored(weights, statistic, factor, patterns)

    def solve_factored(
        self, weights: Sequence[Tensor], gram: Tensor, factor: Factor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Do the same with the factor of the Gram matrix."""

        def choose(some: Sequence[Tensor], _: Tensor, types: Sequence[Pattern]) -> Solution:
            kind = type_of(types[0], some[0].shape[1])
            if kind.group:
                solved, grids = self._solve_columns(some, gram, factor, kind)
            else:
                search = partial(quantise, name=kind.name)
                grids = [solve_blocks(weight, factor, kind.size, search) for weight in some]
                solved = [grid.values() for grid in grids]
            zeros, dead = [0] * len(solved), int(factor.dead.sum())
            return Solution(solved, zeros, factor.damping, factor.dtype, dead, grids)

        return by_kind(choose, weights, gram, patterns)

    def _solve_columns(
        self, weights: Sequence[Tensor], gram: Tensor, factor: Factor, kind: BlockType
    ) -> tuple[list[Tensor], list[Encoded]]:
        """Return the rounded float32 weights of layers in a type that has levels, and blocks."""
        grid = BlockGrid(weights, kind, self.importance(gram, factor))
        solved, grids = solve_columns(weights, factor, None, grid)
        if not self.sweeps:
            return solved, grids
        damped = gram.clone()
        damped.diagonal().add_(factor.damping * gram.diagonal().mean())
        target, values = (
            torch.cat([layer.T.float() for layer in layers], 1) for layers in (weights, solved)
        )
        for _ in range(self.sweeps):
            grid.sweep(target, values, damped)
        solved = [part.T for part in values.split([len(weight) for weight in weights], 1)]
        return solved, grid.grids(solved, [0] * len(solved))

    def solve_outer(
        self, parts: Sequence[Tensor], gram: Tensor | None, pattern: Blocks
    ) -> Iterator[Encoded]:
        factor = None if gram is None else inverse_factor(gram, self.damping)
        for rows in parts:
            if gram is None or factor is None:
                yield rounded_alone(rows, type_of(pattern, rows.shape[1]))
            else:
                [blocks] = self.solve_factored([rows], gram, factor, [pattern]).grids
                assert isinstance(blocks, Encoded)
                yield blocks

    def solve_alone(
        self, weights: Sequence[Tensor], squares: Tensor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Quantise layers with no weight making up for another's error.

        Args:
            squares: sum of squares of each input, (columns,).
        """
        importance = squares + self.damping * squares.mean()
        grids = [
            rounded_alone(weight, type_of(pattern, weight.shape[1]), importance)
            for weight, pattern in zip(weights, patterns, strict=True)
        ]
        return _decoded(grids)

    def importance(self, gram: Tensor, factor: Factor) -> Tensor:
        """Return what a squared error in each column costs, once later ones have made up for it."""
        return factor.upper.diagonal().square().reciprocal()


class Llama(Typed):
    """Quantise to the types of a file of llama.cpp as llama.cpp does, for comparison.

    No weight makes up for another's rounding. Scales are searched by GGML, errors weighted by an
    importance matrix: the mean square of each input of the dense model on the calibration set.
    Embeddings and output head have none, as in llama.cpp.
    """

    name, title = "llama", "llama.cpp"
    paper = "llama.cpp, imatrix and quantize"
    statistic = Squares
    dense_inputs = True

    flat: bool = Field(default=False, description="An importance matrix of ones.")
    imatrix: str = Field(default="", description="File with an importance matrix of llama.cpp.")

    @property
    def importance_file(self) -> str:
        return self.imatrix

    @property
    def needs(self) -> type[Statistic] | None:
        return None if self.imatrix else self.statistic

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        method, target = super().aim(pattern)
        if self.imatrix and isinstance(target, Mixed):
            raise InputError(
                f"types for {target.bits:g} bits per weight are chosen on calibration text: leave "
                "out imatrix, or name a type"
            )
        return method, target

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        super().check(pattern, columns, name)
        load_library()

    def solve(
        self, weights: Sequence[Tensor], statistic: Tensor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Round each layer by itself."""
        importance = torch.ones_like(statistic) if self.flat else statistic
        grids = [
            quantise(weight, importance, name=type_of(pattern, weight.shape[1]).name)
            for weight, pattern in zip(weights, patterns, strict=True)
        ]
        return _decoded(grids)

    def solve_outer(
        self, parts: Sequence[Tensor], gram: Tensor | None, pattern: Blocks
    ) -> Iterator[Encoded]:
        for rows in parts:
            yield quantise(rows, None, name=type_of(pattern, rows.shape[1]).name)


def _decoded(grids: Sequence[Encoded]) -> Solution:
    """Return layers whose weights are those that their blocks hold."""
    return Solution([grid.values() for grid in grids], [0] * len(grids), grids=grids)


def type_of(
    pattern: Pattern, columns: int, name: str = "a layer", method: str = "ggml"
) -> BlockType:
    """Return the type of a layer: the pattern's, or one whose blocks fit its rows."""
    if not isinstance(pattern, Blocks):
        raise InputError(f"method {method} takes a type such as Q3_K_M, not {pattern}")
    kind = fitting(pattern.type, columns)
    if columns % kind.size:
        raise InputError(
            f"no type of GGML fits the {columns} inputs of {name}: leave such layers dense with "
            f"--skip '*.{name.rsplit('.', 1)[-1]}'"
        )
    return kind
