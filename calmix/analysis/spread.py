"""The averaging artefact: how far apart calibration sets are in each dimension, and on average.

Sets that differ much in every dimension can look alike in the mean over dimensions, where gains
in one cancel losses in another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calmix.analysis.cells import TOTAL, Cells
from calmix.analysis.correlations import Over, counted
from calmix.analysis.ranking import quantity_estimates
from calmix.analysis.statistics import LEAST, ROUNDING, Array, f_above


@dataclass(frozen=True)
class Spread:
    """How far apart the calibration sets are in one quantity.

    Attributes:
        over: `single` sources, or `all` calibration sets.
        n: sets counted.
        lowest, highest: the sets at the ends; `range` is the distance between them.
        deviation: standard deviation over the sets.
        draws: standard deviation that the draw of the rows alone gives their means (pooled over
            seeds); None from single seeds.
        beyond_draws: deviation with the draws' part taken out of its square, at least 0 (ours).
        p_alike: of so large a deviation by the draws alone (F test of one-way analysis of
            variance, seeds within sets); None from single seeds.
        if_independent: for the total, the deviation it would have if the dimensions were
            unrelated. Less is observed where they trade off against each other (ours).
        p_cancel: for the total, the one-sided p of so small a deviation if the dimensions were
            unrelated: each dimension's values dealt anew to the sets, seeded (ours).
    """

    condition: str
    over: Over
    quantity: str
    n: int
    lowest: str
    highest: str
    range: float
    deviation: float
    draws: float | None
    beyond_draws: float | None
    p_alike: float | None
    if_independent: float | None
    p_cancel: float | None


def cancellation(parts: Array, *, permutations: int, seed: int) -> tuple[float, float]:
    """Return the deviation of the mean over unrelated dimensions, and the p of the observed one.

    Args:
        parts: retention, shape (sets, dimensions), nothing missing.
    """
    sets, dimensions = parts.shape
    unrelated = float(np.sqrt(parts.var(0, ddof=1).sum()) / dimensions)
    drawn = np.tile(parts.T, (permutations, 1, 1))
    dealt = np.random.default_rng([seed, sets]).permuted(drawn, axis=2).mean(1).std(1)
    as_small = int((dealt <= parts.mean(1).std() + ROUNDING).sum())
    return unrelated, (as_small + 1) / (permutations + 1)


def spreads(cells: Cells, over: Over, *, permutations: int, seed: int) -> list[Spread]:
    """Return the spread of every quantity; empty with fewer than two calibration sets."""
    chosen = counted(cells, over)
    if len(chosen) < 2:
        return []
    estimates = quantity_estimates(cells)
    found = []
    means = cells.means[chosen]
    complete = ~np.isnan(means[:, 1:]).any(1)
    parts = means[complete, 1:]
    for at, quantity in enumerate(cells.quantities):
        known = [row for row in range(len(chosen)) if not np.isnan(means[row, at])]
        if len(known) < 2:
            continue
        values = means[known, at]
        deviation = float(values.std(ddof=1))
        found_in = estimates[quantity]
        pooled = found_in.deviation
        draws = beyond = alike = None
        if pooled is not None:
            seeds = [found_in.sets[chosen[row]].seeds for row in known]
            draws = pooled * math.sqrt(sum(1 / count for count in seeds) / len(seeds))
            beyond = math.sqrt(max(0.0, deviation**2 - draws**2))
            if draws > 0:
                alike = f_above((deviation / draws) ** 2, len(known) - 1, found_in.freedom)
        unrelated = p = None
        if quantity == TOTAL and complete.sum() >= LEAST and parts.shape[1] > 1:
            unrelated, p = cancellation(parts, permutations=permutations, seed=seed)
        found.append(
            Spread(
                cells.condition.label, over, quantity, len(known),
                cells.sets[chosen[known[int(values.argmin())]]],
                cells.sets[chosen[known[int(values.argmax())]]],
                float(values.max() - values.min()), deviation, draws, beyond, alike, unrelated, p,
            )
        )  # fmt: skip
    return found
