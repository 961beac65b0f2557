"""GPTQ (arXiv 2210.17323): round column by column, correcting the columns that follow."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from calmix.errors import InputError
from calmix.pruning.gram import Factor
from calmix.pruning.methods.base import Quantiser
from calmix.pruning.patterns import Pattern
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

    def check(self, pattern: Pattern, columns: int, name: str = "a layer") -> None:
        """Refuse fractional bits, and groups that do not divide a row."""
        bits = self.rate(pattern).bits
        if bits not in range(2, 9):
            raise InputError(
                f"gptq takes whole bits from 2 to 8, not {pattern}: for other rates use ecq"
            )
        if bits > 7 and not self.symmetric:  # 16-bit weights hold no levels of up to 255
            raise InputError(f"asymmetric levels have 2 to 7 bits, not {bits:g}")
        check_group(self.group, columns, name)

    def round(
        self, weights: Sequence[Tensor], factor: Factor, bits: float
    ) -> tuple[list[Tensor], list[Grid]]:
        kind = Symmetric if self.symmetric else Asymmetric
        return solve_columns(weights, factor, None, kind(weights, self.group, int(bits)))
