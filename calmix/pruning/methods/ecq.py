"""Entropy-coded GPTQ: an unbounded number of levels, few of them common.

The loop of GPTQ on a uniform grid with a dead zone, sign(w) floor(|w| / step + 0.42). A level costs
its entropy-coded length, so the levels need no bound, and zeros arise without a mask.

A layer has one step, not one per group: a bit then saves as much error everywhere, and the entropy
coder adapts to the groups. An error e in column j costs (e / U_jj)^2, so a column's step grows
with U_jj, with its square root because U is estimated on few tokens. Ours: on four layers of
Qwen2.5-Coder-0.5B at 2 and 2.8 bits, per-group steps lose 1.5 to 2 times as much on other text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calmix.precision import large_products
from calmix.pruning.gram import Factor
from calmix.pruning.methods.base import Quantiser, sampled
from calmix.pruning.solvers.grids import DEAD_ZONE, DeadZone, Grid, entropy, entropy_of, factors
from calmix.pruning.solvers.surgeon import solve_columns

STEP_POWER = 0.5  # of U_jj in a column's step
TRIED, STEP_TRIES = 48, 2  # rows corrected to estimate the rate of a step, and iterations
STEP_RANGE = -8.0, 4.0  # log2 of the finest and coarsest step, in root mean squares of the weights
STEP_TOLERANCE = 2.0**-8  # tolerance of a step, in log2
ENTROPY_SAMPLE = 2**16  # weights of a layer sampled for its entropy


class Ecq(Quantiser):
    """Quantise to any number of bits per weight, measured after entropy coding.

    A layer's step is found by bisection on the entropy of its rounded weights, adjusted by that of
    a few rows after an approximate correction.
    """

    name, title = "ecq", "ECQ"
    paper = "arXiv 2210.17323; the entropy-coded grid is ours"

    def round(
        self, weights: Sequence[Tensor], factor: Factor, bits: float
    ) -> tuple[list[Tensor], list[Grid]]:
        own = factor.upper.diagonal()
        wanted = 4 * STEP_POWER * (own.log2() - own.log2().mean())
        octaves = wanted.round_().clamp_(-127, 127).to(torch.int8)
        column = factors(octaves)
        scaled = [weight.float() / column for weight in weights]
        factor = replace(factor, upper=factor.upper / column)
        steps = torch.tensor([_step(one, factor, bits) for one in scaled]).bfloat16().tolist()
        scaled = [weight.div_(step) for weight, step in zip(scaled, steps, strict=True)]
        rounded, grids = solve_columns(scaled, factor, None, DeadZone(scaled, steps))
        grids = [replace(grid, octaves=octaves) for grid in grids]
        return [weight.mul_(column) for weight in rounded], grids


def _step(weight: Tensor, factor: Factor, bits: float) -> float:
    """Return the step at which a layer takes `bits` per weight.

    All columns of some rows are corrected at once by the others' current errors. The result differs
    from that of the sequential loop, but after two iterations its spread is the same.
    """
    grid = DeadZone([weight], [1.0])
    size = float(torch.linalg.vector_norm(weight)) / math.sqrt(weight.numel()) or 1.0
    goal = max(bits - grid.beside(weight), 0.0)
    ordered = np.sort(sampled(weight, ENTROPY_SAMPLE).cpu().numpy())
    step = _step_of(ordered, goal, *(size * 2**end for end in STEP_RANGE))
    now = some = weight[:: max(1, len(weight) // TRIED)]
    for _ in range(STEP_TRIES):
        wrong = now - grid.nearest(now / step).mul_(step)
        with large_products():
            now = some + wrong - (wrong / factor.upper.diagonal()) @ factor.upper
        more = entropy(grid.nearest(now / step)) - entropy(grid.nearest(some / step))
        step = _step_of(ordered, max(goal - more, 0.0), 0.7 * step, 1.4 * step)
    return step


def _step_of(ordered: NDArray[np.float32], bits: float, low: float, high: float) -> float:
    """Return the step from `low` to `high` at which sorted weights, rounded, take `bits`."""
    while math.log2(high / low) > STEP_TOLERANCE:
        middle = math.sqrt(low * high)
        most = math.ceil(np.abs(ordered[[0, -1]]).max() / middle)
        ends = (np.arange(1, most + 2, dtype=np.float32) - DEAD_ZONE) * middle
        ends[-1] = np.inf
        cuts = ordered.searchsorted(np.concatenate([-ends[::-1], ends]).astype(np.float32))
        if entropy_of(cuts[1:] - cuts[:-1]) > bits:
            low = middle
        else:
            high = middle
    return high
