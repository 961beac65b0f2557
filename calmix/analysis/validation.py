"""How well something known of a calibration set beforehand tells what the set keeps.

The rank correlation asks nothing but an order. What a straight line would make of it is judged
on sets the line has not seen: each set is predicted from all the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calmix.analysis.statistics import LEAST, Array, Strata, spearman


@dataclass(frozen=True)
class Predicted:
    """How well one quantity predicts another over calibration sets.

    Attributes:
        n: sets with both.
        rho: Spearman's of the two; None where either does not vary, or with fewer than four sets.
        rho_left_out: Spearman's of what is measured and `leave_one_out`. Where there is nothing
            to predict it is below zero: a mean without a high value is lower.
        error: root mean square of measured less `leave_one_out`; `spread` is that of the mean of
            the others, which a prediction has to beat.
    """

    n: int
    rho: float | None = None
    rho_left_out: float | None = None
    error: float | None = None
    spread: float | None = None


def leave_one_out(x: Array, y: Array) -> Array:
    """Return each `y` as the least-squares line through all other points has it, shape (n,).

    In closed form (PRESS; Allen, Technometrics 1974). nan where the others have all one `x`.
    """
    centred = x - x.mean()
    square = float(centred @ centred)
    if square == 0:
        return np.full(len(x), np.nan)
    fitted = y.mean() + centred * float(centred @ (y - y.mean())) / square
    free = 1 - (1 / len(x) + centred**2 / square)
    return np.where(free > 1e-9, y - (y - fitted) / np.maximum(free, 1e-9), np.nan)


def predicted(x: Array, y: Array, strata: Strata | None = None) -> Predicted:
    """Judge how well `x` predicts `y`, both of shape (n,), over the sets that have both.

    With strata, which take all sets to have both, `rho` is within them.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    rho = spearman(x, y, strata) if len(x) >= LEAST else np.nan
    if np.isnan(rho):
        return Predicted(len(x))
    told = leave_one_out(x, y)
    others = (y.sum() - y) / (len(y) - 1)
    again = spearman(told, y)
    return Predicted(
        len(x), rho, None if np.isnan(again) else again, _root_mean_square(told - y),
        _root_mean_square(others - y),
    )  # fmt: skip


def _root_mean_square(values: Array) -> float | None:
    found = float(np.sqrt(np.square(values).mean()))
    return None if np.isnan(found) else found
