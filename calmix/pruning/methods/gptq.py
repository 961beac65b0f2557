"""GPTQ (arXiv 2210.17323): round column by column, correcting the columns that follow."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from calmix.errors import InputError
from calmix.pruning.gram import Factor
from calmix.pruning.methods.base import Method, Quantiser
from calmix.pruning.patterns import Mixed, Pattern
from calmix.pruning.solvers.grids import Asymmetric, Grid, Symmetric, check_group
from calmix.pruning.solvers.surgeon import solve_columns


class Gptq(Quantiser):
    """Quantise to 2 to 8 bits, with one scale per group of inputs of an output row.

    Columns are processed in order. A group's scale is chosen when the loop reaches it: the best of
    a few candidates (ours).
    """

    name, title = "gptq", "GPTQ"
    paper = "arXiv 2210.17323"

    group: int = Field(default=64, ge=1, description="Inputs of a row that share a scale.")
    symmetric: bool = Field(default=True, description="No zero point of each group.")

    def aim(self, pattern: Pattern | None) -> tuple[Method, Pattern]:
        """Fractional bits are an average: the layers of each input get whole ones."""
        if isinstance(pattern, Mixed) and not self.bits:
            return self, pattern
        method, target = super().aim(pattern)
        bits = self.rate(target).bits
        return method, target if bits == int(bits) else Mixed(bits)

    @property
    def choices(self) -> range:
        """The whole bits that levels can have."""
        return range(2, 9 if self.symmetric else 8)  # 16-bit weights hold no levels of up to 255

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        """Refuse bits that levels cannot have, and groups that do not divide a row."""
        bits = pattern.bits if isinstance(pattern, Mixed) else self.rate(pattern).bits
        if not self.choices[0] <= bits <= self.choices[-1]:
            kind = "gptq takes" if self.symmetric else "asymmetric levels have"
            raise InputError(f"{kind} 2 to {self.choices[-1]} bits, not {bits:g}")
        check_group(self.group, columns, name)

    def round(
        self, weights: Sequence[Tensor], factor: Factor, bits: float
    ) -> tuple[list[Tensor], list[Grid]]:
        return solve_columns(weights, factor, None, self.grid(weights, int(bits)))

    def grid(self, weights: Sequence[Tensor], bits: int) -> Symmetric:
        """Return the grid of layers that share an input."""
        kind = Symmetric if self.symmetric else Asymmetric
        return kind(weights, self.group, bits)
