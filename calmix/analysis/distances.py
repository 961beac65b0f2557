"""Whether the distance to the dense model, which needs no labels, could stand in for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calmix.analysis.cells import Cells, nan_mean
from calmix.analysis.statistics import ALPHA, LEAST, permutation_p, spearman


@dataclass(frozen=True)
class Agreement:
    """Spearman's rho of KL to the dense model with retention over all calibration sets (ours).

    Attributes:
        quantity: `total` or a dimension, of KL as of retention.
        n: sets with both.
        rho: -1 where KL orders the sets as the benchmarks do; None if either does not vary.
        p: two-sided, by permutation, not corrected.
    """

    condition: str
    quantity: str
    n: int
    rho: float | None
    p: float | None

    @property
    def agrees(self) -> bool:
        """Whether a lower KL goes with more retention beyond chance."""
        return self.rho is not None and self.rho < 0 and self.p is not None and self.p <= ALPHA


def agreements(cells: Cells, *, permutations: int, seed: int) -> list[Agreement]:
    """Return the agreement of total and dimensions, draws averaged first.

    Quantities that fewer than four sets have both of are left out.
    """
    made = []
    kl = nan_mean(cells.distance["kl"], 1)
    for at, name in enumerate(cells.quantities):
        known = ~np.isnan(kl[:, at]) & ~np.isnan(cells.means[:, at])
        if known.sum() < LEAST:
            continue
        x, y = kl[known, at], cells.means[known, at]
        rho = spearman(x, y)
        p, _ = permutation_p(x, y, permutations=permutations, seed=seed)
        told = not np.isnan(rho)
        made.append(
            Agreement(cells.condition.label, name, len(x), rho if told else None,
                      float(p) if told else None)
        )  # fmt: skip
    return made
