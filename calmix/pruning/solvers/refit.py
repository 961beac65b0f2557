"""Refit of the kept weights of any mask, by masked conjugate gradients on all rows at once.

Each row's kept weights have their own least-squares optimum. Conjugate gradients approach it in ten
products with the Gram matrix; solving each row's normal equations would take a factorisation per
row (ALPS, arXiv 2406.07831, section 3.3, ends with such steps).

Inputs are scaled to norm one: with n_j = ||x_j|| and N = diag(n), tr((W - P) G (W - P)^T) is the
same for W N, P N and N^-1 G N^-1, whose unit diagonal makes Jacobi preconditioning free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from calmix.errors import SolverError
from calmix.precision import add_rounded_product, large_product, rounded, rounded_product
from calmix.pruning.gram import chunks, inverse_factor

STEPS = 10
REFIT_DAMPING = 0.001  # fraction of each input's square sum added to it
CHECK = 4  # steps between exact evaluations of the error


@dataclass(frozen=True)
class Scaled:
    """A scaled Gram matrix and the norms that scaled it, float32.

    Attributes:
        gram: (columns, columns), diagonal one; rows and columns of dead inputs zero.
        norm, inverse: (columns,), norms of the inputs and their reciprocals, zero where dead.
        dead: how many inputs were zero on every token.
    """

    gram: Tensor
    norm: Tensor
    inverse: Tensor
    dead: int

    @cached_property
    def coarse(self) -> Tensor:
        """The Gram matrix prepared by `rounded`, for all layers that share the input."""
        return rounded(self.gram)


def scale(gram: Tensor) -> Scaled:
    """Scale a Gram matrix to unit diagonal."""
    squares = gram.diagonal()
    dead = squares <= torch.finfo(squares.dtype).tiny
    if not (~dead).any():
        raise SolverError("the inputs of this layer are zero on every calibration token")
    norm = squares.sqrt().masked_fill(dead, 0)
    inverse = norm.reciprocal().masked_fill(dead, 0)
    return Scaled((gram * inverse).mul_(inverse[:, None]), norm, inverse, int(dead.sum()))


def refit(
    weights: Sequence[Tensor], pruned: Sequence[Tensor], gram: Tensor, *, steps: int = STEPS
) -> list[Tensor]:
    """Return the pruned weights refitted, in the type of the dense ones.

    Minimise tr((W - P) (G + damping diag G) (W - P)^T) over the nonzero entries of P. The damping
    is raised, at most a hundredfold, until the rounded Gram matrix is positive definite.

    Zeros stay exactly zero, and no row's error increases.

    Args:
        weights: dense matrices (rows, columns) of any float type that share one input.
        pruned: the same matrices pruned, in the same type or float32; the starting point.
        gram: float32 (columns, columns), sum of x x^T over the calibration tokens.
        steps: steps of conjugate gradients.
    """
    scaled = scale(gram)
    damping = REFIT_DAMPING * inverse_factor(scaled.gram, REFIT_DAMPING).raised
    return [
        refit_layer(weight, start, scaled, steps=steps, damping=damping)
        for weight, start in zip(weights, pruned, strict=True)
    ]


def refit_layer(
    weight: Tensor, start: Tensor, scaled: Scaled, *, steps: int, damping: float
) -> Tensor:
    """Refit one layer; return its weights in their type.

    Each row is a separate system with its own step lengths, preconditioned by the diagonal used to
    scale the Gram matrix. Products in the steps may round their factors to bfloat16, which can hide
    the differences between strongly correlated inputs. So the output error of each row, as stored,
    is computed in float32 after the first step, every `CHECK` steps and at the end. A row that got
    worse stops; each row keeps its best weights, which may be the initial ones.
    """
    checked = {1, *range(CHECK, steps, CHECK), steps} if steps else set()
    refitted = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in chunks(weight):
        dense, begin = weight[rows].float(), start[rows].to(weight.dtype).float()
        best, mask = begin, (begin != 0).float()
        delta = (dense - begin).mul_(scaled.norm)
        left = large_product(delta, scaled.gram)
        least = _dot(left, delta)
        left.add_(delta, alpha=damping).mul_(mask)
        moved, towards, product = (torch.zeros_like(left) for _ in range(3))
        size = torch.ones_like(least)
        for number in range(1, steps + 1):
            now = _dot(left, left)
            torch.addcmul(left, towards, torch.where(size > 0, now / size, 0), out=towards)
            size = now
            add_rounded_product(towards, towards, scaled.coarse, product, damping).mul_(mask)
            curvature = _dot(towards, product)
            # A solved row, or one without descent after rounding, stays unchanged.
            length = torch.where(curvature > 0, size / curvature, 0)
            moved.addcmul_(towards, length)
            left.addcmul_(product, length, value=-1)
            if number not in checked:
                continue
            stored = torch.addcmul(begin, moved, scaled.inverse).to(weight.dtype).float()
            torch.mul(dense - stored, scaled.norm, out=delta)
            large_product(delta, scaled.gram, out=product)
            # Rounding or an invalid Gram matrix can make it negative: that is as wrong.
            error = _dot(product, delta).abs_()
            better = error < least
            best, least = torch.where(better, stored, best), torch.where(better, error, least)
            if number % CHECK == 0 and number < steps:  # restart from unrounded weights
                back = (dense - begin).mul_(scaled.norm).sub_(moved).sub_(delta)
                torch.add(product, rounded_product(back, scaled.coarse), out=left)
                left.add_(delta.add_(back), alpha=damping).mul_(mask)
            left.mul_(better)
        refitted[rows] = best
    return refitted


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.vecdot(left, right)[:, None]
