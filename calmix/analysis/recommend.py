"""Which calibration set to take, for weights a user gives the dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calmix.analysis.bootstrap import joints
from calmix.analysis.cells import dimensions_of, select, tables
from calmix.analysis.ranking import Ranked, leaders, rank
from calmix.analysis.statistics import RESAMPLES
from calmix.errors import InputError, nearest
from calmix.options import Measure
from calmix.study.results import StudyResults


@dataclass(frozen=True)
class Recommendation:
    """The best calibration set under one condition.

    Attributes:
        weights: of the dimensions, scaled to sum to 1.
        candidates: the highest measured retention first; empty where a dimension that has weight
            has no task with signal.
        best: names of the first and of those tied with it.
    """

    condition: str
    weights: dict[str, float]
    candidates: tuple[Ranked, ...]
    best: tuple[str, ...]


def check_weights(
    weights: Mapping[str, float], dimensions: tuple[str, ...], where: str = "the study"
) -> dict[str, float]:
    """Return weights for every dimension, scaled to sum to 1; `where` has the dimensions."""
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
    """Return for each condition the sets by weighted retention, and which are best.

    Without weights all dimensions with signal count alike.
    """
    made = tables(results, select(results, method=method, sparsity=sparsity), measure)
    asked = check_weights(weights, dimensions_of(results)) if weights else None
    advice = []
    for found in joints(results, made, resamples, seed):
        cells, weight = found.cells, None
        known = ~np.isnan(cells.means[:, 1 : len(cells.quantities)]).all(0)
        share = known / max(1, known.sum())
        if asked is not None:
            share = np.array([asked[name] for name in cells.dimensions])
            weight = np.concatenate([[0], share, np.zeros(len(cells.tasks))])
        ranked = [one for one in rank(found, weight) if one.total.value is not None]
        advice.append(
            Recommendation(
                cells.condition.label, dict(zip(cells.dimensions, share.tolist(), strict=True)),
                tuple(ranked), tuple(one.calibration for one in leaders(ranked)),
            )
        )  # fmt: skip
    return advice
