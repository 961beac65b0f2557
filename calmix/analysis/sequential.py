"""Draws until sets are apart: a look at the totals after every round, and who needs one more draw.

Compared are every set with the best so far, and all sets that are no single source with one
another (ours). The interval of a pair is Student's t by the spread over draws, pooled over all
sets: about other draws on these items, since more draws take nothing off the items' noise.

Many looks give chance many tries. The level is split evenly over the most looks there can be
(Bonferroni, ours), so that over the whole procedure a pair without a difference is called apart,
and one `within` apart or more called equal, in at most 5 % of studies. That is of one pair: it is
not corrected over the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calmix.analysis.statistics import LEVEL, Array, scipy_stats

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Look:
    """What one look sees; arrays may have leading axes, for many studies at a time.

    Attributes:
        means: of every set's draws, shape (..., sets).
        half: half-widths of the pairs' corrected intervals, shape (..., sets, sets); inf where no
            set has two draws.
        compared: the pairs that are looked at, as `half`.
        within: differences that count as none.
    """

    means: Array
    half: Array
    compared: Flags
    within: float

    @property
    def gap(self) -> Array:
        """Row's mean less column's."""
        return self.means[..., :, None] - self.means[..., None, :]

    @property
    def apart(self) -> Flags:
        """Pairs whose interval leaves out 0."""
        return self.compared & (np.abs(self.gap) > self.half)

    @property
    def equal(self) -> Flags:
        """Other pairs whose interval lies wholly within +-`within`."""
        return self.compared & ~self.apart & (np.abs(self.gap) + self.half <= self.within)

    @property
    def open(self) -> Flags:
        """Pairs of which neither can be said yet."""
        return self.compared & ~self.apart & ~self.equal


def look(values: Array, mixed: Flags, *, within: float, looks: int) -> Look:
    """Look at the totals.

    Args:
        values: shape (..., sets, draws); nan where there is none, at least one a set.
        mixed: sets that are no single source, shape (sets,).
        looks: the most there can be, over which the level is split.
    """
    known = ~np.isnan(values)
    counts = known.sum(-1)
    means = np.where(known, values, 0.0).sum(-1) / counts
    squares = np.where(known, (values - means[..., None]) ** 2, 0.0).sum((-1, -2))
    freedom = (counts - 1).sum(-1)
    some = np.maximum(freedom, 1)
    critical = scipy_stats().t.ppf(1 - (1 - LEVEL) / (2 * looks), some)
    scale = np.where(freedom > 0, critical * np.sqrt(squares / some), np.inf)
    half = scale[..., None, None] * np.sqrt(1 / counts[..., :, None] + 1 / counts[..., None, :])
    best = np.arange(values.shape[-2]) == means.argmax(-1)[..., None]
    compared = best[..., :, None] | best[..., None, :] | (mixed[:, None] & mixed)
    return Look(means, half, compared & ~np.eye(values.shape[-2], dtype=bool), within)


def unsettled(seen: Look, more: Flags) -> Flags:
    """Return the sets that one more draw is for, shape (..., sets): those of every open pair of
    which both sides can have `more`, shape (..., sets)."""
    return np.any(seen.open & more[..., :, None] & more[..., None, :], axis=-1)
