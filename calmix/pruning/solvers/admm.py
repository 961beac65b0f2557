"""Mask and weights together, by alternating directions on the Gram matrix.

Boza (arXiv 2401.02938) and ALPS (arXiv 2406.07831) split the problem into a least-squares step
and a projection onto sparse matrices. Ours are the form of the iteration, the schedule, the
sampled bounds, and that the weights are left to conjugate gradients once the mask is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calmix.errors import SolverError
from calmix.precision import add_rounded_product, bfloat16_products, rounded
from calmix.pruning.gram import inverse_factor, squared
from calmix.pruning.patterns import (
    Pattern,
    SemiStructured,
    Unstructured,
    check_columns,
    clear,
    smallest,
    smallest_of_m,
)
from calmix.pruning.solvers import refit
from calmix.pruning.solvers.scaled import ROWS, Fitted, Scaled, chunks, scale

ITERATIONS = 24
REFIT = 8
RHO = 1.0
RIDGE = 0.6  # an input's share that others tell is found with so much added to its square sum
LEAST = 1e-3  # of an input's square sum that counts as its own
DAMPING = 0.001
POWER = 4  # of the schedule: the share pruned rises as 1 - (1 - t)^4
SAMPLE = 2**14  # weights of which a bound is taken


def admm(
    weights: Sequence[Tensor],
    gram: Tensor,
    patterns: Sequence[Pattern],
    *,
    iterations: int = ITERATIONS,
    rho: float = RHO,
    damping: float = DAMPING,
    steps: int = REFIT,
) -> Fitted:
    """Prune by alternating directions (arXiv 2401.02938, algorithm 1), then refit what is kept.

    In scaled coordinates (see scaled.py and `by_own_part`), with H the scaled Gram matrix plus
    damping:

        minimise tr((W - X) H (W - X)^T) over X = Z, Z sparse

    Its iterations X = (W H + rho (Z - U)) (H + rho)^-1, Z = project(X + U), U = U + X - Z are, for
    T = X + U, one line (Douglas and Rachford's):

        Z = project(T),  T = Z + (T + W - 2 Z) Q,  Q = (H + rho)^-1 H

    Unstructured, the share that is projected away rises to the pattern's over all iterations,
    and bounds come from a sample of the layer; the last projection is exact. N:M patterns are
    projected in full from the first: measured, a gradual schedule is worse. Comparing within rows
    instead of the whole layer loses 13 % more on the builtin model.

    Args:
        weights: matrices (rows, columns) of any float type that share one input.
        gram: float32 (columns, columns), sum of x x^T over the calibration tokens.
        patterns: of each layer: the share of the whole layer to prune, or of every group of M
            columns of a row. Of equal weights those of the lower index go.
        iterations: products that look for the mask.
        rho: penalty on X - Z, beside inputs whose own part is one. Below 0.8 it overshoots.
        damping: share of every input's own part added to its square sum, here and in the refit.
        steps: steps of conjugate gradients on the kept weights (see refit.py).

    Raises:
        InputError: M of an N:M pattern does not divide the columns.
        SolverError: the Gram matrix or the weights are not finite, every input is zero, or no
            damping makes the Gram matrix positive definite.
    """
    for pattern in patterns:
        check_columns(pattern, len(gram))
    scaled = by_own_part(scale(gram))
    starts: dict[int, Tensor] = {}
    used = damping
    for m in sorted({_group(pattern) for pattern in patterns}):
        order = _panels(len(gram), m, gram.device)
        reflector, used = _reflector(scaled.gram, order, m, rho, damping)
        for number, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
            if _group(pattern) == m:
                starts[number] = _search(weight, order, scaled, reflector, pattern, iterations)
        del reflector
    made = [
        refit.refit_layer(weight, starts.pop(number), scaled, steps=steps, damping=used)
        for number, weight in enumerate(weights)
    ]
    return Fitted(made, used, scaled.dead)


def by_own_part(scaled: Scaled) -> Scaled:
    """Return inputs scaled so that what no other input tells of them has norm one.

    With inputs of norm one, c_j = 1 / ((G + r)^-1)_jj - r is the square of what a ridge regression
    on the others leaves of input j. Where inputs have much in common, a mean or one large
    direction, that is little: with a penalty and a threshold in units of the norms the search sees
    the common part alone, and ends behind SparseGPT, whose saliency has these c_j with r near
    zero. Ours.

    Args:
        scaled: is changed.

    Raises:
        SolverError: as `inverse_factor`.
    """
    gram = scaled.gram
    mean = float(gram.diagonal().mean())
    factor = inverse_factor(gram, RIDGE / mean)
    ridge = RIDGE * factor.raised
    own = factor.upper.square_().sum(0).reciprocal_().sub_(ridge).clamp_(LEAST, 1).sqrt_()
    del factor
    gram.div_(own[:, None]).div_(own)
    return Scaled(gram, scaled.norm * own, scaled.inverse / own, scaled.dead)


def _group(pattern: Pattern) -> int:
    """Return M of an N:M pattern, 1 of an unstructured one."""
    return pattern.m if isinstance(pattern, SemiStructured) else 1


def _panels(columns: int, m: int, device: torch.device) -> Tensor:
    """Return an order of the columns in which the j-th of every group of M make one panel."""
    return torch.arange(columns, device=device).view(-1, m).T.reshape(-1)


def _reflector(
    gram: Tensor, order: Tensor, m: int, rho: float, damping: float
) -> tuple[Tensor, float]:
    """Return Q = I - rho (H + rho)^-1, its columns in order, and the damping that was needed."""
    mean = float(gram.diagonal().mean())
    ordered = gram if m == 1 else gram[order][:, order]
    factor = inverse_factor(ordered, (damping + rho) / mean)
    del ordered
    with bfloat16_products():  # as the steps that use it do
        reflector = squared(factor.upper).mul_(-rho)
    reflector.diagonal().add_(1)
    reflector = rounded(reflector)
    # What a raised damping adds counts as damping; the penalty stays what it is.
    return reflector, damping + (factor.raised - 1) * (damping + rho)


def _search(
    weight: Tensor,
    order: Tensor,
    scaled: Scaled,
    reflector: Tensor,
    pattern: Pattern,
    iterations: int,
) -> Tensor:
    """Return one layer's weights, pruned but not refitted, in their type."""
    norm = scaled.norm[order]
    target = weight[:, order].float().contiguous().mul_(norm)
    state = target.clone()
    for number in range(1, iterations + 1):
        if isinstance(pattern, Unstructured):
            time = number / (iterations + 1)
            bound = _bound(state, pattern.sparsity * (1 - (1 - time) ** POWER))
        for rows in chunks(state):
            part = state[rows]
            if isinstance(pattern, SemiStructured):
                sparse = part.addcmul(part, _semi_structured(part, pattern), value=-1)
            else:
                sparse = _shrunk(part, bound)
            step = torch.add(part, target[rows]).sub_(sparse, alpha=2)
            add_rounded_product(sparse, step, reflector, part)
    del target
    if not torch.isfinite(state.sum()):
        raise SolverError("the weights or inputs of this layer are not finite")
    if isinstance(pattern, SemiStructured):
        mask = _semi_structured(state, pattern)
    else:
        flat = state.abs().view(1, -1)
        mask = smallest(flat, pattern.count(flat.shape[1])).view(state.shape).to(state.dtype)
    state.mul_(scaled.inverse[order])
    # Inputs that never fired keep their weights as they are.
    state = torch.where(norm == 0, weight[:, order].float(), state)
    clear(state, mask)
    made = torch.empty_like(weight, memory_format=torch.contiguous_format)
    made[:, order] = state.to(weight.dtype)
    return made


def _shrunk(state: Tensor, bound: Tensor) -> Tensor:
    """Return the entries whose absolute value exceeds a bound, and zeros."""
    if state.device.type == "cpu":
        return functional.hardshrink(state, bound.item())
    return torch.where(state.abs() > bound, state, 0)


def _bound(state: Tensor, share: float) -> Tensor:
    """Return the absolute value that about `share` of a layer's entries do not exceed."""
    step = max(1, state.numel() // SAMPLE)
    while math.gcd(step, state.shape[1]) > 1:  # a sample of every column
        step += 1
    sample = state.view(-1)[::step].abs()
    count = round(share * len(sample))
    if not count:
        return sample.new_zeros(())
    if sample.device.type != "cpu":
        return sample.sort().values[count - 1]
    # NumPy selects with vector instructions: twenty times faster than kthvalue.
    return torch.from_numpy(np.partition(sample.numpy(), count - 1))[count - 1]


def _semi_structured(state: Tensor, pattern: SemiStructured) -> Tensor:
    """Return 1.0 where an N:M pattern prunes, 0.0 elsewhere; columns lie in panels."""
    panels = state.abs().view(len(state), pattern.m, -1).transpose(0, 1)
    mask = smallest_of_m(panels, pattern.m - pattern.n)
    return mask.transpose(0, 1).to(state.dtype).reshape(state.shape)


def memory(rows: int, columns: int, most: int | None = None, *, value_bytes: int = 2) -> int:
    """Return the bytes needed beside weights and Gram.

    Args:
        rows: of all layers that share the input.
        columns: of the input.
        most: rows of the largest of the layers; None for one layer.
        value_bytes: of a weight.
    """
    most = rows if most is None else most
    factors = 15 * columns**2  # the scaled Gram matrix, in order; a factor at work
    layer = max(16 * columns * most, 8 * columns * most + 20 * columns * min(most, ROWS))
    return max(
        factors,
        12 * columns**2 + layer + value_bytes * columns * rows,
        refit.memory(rows, columns) + value_bytes * columns * rows,
    )
