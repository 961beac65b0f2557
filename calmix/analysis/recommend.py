"""Which calibration set to take, for weights a user gives the dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calmix.analysis.cells import Cells, Measure, dimensions_of, select, tables
from calmix.analysis.estimates import Estimate, Lead, estimate
from calmix.errors import InputError, nearest
from calmix.study.results import StudyResults


@dataclass(frozen=True)
class Candidate:
    """A calibration set with its expected weighted retention."""

    calibration: str
    strategy: str
    retention: Estimate


@dataclass(frozen=True)
class Recommendation:
    """The best calibration set under one condition.

    Attributes:
        weights: of the dimensions, scaled to sum to 1.
        candidates: best first.
        lead: of the first over the second; None with one candidate.
        left_out: sets without retention in a dimension that has weight.
    """

    condition: str
    weights: dict[str, float]
    candidates: tuple[Candidate, ...]
    lead: Lead | None
    left_out: tuple[str, ...]


def check_weights(weights: Mapping[str, float], dimensions: tuple[str, ...]) -> dict[str, float]:
    """Return weights for every dimension, scaled to sum to 1.

    Raises:
        InputError: an unknown dimension, a negative or infinite weight, all of them 0.
    """
    for name, weight in weights.items():
        if name not in dimensions:
            raise InputError(f"the study has no dimension '{name}': {nearest(name, dimensions)}")
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
    measure: Measure = "corrected",
    method: str | None = None,
    sparsity: str | None = None,
) -> list[Recommendation]:
    """Return for each condition the calibration set with the best expected weighted retention.

    Args:
        weights: by dimension; those not named count 0. None weighs all that have a retention
            anywhere the same.
        method, sparsity: consider only these.

    Raises:
        InputError: bad weights, no finished trials, no such method or sparsity.
    """
    trials = select(results, method=method, sparsity=sparsity)
    dimensions = dimensions_of(results)
    made = tables(results, trials, measure)
    if not weights:
        known = [any(not np.isnan(cells.means[:, at + 1]).all() for cells in made)
                 for at in range(len(dimensions))]  # fmt: skip
        weights = {
            name: 1.0 for name, has in zip(dimensions, known, strict=True) if has or not any(known)
        }
    share = check_weights(weights, dimensions)
    return [_recommend(cells, share) for cells in made]


def _recommend(cells: Cells, share: Mapping[str, float]) -> Recommendation:
    used = [at for at, name in enumerate(cells.dimensions, start=1) if share[name] > 0]
    weight = np.array([share[cells.quantities[at]] for at in used])
    # A draw's dimensions move together, so seeds are compared on the weighted sum; the items of
    # two dimensions are different ones, so their errors add in quadrature.
    found = estimate(
        cells.values[:, :, used] @ weight,
        np.sqrt(cells.below[:, :, used] ** 2 @ weight**2),
        np.sqrt(cells.above[:, :, used] ** 2 @ weight**2),
    )
    known = [at for at, one in enumerate(found.sets) if one.value is not None]
    order = sorted(known, key=lambda at: -(found.sets[at].value or 0.0))
    return Recommendation(
        cells.condition.label,
        dict(share),
        tuple(Candidate(cells.sets[at], cells.strategies[at], found.sets[at]) for at in order),
        found.lead(order[0], order[1]) if len(order) > 1 else None,
        tuple(name for at, name in enumerate(cells.sets) if at not in known),
    )
