"""The averaging artefact: how far apart calibration sets are in each dimension, and on average.

Sets that differ much in every dimension can look alike in the mean over dimensions, where gains
in one cancel losses in another. What of it is noise: `noise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calmix.analysis.cells import TOTAL, Cells
from calmix.analysis.correlations import Over, counted
from calmix.analysis.statistics import LEAST, ROUNDING, Array


@dataclass(frozen=True)
class Spread:
    """How far apart the calibration sets are in the total or in one dimension.

    Attributes:
        over: `single` sources, or `all` calibration sets.
        n: sets counted.
        lowest, highest: the sets at the ends; `range` is the distance between them.
        deviation: standard deviation over the sets.
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
    """Return the spread of total and dimensions; empty with fewer than two calibration sets."""
    chosen = counted(cells, over)
    means = cells.means[chosen][:, : len(cells.quantities)]
    parts = means[:, 1:][:, ~np.isnan(means[:, 1:]).any(0)]
    found = []
    for at, quantity in enumerate(cells.quantities):
        values = means[:, at]
        if len(chosen) < 2 or np.isnan(values).any():
            continue
        unrelated = p = None
        if quantity == TOTAL and len(chosen) >= LEAST and parts.shape[1] > 1:
            unrelated, p = cancellation(parts, permutations=permutations, seed=seed)
        found.append(
            Spread(
                cells.condition.label, over, quantity, len(chosen),
                cells.sets[chosen[int(values.argmin())]],
                cells.sets[chosen[int(values.argmax())]],
                float(values.max() - values.min()), float(values.std(ddof=1)), unrelated, p,
            )
        )  # fmt: skip
    return found
