"""Retention: the definitions, self-comparison, signal, and what the bootstrap must satisfy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calmix.capability.retention import (
    TaskScores,
    bootstrap,
    from_mapping,
    no_signal,
    retention,
    task_retention,
)
from calmix.errors import InputError
from tests.capability.helpers import accuracy, bits


def right(count: int, of: int, **fields: object) -> TaskScores:
    return accuracy([1.0] * count + [0.0] * (of - count), **fields)  # type: ignore[arg-type]


def test_accuracy_raw_and_corrected_for_chance() -> None:
    raw, corrected = task_retention(right(75, 100), right(50, 100))
    assert raw == pytest.approx(50 / 75)
    assert corrected == pytest.approx((0.50 - 0.25) / (0.75 - 0.25))


def test_below_chance_is_no_retention_and_above_dense_is_more_than_all() -> None:
    assert task_retention(right(75, 100), right(10, 100)) == pytest.approx((10 / 75, 0.0))
    assert task_retention(right(50, 100), right(75, 100))[1] == pytest.approx(2.0)


def test_bits_per_byte_is_dense_over_pruned() -> None:
    dense, pruned = bits([10.0, 30.0], [20, 20]), bits([20.0, 60.0], [20, 20])
    assert dense.score == pytest.approx(40 / math.log(2) / 40)
    assert task_retention(dense, pruned) == pytest.approx((0.5, 0.5))


def suite(seed: int) -> list[TaskScores]:
    rng = np.random.default_rng(seed)
    a = (rng.random(80) < 0.7).astype(float).tolist()
    b = (rng.random(50) < 0.3).astype(float).tolist()
    sizes = rng.integers(5, 50, 40)
    nats = (sizes * rng.uniform(0.3, 1.0, 40)).tolist()
    return [
        accuracy(a, "a", "general"),
        accuracy(b, "b", "general", chance=0.25),
        bits(nats, sizes.tolist(), "c", "code"),
    ]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_retention_against_itself_is_exactly_one(seed: int) -> None:
    scores = suite(seed)
    found = retention(scores, scores, resamples=200)
    for task in found.tasks:
        estimates = [task.raw, task.corrected] if task.signal else [task.raw]
        for estimate in estimates:
            assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
    for whole in (*found.dimensions, found):
        assert (whole.raw.value, whole.raw.low, whole.raw.high) == (1.0, 1.0, 1.0)
        assert (whole.corrected.value, whole.corrected.low, whole.corrected.high) == (1, 1, 1)


def test_a_task_at_chance_is_flagged_and_left_out_of_the_corrected_mean() -> None:
    dense = [right(80, 100, name="good"), right(27, 100, name="weak")]
    pruned = [right(60, 100, name="good"), right(27, 100, name="weak")]
    found = retention(dense, pruned, resamples=100)
    good, weak = found.tasks
    assert good.signal
    assert not weak.signal
    assert weak.corrected.value is None
    dimension = found.dimensions[0]
    assert dimension.without_signal == ("weak",)
    assert dimension.corrected.value == good.corrected.value
    assert dimension.raw.value == pytest.approx((0.75 + 1.0) / 2)
    assert list(no_signal(dense)) == ["weak"]


def test_a_dimension_without_any_signal_has_no_value_and_does_not_count() -> None:
    dense = [right(80, 100, name="a"), right(25, 100, name="b", dimension="code")]
    found = retention(dense, dense, resamples=50)
    assert found.dimensions[1].corrected.value is None
    assert found.corrected.value == 1.0
    assert found.worst == "general"
    silent = retention(dense[1:], dense[1:], resamples=50)
    assert silent.corrected.value is None
    assert silent.worst is None


def test_a_generation_task_the_dense_model_fails_throughout_has_no_signal() -> None:
    dense = right(0, 40, chance=0.0)
    found = retention([dense], [dense], resamples=50)
    assert not found.tasks[0].signal
    assert found.tasks[0].raw.value is None
    assert found.raw.value is None


def test_dimension_total_and_worst() -> None:
    dense = [right(80, 100, name="a"), right(80, 100, name="b", dimension="math")]
    pruned = [right(69, 100, name="a"), right(36, 100, name="b", dimension="math")]
    found = retention(dense, pruned, resamples=100)
    assert [d.corrected.value for d in found.dimensions] == pytest.approx([0.8, 0.2])
    assert found.corrected.value == pytest.approx(0.5)
    assert found.worst == "math"


def test_noise_is_half_a_confidence_interval() -> None:
    task = right(50, 100)
    assert task.noise == pytest.approx(1.96 * math.sqrt(0.25 / 99), rel=1e-3)
    text = bits([10.0] * 50, [20] * 50)
    assert text.noise == pytest.approx(0.0, abs=1e-9)


def test_the_bootstrap_is_seeded_and_paired() -> None:
    dense, pruned = suite(1)[0], accuracy([0.0, 1.0] * 40, "a")
    one = bootstrap(dense, pruned, resamples=300, seed=5)
    two = bootstrap(dense, pruned, resamples=300, seed=5)
    other = bootstrap(dense, pruned, resamples=300, seed=6)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])
    # Paired: where both models fail and succeed together, no resample can differ from 1.
    same = bootstrap(dense, dense, resamples=300, seed=5)[0]
    assert np.nanmin(same) == np.nanmax(same) == 1.0


def test_intervals_hold_the_value_and_shrink_with_items() -> None:
    widths = []
    for count in (40, 160, 640):
        rng = np.random.default_rng(0)
        dense = accuracy((rng.random(count) < 0.8).astype(float).tolist())
        pruned = accuracy((rng.random(count) < 0.6).astype(float).tolist())
        found = retention([dense], [pruned], resamples=1000).tasks[0].corrected
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[0] > 1.5 * widths[1] > 1.5 * widths[2]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered, trials = 0, 200
    rng = np.random.default_rng(3)
    for _ in range(trials):
        dense = rng.random(200) < 0.8
        pruned = dense & (rng.random(200) < 0.7)
        scores = [accuracy(x.astype(float).tolist(), chance=0.0) for x in (dense, pruned)]
        found = retention(scores[:1], scores[1:], resamples=300).tasks[0].raw
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.7 <= found.high
    assert 0.90 <= covered / trials <= 0.99


def test_a_tasks_interval_does_not_depend_on_its_neighbours() -> None:
    dense, pruned = suite(1), suite(2)
    sizes = dense[2].bytes
    pruned[2] = bits(pruned[2].values, sizes, "c", "code")
    whole = retention(dense, pruned, resamples=100)
    alone = retention(dense[:1], pruned[:1], resamples=100)
    assert whole.tasks[0] == alone.tasks[0]


def test_other_tasks_or_items_are_refused() -> None:
    with pytest.raises(InputError, match="different tasks"):
        retention([right(5, 10, name="a")], [right(5, 10, name="b")])
    with pytest.raises(InputError, match=r"different items of task quiz \(10 and 20\)"):
        retention([right(5, 10)], [right(5, 20)])


def test_scores_survive_json() -> None:
    import dataclasses
    import json

    for task in suite(0):
        assert from_mapping(json.loads(json.dumps(dataclasses.asdict(task)))) == task
