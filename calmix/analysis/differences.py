"""Differences between ways to calibrate, their leads over a default, and both against sparsity.

Every one is a contrast of the joint bootstrap: items are the same for both sides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calmix.analysis.bootstrap import Estimate, Joint, Sample
from calmix.analysis.cells import TOTAL, WORST, Cells
from calmix.analysis.ranking import groups_of, lowest_of, shrink
from calmix.analysis.statistics import ALPHA, Array, benjamini_hochberg

SINGLES = "mean of the single sources"
BEST = "best single source, "


@dataclass(frozen=True)
class Difference:
    """How much more one way to calibrate keeps than another.

    Attributes:
        left, right: a calibration set, the best single source, or the mean of them.
        quantity: `total`, `worst` (each side's own worst dimension) or a dimension.
        removed: the sources that the left set has and the right set lacks, the others being in
            one proportion in both: the gap is what they contribute. Empty for other pairs.
        gap: left - right.
        p_corrected, draw_p_corrected: its two p after Benjamini-Hochberg, each over all
            differences of the analysis.
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
        values: total and dimensions, shape (quantities,).
        coefficients: of the sets in each, shape (sets, quantities).
        worst: position of its worst dimension among the quantities; None without a value.
    """

    name: str
    made: str
    values: Array
    coefficients: Array
    worst: int | None

    def place(self, number: int, quantity: str) -> int | None:
        """Return the position of a quantity, `worst` being the contender's own."""
        return self.worst if quantity == WORST else number


def mean_of(cells: Cells, found: Joint, name: str, made: str, sets: Sequence[int]) -> Contender:
    """Return the mean of some sets as one contender."""
    width = len(cells.quantities)
    values = found.values[list(sets), :width].mean(0)
    coefficients = np.zeros((len(cells.sets), width))
    coefficients[list(sets)] = 1 / len(sets)
    low = lowest_of(values[1:])
    return Contender(name, made, values, coefficients, None if low is None else 1 + low)


def contenders(cells: Cells, found: Joint) -> list[Contender]:
    """Return what is compared: every set that is not a single source, the single source with the
    highest total, and the mean of all single sources.

    That best source was picked by its numbers, which lie too high for that; it is compared by its
    shrunken ones.
    """
    made = [
        mean_of(cells, found, name, cells.strategies[at], [at])
        for at, name in enumerate(cells.sets)
        if cells.strategies[at] != "single"
    ]
    singles = cells.of("single")
    totals = found.values[singles, 0]
    if len(singles) and not np.isnan(totals).all():
        best = singles[int(np.nanargmax(totals))]
        raw = mean_of(cells, found, BEST + cells.sets[best], "single", [best])
        values, coefficients = raw.values.copy(), raw.coefficients.copy()
        for number in range(len(values)):
            weight = np.zeros(found.values.shape[1])
            weight[number] = 1.0
            if not np.isnan(values[number]):
                shrunken = shrink(found, groups_of(cells), weight)
                values[number] = shrunken.values[best]
                coefficients[:, number] = shrunken.coefficients[best]
        made.append(replace(raw, values=values, coefficients=coefficients))
    if len(singles) > 1:
        made.append(mean_of(cells, found, SINGLES, "single", singles))
    return made


def between(
    found: Joint, left: Contender, right: Contender, number: int, quantity: str
) -> tuple[float, Array] | None:
    """Return left - right and its coefficients; None where either has no value."""
    at, against = left.place(number, quantity), right.place(number, quantity)
    if at is None or against is None:
        return None
    value = float(left.values[at] - right.values[against])
    if np.isnan(value):
        return None
    coefficients = np.zeros(found.values.shape)
    coefficients[:, at] += left.coefficients[:, at]
    coefficients[:, against] -= right.coefficients[:, against]
    return value, coefficients


def compare(cells: Cells, found: Joint) -> list[Difference]:
    """Return every pair of contenders, for total, worst and each dimension."""
    made = []
    mixes = dict(zip(cells.sets, cells.mixes, strict=True))
    for left, right in itertools.combinations(contenders(cells, found), 2):
        if left.made == right.made == "single":
            continue  # the best of them against the mean of them says nothing
        removed = _removed(mixes.get(left.name, {}), mixes.get(right.name, {}))
        for number, quantity in _asked(cells):
            gap = between(found, left, right, number, quantity)
            if gap is not None:
                told = found.estimate(gap[1], gap[0], test=True)
                made.append(
                    Difference(
                        cells.condition.label, left.name, right.name, quantity, told, removed
                    )
                )
    return made


def _removed(more: Mapping[str, float], less: Mapping[str, float]) -> tuple[str, ...]:
    """Return the sources whose removal makes one mix the other; () if none does."""
    if not less or not less.keys() < more.keys():
        return ()
    kept = sum(more[name] for name in less)
    same = all(math.isclose(more[name] / kept, share, rel_tol=1e-6) for name, share in less.items())
    return tuple(name for name in more if name not in less) if same else ()


def _asked(cells: Cells) -> list[tuple[int, str]]:
    return [(0, TOTAL), (0, WORST), *enumerate(cells.dimensions, start=1)]


def corrected_differences(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with each p corrected over all that have one."""
    joint = iter(benjamini_hochberg([d.gap.p for d in differences if d.gap.p is not None]))
    draws = iter(
        benjamini_hochberg([d.gap.draw_p for d in differences if d.gap.draw_p is not None])
    )
    return [
        replace(
            one,
            p_corrected=None if one.gap.p is None else next(joint),
            draw_p_corrected=None if one.gap.draw_p is None else next(draws),
        )
        for one in differences
    ]


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
    singles = [{cells.sets[at] for at in cells.of("single")} for cells, _ in series]
    there = [names for names in singles if names] if default is None else [{default}]
    named = set.intersection(*there) if there else set()
    for cells, found in series:
        against = [at for at, name in enumerate(cells.sets) if name in named]
        if not against:
            continue
        right = mean_of(cells, found, default or SINGLES, "default", against)
        for at, name in enumerate(cells.sets):
            if cells.strategies[at] == "single" or at in against:
                continue
            left = mean_of(cells, found, name, cells.strategies[at], [at])
            for number, quantity in _asked(cells):
                gap = between(found, left, right, number, quantity)
                if gap is None:
                    continue
                margin = Margin(
                    cells.condition.label, cells.condition.method, cells.condition.sparsity,
                    name, right.name, quantity, found.estimate(gap[1], gap[0], test=True),
                )  # fmt: skip
                made.append(margin)
                own = samples.setdefault((name, quantity), [])
                own.append((margin, found.sample(gap[1])))
    grown = []
    for (name, quantity), told in samples.items():
        (first, low), (last, high) = told[0], told[-1]
        if len(told) > 1 and first.gap.value is not None and last.gap.value is not None:
            draws = min(first.gap.draws, last.gap.draws)
            rise = (high - low).estimate(last.gap.value - first.gap.value, draws)
            shares = tuple(margin.sparsity for margin, _ in told)
            common = series[0][0].condition.series
            grown.append(Growth(common, name, first.default, quantity, shares, rise))
    return made, grown
