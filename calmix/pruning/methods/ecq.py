"""Entropy-coded GPTQ: as many levels as it takes, where few are common.

The loop of GPTQ on a uniform grid with a dead zone, sign(w) floor(|w| / step + 0.42). A level costs
what an entropy coder takes for it, so levels need no bound, and zeros come by themselves.

One step serves a layer, not one a group: at one step all weights lose as much for a bit, and the
coder sees which groups are wide. An error e in column j costs (e / U_jj)^2, so a column's step
grows with U_jj, by its root because U is found on few tokens. Ours: on four layers of
Qwen2.5-Coder-0.5B at 2 and 2.8 bits, steps by group lose 1.5 to 2 times as much on other text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calmix.pruning.gram import Factor
from calmix.pruning.methods.base import Quantiser, sampled
from calmix.pruning.solvers.grids import DeadZone, Grid, dead_zone, entropy, factors
from calmix.pruning.solvers.surgeon import solve_columns

POWER = 0.5  # of U_jj in a column's step
TRIED, TRIES = 48, 2  # rows of a layer solved to see what rate a step comes to, and how often
STEPS = -8.0, 4.0  # logarithms of the finest and the coarsest step, in deviations of the weights
FINE = 2.0**-8  # of a logarithm, to which a step is found
SAMPLE = 2**16  # weights of a layer whose entropy is taken


class Ecq(Quantiser):
    """Quantise to a rate, any number of bits a weight, as an entropy coder will store it.

    A layer's step is found by bisection on the entropy of its rounded weights, corrected by what
    the loop makes of some of its rows.
    """

    name, title = "ecq", "ECQ"
    paper = "arXiv 2210.17323; the entropy-coded grid is ours"

    def round(
        self, weights: Sequence[Tensor], factor: Factor, bits: float
    ) -> tuple[list[Tensor], list[Grid]]:
        own = factor.upper.diagonal()
        wanted = 4 * POWER * (own.log2() - own.log2().mean())
        octaves = wanted.round_().clamp_(-127, 127).to(torch.int8)
        column = factors(octaves)
        scaled = [weight.float() / column for weight in weights]
        factor = replace(factor, upper=factor.upper / column)
        steps = self._steps(scaled, factor, bits)
        rounding = DeadZone(scaled, steps)
        made = solve_columns(scaled, factor, None, rounding)
        grids = [replace(one, octaves=octaves) for one in rounding.grids(made, [0] * len(made))]
        return [weight.mul_(column) for weight in made], grids

    def _steps(self, weights: Sequence[Tensor], factor: Factor, bits: float) -> list[float]:
        """Return the layers' steps, those that take so many bits."""
        size = [float(weight.square().mean().sqrt()) or 1.0 for weight in weights]
        goals = [max(bits - DeadZone.beside(weight), 0.0) for weight in weights]
        pairs = list(zip(weights, goals, strict=True))
        ends = [[one * 2**end for end in STEPS] for one in size]
        steps = [_step_of(*pair, *own) for pair, own in zip(pairs, ends, strict=True)]
        some = [weight[:: max(1, len(weight) // TRIED)] for weight in weights]
        for _ in range(TRIES):
            made = solve_columns(some, factor, None, DeadZone(some, steps))
            beyond = [
                entropy((kept / step).round_()) - entropy(dead_zone(weight / step))
                for weight, kept, step in zip(some, made, steps, strict=True)
            ]
            goals = [max(goal - more, 0.0) for (_, goal), more in zip(pairs, beyond, strict=True)]
            near = zip(weights, goals, steps, strict=True)
            steps = [_step_of(w, goal, 0.7 * step, 1.4 * step) for w, goal, step in near]
        return steps


def _step_of(weight: Tensor, bits: float, low: float, high: float) -> float:
    """Return the step between two at which a layer's weights, rounded, take so many bits."""
    sample = sampled(weight, SAMPLE).contiguous()
    while math.log2(high / low) > FINE:
        middle = math.sqrt(low * high)
        if entropy(dead_zone(sample / middle)) > bits:
            low = middle
        else:
            high = middle
    return high
