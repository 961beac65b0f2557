"""Which calibration set to take, for weights a user gives the dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calmix.analysis.bootstrap import Estimate, joint
from calmix.analysis.cells import Cells, dimensions_of, select, tables
from calmix.analysis.ranking import chances, groups_of, shrink
from calmix.analysis.statistics import RESAMPLES
from calmix.capability.measures import Measure
from calmix.errors import InputError, nearest
from calmix.study.results import StudyResults


@dataclass(frozen=True)
class Candidate:
    """A calibration set with its weighted retention, as measured and as expected of it.

    Attributes:
        shrunken: drawn towards the mean of its group (`ranking.shrink`).
        best: probability of being the best.
    """

    calibration: str
    strategy: str
    retention: Estimate
    shrunken: Estimate
    best: float | None


@dataclass(frozen=True)
class Recommendation:
    """The best calibration set under one condition.

    Attributes:
        weights: of the dimensions, scaled to sum to 1.
        candidates: best shrunken retention first; empty where a dimension that has weight has
            no task with signal.
        lead: of the first over the second, shrunken both; None with one candidate.
    """

    condition: str
    weights: dict[str, float]
    candidates: tuple[Candidate, ...]
    lead: Estimate | None


def check_weights(
    weights: Mapping[str, float], dimensions: tuple[str, ...], where: str = "the study"
) -> dict[str, float]:
    """Return weights for every dimension, scaled to sum to 1; `where` has the dimensions.

    Raises:
        InputError: an unknown dimension, a negative or infinite weight, all of them 0.
    """
    for name, weight in weights.items():
        if name not in dimensions:
            raise InputError(f"{where} has no dimension '{name}': {nearest(name, dimensions)}")
        if not math.isfinite(weight) or weight < 0:
            raise InputError(f"the weight of {name} must be a number from 0 up, not {weight:g}")
    total = math.fsum(weights.values())
    if total == 0:
        raise InputError("all weights are 0: give at least one dimension a weight")
    return {name: weights.get(name, 0.0) / total for name in dimensions}


def recommend(
    results: StudyResults,
    weights: Mapping[str, float] | None = None,
    *,
    measure: Measure = "primary",
    resamples: int = RESAMPLES,
    seed: int = 0,
    method: str | None = None,
    sparsity: str | None = None,
) -> list[Recommendation]:
    """Return for each condition the calibration set with the best expected weighted retention.

    Args:
        weights: by dimension; those not named count 0. None weighs all that have a retention
            anywhere the same.
        resamples, seed: of the joint bootstrap.
        method, sparsity: consider only these.

    Raises:
        InputError: bad weights, no finished trials, no such method or sparsity.
    """
    made, share = _weighted(results, weights, measure, method, sparsity)
    return [_recommend(cells, share, resamples, seed) for cells in made]


def _weighted(
    results: StudyResults,
    weights: Mapping[str, float] | None,
    measure: Measure,
    method: str | None,
    sparsity: str | None,
) -> tuple[list[Cells], dict[str, float]]:
    """Return the conditions asked for, and a weight for every dimension."""
    trials = select(results, method=method, sparsity=sparsity)
    dimensions = dimensions_of(results)
    made = tables(results, trials, measure)
    if not weights:
        known = [any(not np.isnan(cells.means[:, at + 1]).all() for cells in made)
                 for at in range(len(dimensions))]  # fmt: skip
        weights = {
            name: 1.0 for name, has in zip(dimensions, known, strict=True) if has or not any(known)
        }
    return made, check_weights(weights, dimensions)


def _recommend(
    cells: Cells, share: Mapping[str, float], resamples: int, seed: int
) -> Recommendation:
    found = joint(cells, resamples=resamples, seed=seed)
    weight = np.zeros(found.values.shape[1])
    weight[1 : len(cells.quantities)] = [share[name] for name in cells.dimensions]
    expected = shrink(found, groups_of(cells), weight)
    best = chances(found, weight, expected)
    order = [at for at in np.argsort(-expected.values, kind="stable")
             if not np.isnan(expected.values[at])]  # fmt: skip
    unit = np.eye(len(cells.sets))
    candidates = tuple(
        Candidate(
            cells.sets[at], cells.strategies[at], found.estimate(np.outer(unit[at], weight)),
            found.estimate(np.outer(expected.coefficients[at], weight), float(expected.values[at])),
            best[at],
        )
        for at in order
    )  # fmt: skip
    lead = None
    if len(order) > 1:
        first, second = order[:2]
        gap = expected.coefficients[first] - expected.coefficients[second]
        value = float(expected.values[first] - expected.values[second])
        lead = found.estimate(np.outer(gap, weight), value, test=True)
    return Recommendation(cells.condition.label, dict(share), candidates, lead)
