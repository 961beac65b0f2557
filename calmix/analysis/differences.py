"""Differences between ways to calibrate, their leads over a default, and both against sparsity.

Every one is a contrast of the joint bootstrap: items are the same for both sides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calmix.analysis.bootstrap import Estimate, Joint, Sample
from calmix.analysis.cells import APART, TOTAL, WORST, Cells
from calmix.analysis.ranking import groups_of, in_order, lowest_of, shrink, without
from calmix.analysis.statistics import ALPHA, Array, benjamini_hochberg

SINGLES = "mean of the single sources"
BEST = "best single source, "


@dataclass(frozen=True)
class Difference:
    """How much more one way to calibrate keeps than another.

    Attributes:
        left, right: a calibration set, the best single source, or the mean of them.
        quantity: `total`, `worst` (each side's own worst dimension), a dimension, or `apart`: the
            total without the tasks whose benchmark a source of either side holds the other half
            of, where there are such.
        removed: the sources that the left set has and the right set lacks, the others being in
            one proportion in both: the gap is what they contribute. Empty for other pairs.
        gap: left - right.
        p_corrected, draw_p_corrected: its two p after Benjamini-Hochberg, each over all
            differences of the analysis; those of `apart` are a family of their own.
    """

    condition: str
    left: str
    right: str
    quantity: str
    gap: Estimate
    removed: tuple[str, ...] = ()
    p_corrected: float | None = None
    draw_p_corrected: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it survives correction at 0.05, for other items and other draws."""
        return self.p_corrected is not None and self.p_corrected <= ALPHA


@dataclass(frozen=True)
class Contender:
    """One way to calibrate: a set, or several whose mean counts.

    Attributes:
        made: how.
        sets: their positions.
        picked: whether the one set was chosen by its numbers, which lie too high for that: it
            counts by its shrunken ones.
        worst: position of its worst dimension among the quantities, by its own numbers; None
            without a value.
    """

    name: str
    made: str
    sets: tuple[int, ...]
    picked: bool
    worst: int | None

    def weigh(self, cells: Cells, found: Joint, weight: Array) -> tuple[float, Array]:
        """Return a weighted quantity, nan where unknown, and each set's coefficient in it.

        Args:
            weight: of the quantities of `found`.
        """
        if self.picked:
            shrunken = shrink(found, groups_of(cells), weight)
            return float(shrunken.values[self.sets[0]]), shrunken.coefficients[self.sets[0]]
        sets, used = list(self.sets), weight != 0
        own = np.zeros(len(cells.sets))
        own[sets] = 1 / len(sets)
        return float((found.values[sets][:, used] @ weight[used]).mean()), own


Weigh = Callable[[Contender, Array], tuple[float, Array]]


def contender(
    cells: Cells, found: Joint, name: str, made: str, sets: Sequence[int], *, picked: bool = False
) -> Contender:
    """Return the mean of some sets, or a picked one, as a contender."""
    low = lowest_of(found.values[list(sets), 1 : len(cells.quantities)].mean(0))
    return Contender(name, made, tuple(sets), picked, None if low is None else 1 + low)


def contenders(cells: Cells, found: Joint) -> list[Contender]:
    """Return what is compared: every set that is not a single source, the single source with the
    highest total, and the mean of all single sources."""
    made = [
        contender(cells, found, name, cells.strategies[at], [at])
        for at, name in enumerate(cells.sets)
        if cells.strategies[at] != "single"
    ]
    singles = cells.of("single")
    for best in [at for at in in_order(found.values[:, 0]) if at in singles][:1]:
        name = BEST + cells.sets[best]
        made.append(contender(cells, found, name, "single", [best], picked=True))
    if len(singles) > 1:
        made.append(contender(cells, found, SINGLES, "single", singles))
    return made


def between(
    weigh: Weigh, left: Contender, right: Contender, weights: Mapping[str, Array], quantity: str
) -> tuple[float, Array] | None:
    """Return left - right and its coefficients; None where either has no value.

    Args:
        weights: of every quantity by name, in the order of `Joint`; `worst` is each side's own.
    """
    value, coefficients = 0.0, np.zeros(())
    for one, sign in ((left, 1), (right, -1)):
        if quantity == WORST:
            if one.worst is None:
                return None
            weight = list(weights.values())[one.worst]
        else:
            weight = weights[quantity]
        own, sets = weigh(one, weight)
        value += sign * own
        coefficients = coefficients + sign * np.outer(sets, weight)
    return None if math.isnan(value) else (value, coefficients)


def compare(cells: Cells, found: Joint) -> list[Difference]:
    """Return every pair of contenders, for total, worst, each dimension and `apart`."""
    made = []
    weigh, weights = _weigher(cells, found), _weights(cells, found)
    mixes = dict(zip(cells.sets, cells.mixes, strict=True))
    for left, right in itertools.combinations(contenders(cells, found), 2):
        if left.made == right.made == "single":
            continue  # the best of them against the mean of them says nothing
        removed = _removed(mixes.get(left.name, {}), mixes.get(right.name, {}))
        halves = {name for at in (*left.sets, *right.sets) for name in cells.halves[at]}
        rest = without(cells, found, halves).get(TOTAL)
        asked = weights if rest is None or not rest.any() else {**weights, APART: rest}
        for quantity in _ordered(asked):
            gap = between(weigh, left, right, asked, quantity)
            if gap is not None:
                told = found.estimate(gap[1], gap[0], test=True)
                made.append(
                    Difference(
                        cells.condition.label, left.name, right.name, quantity, told, removed
                    )
                )
    return made


def _weigher(cells: Cells, found: Joint) -> Weigh:
    """Return `Contender.weigh`, which does nothing twice."""
    known: dict[tuple[str, bytes], tuple[float, Array]] = {}

    def weigh(one: Contender, weight: Array) -> tuple[float, Array]:
        key = one.name, weight.tobytes()
        if key not in known:
            known[key] = one.weigh(cells, found, weight)
        return known[key]

    return weigh


def _weights(cells: Cells, found: Joint) -> dict[str, Array]:
    """Return the weights of the total and of the dimensions, in the order of `found`."""
    return {name: found.alone(at) for at, name in enumerate((TOTAL, *cells.dimensions))}


def _removed(more: Mapping[str, float], less: Mapping[str, float]) -> tuple[str, ...]:
    """Return the sources whose removal makes one mix the other; () if none does."""
    if not less or not less.keys() < more.keys():
        return ()
    kept = sum(more[name] for name in less)
    same = all(math.isclose(more[name] / kept, share, rel_tol=1e-6) for name, share in less.items())
    return tuple(name for name in more if name not in less) if same else ()


def _ordered(weights: Mapping[str, Array]) -> list[str]:
    total, *rest = weights
    return [total, WORST, *rest]


def corrected_differences(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with each p corrected over all of its family that have one."""
    made = list(differences)
    for apart in (False, True):
        family = [at for at, one in enumerate(made) if (one.quantity == APART) == apart]
        joint = _corrected([made[at].gap.p for at in family])
        draws = _corrected([made[at].gap.draw_p for at in family])
        for at, p, draw_p in zip(family, joint, draws, strict=True):
            made[at] = replace(made[at], p_corrected=p, draw_p_corrected=draw_p)
    return made


def _corrected(values: Sequence[float | None]) -> list[float | None]:
    known = iter(benjamini_hochberg([value for value in values if value is not None]))
    return [None if value is None else next(known) for value in values]


@dataclass(frozen=True)
class Margin:
    """How far a set is ahead of the default, a set's name or the mean of the single sources, at
    one sparsity."""

    condition: str
    method: str
    sparsity: float
    calibration: str
    default: str
    quantity: str
    gap: Estimate


@dataclass(frozen=True)
class Growth:
    """How much the margin over the default grows from the lowest to the highest sparsity.

    Items are paired, and so are draws that both sparsities have. `series` names what the
    conditions have in common.
    """

    series: str
    calibration: str
    default: str
    quantity: str
    sparsities: tuple[float, ...]
    gap: Estimate


def margins(
    series: Sequence[tuple[Cells, Joint]], default: str | None
) -> tuple[list[Margin], list[Growth]]:
    """Return margins over the default for every set that is not a single source.

    Args:
        series: conditions that differ in sparsity alone, lowest first.
        default: a calibration set; None is the mean of the single sources that there are at
            every sparsity, so that a lead does not grow by other sources.
    """
    made: list[Margin] = []
    samples: dict[tuple[str, str], list[tuple[Margin, Sample]]] = {}
    named = defaults([cells for cells, _ in series], default)
    for cells, found in series:
        for margin, sample in leads(cells, found, default, named):
            made.append(margin)
            samples.setdefault((margin.calibration, margin.quantity), []).append((margin, sample))
    grown = []
    for (name, quantity), told in samples.items():
        if len(told) > 1 and (gap := rise(told[0], told[-1])):
            shares = tuple(margin.sparsity for margin, _ in told)
            common = series[0][0].condition.series
            grown.append(Growth(common, name, told[0][0].default, quantity, shares, gap))
    return made, grown


def rise(less: tuple[Margin, Sample], more: tuple[Margin, Sample]) -> Estimate | None:
    """Return how much more one margin is than another; None where either is unknown."""
    (first, low), (last, high) = less, more
    if first.gap.value is None or last.gap.value is None:
        return None
    draws = min(first.gap.draws, last.gap.draws)
    return (high - low).estimate(last.gap.value - first.gap.value, draws)


def defaults(conditions: Sequence[Cells], default: str | None) -> set[str]:
    """Return what the default is under several conditions: itself, or the single sources that
    all of those have that have any."""
    singles = [{cells.sets[at] for at in cells.of("single")} for cells in conditions]
    there = [names for names in singles if names] if default is None else [{default}]
    return set.intersection(*there) if there else set()


def leads(
    cells: Cells, found: Joint, default: str | None, named: set[str]
) -> Iterator[tuple[Margin, Sample]]:
    """Yield the margins of one condition over the mean of some sets, with their resamples.

    Args:
        default: the default's name; None for single sources.
        named: what it is (`defaults`).
    """
    against = [at for at, name in enumerate(cells.sets) if name in named]
    if not against:
        return
    weigh, weights = _weigher(cells, found), _weights(cells, found)
    right = contender(cells, found, default or SINGLES, "default", against)
    for at, name in enumerate(cells.sets):
        if cells.strategies[at] == "single" or at in against:
            continue
        left = contender(cells, found, name, cells.strategies[at], [at])
        for quantity in _ordered(weights):
            gap = between(weigh, left, right, weights, quantity)
            if gap is not None:
                margin = Margin(
                    cells.condition.label, cells.condition.method, cells.condition.sparsity,
                    name, right.name, quantity, found.estimate(gap[1], gap[0], test=True),
                )  # fmt: skip
                yield margin, found.sample(gap[1])
