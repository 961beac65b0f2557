"""How noisy each quantity of a study is, for the planning of another (ours)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calmix.analysis.bootstrap import Joint
from calmix.analysis.cells import TOTAL, Cells
from calmix.analysis.statistics import Array


@dataclass(frozen=True)
class Noise:
    """Signal and noise of one quantity under one condition; retention units, 1.0 is 100 %.

    The mean of a set over k draws less that of another over m, on `items` items, has the standard
    error sqrt(draw**2 * (1 / k + 1 / m) + item**2). With n times the items `item` is divided by
    sqrt(n); `draw` hardly changes (it holds the chance of single items too).

    Attributes:
        condition: its label.
        quantity: `total`, or the name of the dimension or task.
        kind: which of these it is.
        sets: calibration sets of the condition, of any kind.
        draw: standard deviation of one draw on these very items, pooled over all sets with two
            draws or more; None where no set has two.
        freedom: degrees of freedom of `draw`; 0 where that is None.
        item: standard error by the items of the difference of two sets (items paired): median
            over all pairs of sets. What the draws do to single items is taken out of it: that
            part is in `draw`. None with one set.
        items: test items behind the quantity, tasks with signal only.
        signal: standard deviation between single sources, noise by draws and by items taken out
            of its square, at least 0; None where `draw` is, or with fewer than two sources.
        signal_all: the same between all sets.
    """

    condition: str
    quantity: str
    kind: Literal["total", "dimension", "task"]
    sets: int
    draw: float | None
    freedom: int
    item: float | None
    items: int
    signal: float | None
    signal_all: float | None

    @property
    def ratio(self) -> float | None:
        """Signal over the noise of one trial, sqrt(draw**2 + item**2 / 2); None without both."""
        if self.signal is None or self.draw is None or self.item is None:
            return None
        noise = math.sqrt(self.draw**2 + self.item**2 / 2)
        return self.signal / noise if noise else None


def noise_of(cells: Cells, found: Joint) -> list[Noise]:
    """Return the noise of the total, of every dimension and of every task with signal."""
    kinds: list[tuple[str, Literal["total", "dimension", "task"]]] = [
        (TOTAL, "total"), *((name, "dimension") for name in cells.dimensions),
        *((task.name, "task") for task in cells.tasks),
    ]  # fmt: skip
    sizes = np.array([task.items for task in cells.tasks])
    made = []
    for at, (name, kind) in enumerate(kinds):
        weight = cells.weights[at]
        if not weight.any():
            continue
        draw = math.sqrt(weight @ found.by_draws @ weight) if found.freedom else None
        square = np.tensordot(weight**2, found.by_items, 1)
        both = float(weight**2 @ found.both) / np.maximum(found.counts, 1)
        pairs = pair_variances(square, both)
        every = list(range(len(cells.sets)))
        apart = [pairs[one, two] for one, two in itertools.combinations(every, 2)]
        made.append(
            Noise(
                cells.condition.label, name, kind, len(every), draw, found.freedom,
                math.sqrt(float(np.median(apart))) if apart else None,
                int(sizes[weight > 0].sum()),
                _signal(cells.of("single"), found.values[:, at], found.counts, draw, pairs),
                _signal(every, found.values[:, at], found.counts, draw, pairs),
            )
        )  # fmt: skip
    return made


def pair_variances(by_items: Array, both: Array) -> Array:
    """Return the variance by items of every two sets' difference, at least 0, shape (sets, sets).

    Args:
        by_items: covariance of the sets, shape (sets, sets).
        both: of each set what is counted with its draws, shape (sets,).
    """
    own = np.diag(by_items) - both
    return np.maximum(0.0, own[:, None] + own[None] - 2 * by_items)


def _signal(
    sets: list[int], values: Array, counts: Array, draw: float | None, pairs: Array
) -> float | None:
    if draw is None or len(sets) < 2:
        return None
    by_items = pairs[np.ix_(sets, sets)].sum() / (len(sets) * (len(sets) - 1)) / 2
    by_draws = draw**2 * float(np.mean(1 / counts[sets]))
    return math.sqrt(max(0.0, float(values[sets].var(ddof=1)) - by_draws - by_items))
