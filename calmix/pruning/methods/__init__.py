"""Pruning methods: pure functions from weights and input statistics to pruned weights.

Each method solves all layers that share one input at once. To add one, write a module with a
`solve` function and name it in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from calmix.pruning.methods import magnitude, sparsegpt, wanda
from calmix.pruning.methods.solution import Solution

__all__ = ["METHODS", "Method", "Solution"]


@dataclass(frozen=True)
class Method:
    """A method, the statistic of the inputs it needs, and its paper."""

    name: str
    statistic: Literal["gram", "squares", "none"]
    solve: Callable[..., Solution]
    paper: str


METHODS = {
    "sparsegpt": Method("sparsegpt", "gram", sparsegpt.solve, "arXiv 2301.00774"),
    "wanda": Method("wanda", "squares", wanda.solve, "arXiv 2306.11695"),
    "magnitude": Method("magnitude", "none", magnitude.solve, "Han et al. 2015, arXiv 1506.02626"),
}
