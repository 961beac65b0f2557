"""How noisy each quantity of a study is, and which differences so many seeds and items detect.

A difference of two means of k seeds each has, of the seeds and of the items, the variance

    2 s^2 / k + v^2

s the standard deviation of one seed, pooled over sets, and v that of the paired difference over
other items; v^2 falls with the number of items. Two readings: on these items (v = 0), and for
other items too. *Detectable* is a difference whose two-sided 95 % interval by Student's t leaves
out 0 in 80 % of studies (noncentral t). The degrees of freedom are those of s, and Satterthwaite's
where items are part of the error. The s at hand is taken for the true one, and its freedom as
given: seeds still to come would add some (ours: the safe side).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from calmix.analysis.bootstrap import Joint, joints
from calmix.analysis.cells import TOTAL, select
from calmix.evaluation.measures import Z
from calmix.evaluation.retention import LEVEL
from calmix.options import Measure, Settings
from calmix.study.results import StudyResults

POWER = 0.80
Z_POWER = 0.8416212335729143  # normal quantile of it
MOST = 1_000_000  # seeds beyond which none are counted; freedom beyond which t is normal


@dataclass(frozen=True)
class Noise:
    """Signal and noise of one quantity under one condition; retention units, 1.0 is 100 %.

    The mean of a set over k seeds less that of another over m, on `items` items, has the standard
    error sqrt(draw**2 * (1 / k + 1 / m) + item**2). With n times the items `item` is divided by
    sqrt(n); `draw` hardly changes (it holds the chance of single items too).

    Attributes:
        draw: standard deviation of one seed on these very items, pooled over all sets with two
            seeds or more, with its degrees of `freedom`; None where no set has two.
        item: standard error by the items of the difference of two sets (items paired): median
            over all pairs, without what seeds do to single items. None with one set.
        items: test items behind the quantity, tasks with signal only.
        signal: standard deviation between single sources, noise taken out of its square, at least
            0; None where `draw` is, or with fewer than two sources.
        ratio: signal over the noise of one trial, sqrt(draw**2 + item**2 / 2).
    """

    condition: str
    quantity: str
    kind: str  # total, dimension or task
    sets: int
    draw: float | None
    freedom: int
    item: float | None
    items: int
    signal: float | None
    ratio: float | None


@dataclass(frozen=True)
class Needed:
    """What detects a difference, a share as retention is (0.01 is a point)."""

    difference: float
    draws: int  # seeds of each set, on these items
    draws_items: int | None  # for other items too; None where no number of seeds is enough
    items: float  # times the items at hand that are needed, with however many seeds


def noise_of(found: Joint) -> list[Noise]:
    """Return the noise of the total, of every dimension and of every task with signal."""
    cells, count, sets = found.cells, len(found.cells.sets), found.cells.of("single")
    names = [
        (TOTAL, "total"), *((name, "dimension") for name in cells.dimensions),
        *((task.name, "task") for task in cells.tasks),
    ]  # fmt: skip
    sizes = np.array([task.items for task in cells.tasks])
    made = []
    for (name, kind), weight, values in zip(names, cells.weights, found.values.T, strict=True):
        if not weight.any():
            continue
        draw = math.sqrt(weight @ found.by_draws @ weight) if found.freedom else None
        by_items = np.tensordot(weight**2, found.by_items, 1)
        own = np.diag(by_items) - float(weight**2 @ found.both) / np.maximum(found.counts, 1)
        pairs = np.maximum(0.0, own[:, None] + own[None] - 2 * by_items)
        apart = pairs[np.triu_indices(count, 1)]
        item = math.sqrt(float(np.median(apart))) if count > 1 else None
        signal = ratio = None
        if draw is not None and len(sets) > 1:  # the deviation between sets, without noise
            own_items = pairs[np.ix_(sets, sets)].sum() / (len(sets) * (len(sets) - 1)) / 2
            own_draws = draw**2 * float(np.mean(1 / found.counts[sets]))
            apart_by = float(values[sets].var(ddof=1)) - own_draws - own_items
            signal = math.sqrt(max(0.0, apart_by))
            noise = math.hypot(draw, (item or 0.0) / math.sqrt(2))
            ratio = signal / noise if noise else None
        made.append(Noise(cells.condition.label, name, kind, count, draw, found.freedom, item,
                          int(sizes[weight > 0].sum()), signal, ratio))  # fmt: skip
    return made


def detectable(draws: int, draw: float, freedom: float, item: float = 0.0) -> float:
    """Return the difference that so many seeds of each set detect in 80 % of studies."""
    drawn = draw * math.sqrt(2 / draws)
    error = math.hypot(drawn, item)
    if error == 0:
        return 0.0
    share = (drawn / error) ** 2  # of the variance
    return _noncentrality(freedom / share**2 if share > 0 else math.inf) * error


def _noncentrality(freedom: float) -> float:
    """Return how many standard errors are detected in 80 % of studies: 2.8 with much freedom."""
    if freedom >= MOST:
        return Z + Z_POWER
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    critical = float(t.ppf((1 + LEVEL) / 2, freedom))
    return float(brentq(lambda far: nct.sf(critical, freedom, far) - POWER, 0, 4 * critical))


def needed(difference: float, draw: float, freedom: float, item: float) -> Needed:
    """Return the seeds and items that detect a difference above 0; arguments as `detectable`."""
    on_these = 2 * (_noncentrality(freedom) * draw / difference) ** 2
    times = ((Z + Z_POWER) * item / difference) ** 2
    every = range(1, MOST if times < 1 else 1)
    at = bisect_left(every, True, key=lambda k: detectable(k, draw, freedom, item) <= difference)
    enough = every[at] if at < len(every) else None
    return Needed(difference, max(1, math.ceil(on_these * (1 - 1e-12))), enough, times)


def noises(
    results: StudyResults,
    *,
    method: str | None = None,
    sparsity: str | None = None,
    measure: Measure = "primary",
) -> list[Noise]:
    """Return the noise of every quantity under every condition of a study that calibrates."""
    trials = [t for t in select(results, method=method, sparsity=sparsity) if t.strategy != "none"]
    found = joints(results, trials, Settings(measure=measure, resamples=1))  # noise needs none
    return [one for each in found for one in noise_of(each)]
