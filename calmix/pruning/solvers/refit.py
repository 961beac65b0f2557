"""Refit of the kept weights of any mask, by masked conjugate gradients on all rows at once.

A row's kept weights have a least-squares optimum of their own. Conjugate gradients come close to
it in ten products with the Gram matrix, where solving each row's normal equations would take one
factorisation a row (ALPS, arXiv 2406.07831, section 3.3, ends with such steps).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calmix.errors import SolverError
from calmix.precision import add_rounded_product, large_product, rounded_product, widest
from calmix.pruning.gram import Work
from calmix.pruning.reading import holds, quotient
from calmix.pruning.solvers.scaled import ROWS, Fitted, Scaled, chunks, scale

STEPS = 10
DAMPING = 0.001
VALUES = 16  # read and written a weight and step
ROUND = 10  # steps before rounding shows in the residual


def refit(
    weights: Sequence[Tensor],
    pruned: Sequence[Tensor],
    gram: Tensor,
    *,
    steps: int = STEPS,
    damping: float = DAMPING,
) -> Fitted:
    """Minimise tr((W - P) (G + damping diag G) (W - P)^T) over the entries of P that are not zero.

    Zeros stay exactly zero. A row keeps the weights it came with unless its own output error,
    after rounding to their type, is less: no layer ends with a larger error than it began with.

    The steps' products may round their factors to bfloat16, so the residual is computed anew in
    float32 every `ROUND` steps, and the errors that are compared are float32.

    Args:
        weights: dense matrices (rows, columns) of any float type that share one input.
        pruned: the same pruned, of the same type or float32: where to begin.
        gram: float32 (columns, columns), sum of x x^T over the calibration tokens.
        steps: steps of conjugate gradients; 0 only measures.
        damping: share of every input's own square sum added to it.

    Raises:
        SolverError: the Gram matrix or the weights are not finite, or every input is zero.
    """
    scaled = scale(gram)
    made, errors = [], []
    for weight, start in zip(weights, pruned, strict=True):
        result, error = refit_layer(weight, start, scaled, steps=steps, damping=damping)
        made.append(result)
        errors.append(error)
    return Fitted(made, errors, damping, scaled.dead)


def refit_layer(
    weight: Tensor, start: Tensor, scaled: Scaled, *, steps: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Refit one layer; return its weights, in their type, and the error that is left."""
    made = torch.empty_like(weight, memory_format=torch.contiguous_format)
    lost = torch.zeros((), dtype=widest(weight.device), device=weight.device)
    energy = torch.zeros_like(lost)
    for rows in chunks(weight):
        dense, begin = weight[rows].float(), start[rows].to(weight.dtype)
        target = dense * scaled.norm
        end, mask = begin.to(torch.float32, copy=True), (begin != 0).float()
        delta = (dense - end).mul_(scaled.norm)
        residual = large_product(delta, scaled.gram)
        before = (residual * delta).sum(1)
        for done in range(0, steps, ROUND):
            if done:
                torch.mul(dense - end, scaled.norm, out=delta)
                large_product(delta, scaled.gram, out=residual)
            at_once = min(ROUND, steps - done)
            change = _conjugate_gradients(residual, delta, mask, scaled.coarse, at_once, damping)
            end.add_(change.mul_(scaled.inverse))
        made[rows] = end
        end = made[rows].float()
        torch.mul(dense - end, scaled.norm, out=delta)
        after = large_product(delta, scaled.gram, out=residual).mul_(delta).sum(1)
        better = after < before
        made[rows] = torch.where(better[:, None], end, begin.float())
        lost += torch.where(better, after, before).sum()
        energy += (rounded_product(target, scaled.coarse) * target).sum()
    if not holds(torch.isfinite(lost + energy)):
        raise SolverError("the weights or inputs of this layer are not finite")
    return made, quotient(lost.clamp(min=0), energy.clamp(min=0))


def _conjugate_gradients(
    residual: Tensor, delta: Tensor, mask: Tensor, gram: Tensor, steps: int, damping: float
) -> Tensor:
    """Return by how much the entries that a mask of 1.0 keeps change, in scaled coordinates.

    Every row is a system of its own, with its own step lengths. What `gram`, of `rounded`, is
    scaled by is the preconditioner.
    """
    left = residual.add(delta, alpha=damping).mul_(mask)
    change, towards = torch.zeros_like(left), left.clone()
    size = torch.linalg.vecdot(left, left)[:, None]
    product = torch.empty_like(left)
    for _ in range(steps):
        add_rounded_product(towards, towards, gram, product, damping).mul_(mask)
        curvature = torch.linalg.vecdot(towards, product)[:, None]
        # A row that is solved, or that rounding left no descent, stays where it is.
        length = torch.where(curvature > 0, size / curvature, 0)
        change.addcmul_(towards, length)
        left.addcmul_(product, length, value=-1)
        now = torch.linalg.vecdot(left, left)[:, None]
        towards.mul_(torch.where(size > 0, now / size, 0)).add_(left)
        size = now
    return change


def work(rows: int, columns: int, *, steps: int = STEPS) -> Work:
    """Return what a layer's refit takes: a product a step, a residual a round, two energies."""
    one = 2.0 * rows * columns**2
    return Work(
        rounded=(steps + 1) * one,
        products=(max(1, -(-steps // ROUND)) + 1) * one,
        cached=4.0 * VALUES * rows * columns * (steps + 1),
    )


def memory(rows: int, columns: int) -> int:
    """Return the bytes a refit needs beside weights and Gram: its scaled copies and some rows."""
    return 6 * columns**2 + 16 * 4 * columns * min(rows, ROWS)
