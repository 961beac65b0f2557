"""Distance to the dense model in a study: means over draws, and whether KL orders the sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calmix.analysis import Settings, analyse
from calmix.analysis.analyse import ConditionAnalysis
from calmix.evaluation.distance import flips
from calmix.study.results import StudyResults
from tests.synthetic import Plan, study

QUICK = Settings(permutations=199, resamples=50)


def changed(results: StudyResults, number: int, **distance: Any) -> StudyResults:
    """Return results with another distance of one trial."""
    trials = list(results.trials)
    kept = trials[number].distance or {}
    trials[number] = trials[number].model_copy(update={"distance": {**kept, **distance}})
    return results.model_copy(update={"trials": tuple(trials)})


def of(results: StudyResults) -> ConditionAnalysis:
    return analyse(results, QUICK).conditions[0]


def test_draws_are_averaged_in_total_and_by_dimension() -> None:
    results = study(Plan(sources=("a", "b"), seeds=(0, 1)))
    own = [one.distance for one in results.trials if one.calibration == "a" and one.distance]
    told = next(one for one in of(results).ranking if one.calibration == "a").distance
    assert told["kl"]["total"] == pytest.approx(np.mean([one["total"]["kl_mean"] for one in own]))
    code = [one["dimensions"]["code"]["top1"] for one in own]
    assert told["top1"]["code"] == pytest.approx(np.mean(code))


def test_flips_are_those_of_two_models_compared() -> None:
    results = study(Plan(sources=("a", "b"), seeds=(0,)))
    rng = np.random.default_rng(0)

    def judged(tasks: Any) -> Any:
        return tuple(
            replace(task, values=tuple((rng.random(len(task.items)) < 0.6).astype(float).tolist()))
            if task.values else task for task in tasks
        )  # fmt: skip

    results = results.model_copy(update={
        "dense": {name: judged(tasks) for name, tasks in results.dense.items()},
        "scores": {name: judged(tasks) for name, tasks in results.scores.items()},
    })  # fmt: skip
    [dense] = results.dense.values()
    for one in of(results).ranking:
        [trial] = [each for each in results.trials if each.calibration == one.calibration]
        expected = flips(dense, results.scores[trial.id], resamples=1)
        assert expected.total is not None
        told = one.distance["flips"]
        assert told["total"] == pytest.approx(expected.total.share.value)
        assert told["math"] == pytest.approx(expected.dimensions["math"].share.value)
        assert 0.2 < expected.total.share.value < 0.8


def test_kl_that_orders_as_retention_does_is_said_to() -> None:
    results = study(Plan(seeds=(0, 1)))
    found = {one.quantity: one for one in of(results).agreements}
    assert list(found) == ["total", "general", "commonsense", "code", "math"]
    assert found["total"].n == 16
    assert found["total"].rho == pytest.approx(-1)
    assert found["total"].agrees
    for number, trial in enumerate(results.trials):
        total = {"kl_mean": trial.total.value, "top1": 0.5}
        results = changed(results, number, total=total)
    found = {one.quantity: one for one in of(results).agreements}
    assert found["total"].rho == pytest.approx(1)
    assert not found["total"].agrees
    assert found["code"].rho == pytest.approx(-1)


def test_what_was_not_measured_or_on_other_texts_is_not_told() -> None:
    results = study(Plan(seeds=(0,)))
    gone = results.trials[0].model_copy(update={"distance": None})
    part = of(results.model_copy(update={"trials": (gone, *results.trials[1:])}))
    lost = next(one for one in part.ranking if one.calibration == gone.calibration)
    assert lost.distance["kl"] == dict.fromkeys(lost.distance["kl"])
    assert lost.distance["flips"]["total"] is not None
    assert part.agreements[0].n == 15
    mixed = of(changed(results, 3, texts="other"))
    assert not mixed.agreements
    assert all(one.distance["kl"]["total"] is None for one in mixed.ranking)
    assert not of(study(Plan(sources=("a", "b", "c")))).agreements
