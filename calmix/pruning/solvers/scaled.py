"""The output error of a layer in coordinates in which every input has norm one.

With n_j = ||x_j|| and N = diag(n), tr((W - P) G (W - P)^T) is the same for W N, P N and the
scaled Gram matrix N^-1 G N^-1, whose diagonal is one: a preconditioner by the diagonal that
costs nothing later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from calmix.errors import SolverError
from calmix.precision import rounded

ROWS = 512  # rows worked on at a time: enough for a product, little beside the layer
WIDE = 2**25  # entries worked on at a time on an accelerator, where every call is a kernel


@dataclass(frozen=True)
class Fitted:
    """Pruned weights of layers that share one input.

    Attributes:
        weights: matrices (rows, columns) in the type of those given, pruned entries exactly zero.
        damping: damping that was used.
        dead: how many inputs were zero on every token.
    """

    weights: list[Tensor]
    damping: float
    dead: int


@dataclass(frozen=True)
class Scaled:
    """A Gram matrix and the norms it was scaled by.

    Attributes:
        gram: float32 (columns, columns), diagonal one; rows and columns of dead inputs zero.
        norm: float32 (columns,), norms of the inputs, zero where dead.
        inverse: float32 (columns,), their reciprocals, zero where dead.
        dead: how many inputs were zero on every token.
    """

    gram: Tensor
    norm: Tensor
    inverse: Tensor
    dead: int

    @cached_property
    def coarse(self) -> Tensor:
        """The Gram matrix as a factor that may be rounded, for all layers that share the input."""
        return rounded(self.gram)


def scale(gram: Tensor) -> Scaled:
    """Scale a Gram matrix to unit diagonal.

    Raises:
        SolverError: its diagonal is not finite, or zero on every token.
    """
    squares = gram.diagonal()
    if not torch.isfinite(squares).all():
        raise SolverError("the inputs of this layer are not finite")
    dead = squares <= torch.finfo(squares.dtype).tiny
    if not (~dead).any():
        raise SolverError("the inputs of this layer are zero on every calibration token")
    norm = squares.sqrt().masked_fill(dead, 0)
    inverse = norm.reciprocal().masked_fill(dead, 0)
    return Scaled((gram * inverse).mul_(inverse[:, None]), norm, inverse, int(dead.sum()))


def chunks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of a matrix that are worked on at a time."""
    rows, columns = matrix.shape
    size = ROWS if matrix.device.type == "cpu" else max(ROWS, WIDE // columns)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
