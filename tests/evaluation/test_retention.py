"""Retention: the definitions, self-comparison, signal, and what the bootstrap must satisfy."""

import hashlib
import math

import numpy as np
import pytest

from calmix.errors import InputError
from calmix.evaluation.measures import mean_score, noise, parts
from calmix.evaluation.retention import (
    Estimate,
    TaskRetention,
    estimate,
    flips,
    item_weights,
    mean_point,
    resampled,
    retention,
)
from tests.evaluation.helpers import accuracy, bits, choices


def right(count, of, **fields):
    return accuracy([1.0] * count + [0.0] * (of - count), **fields)


def test_tasks_and_dimensions_without_signal_do_not_count():
    dense = [
        right(80, 100, name="good"), right(27, 100, name="weak"),
        right(0, 40, name="written", dimension="code", chance=0.0),
    ]  # fmt: skip
    found = retention(dense, [right(60, 100, name="good"), *dense[1:]], resamples=100)
    assert [task.signal for task in found.tasks] == [True, False, False]
    assert [task.kept.value is None for task in found.tasks] == [False, True, True]
    general, code = found.dimensions
    assert (general.tasks, general.without_signal, code.kept.value) == (2, ("weak",), None)
    # Its resamples count no more than its value.
    assert found.total == general.kept == found.tasks[0].kept
    assert found.worst == "general"
    silent = retention(dense[1:], dense[1:], resamples=50)
    assert (silent.total.value, silent.worst) == (None, None)


def test_other_tasks_or_items_are_refused():
    a, b, c = (right(5, 10, name=name) for name in "abc")
    for dense, pruned, first in (([a], [b], "a"), ([c, b], [c], "b"), ([a, b], [b, a], "b")):
        with pytest.raises(InputError, match=rf"different tasks \(first: {first}\)$"):
            retention(dense, pruned)
    for act in (retention, flips):
        with pytest.raises(InputError, match=r"different items of task quiz \(10 and 20\)"):
            act([right(5, 10)], [right(5, 20)])


@pytest.mark.parametrize(
    ("measure", "floors"),
    [
        ("primary", (0.25, 0.25, 3 / math.log(2))),
        ("accuracy", (0.25, 0.25)),  # bits have none
        ("ratio", (None, None, None)),
    ],
)
def test_all_that_is_told_of_tasks_and_dimensions(measure, floors):
    rng = np.random.default_rng(0)
    nats, sizes = rng.uniform(2, 6, 40), rng.integers(9, 20, 40)
    dense, pruned = (
        [right(count, 80, name="a"), right(count, 50, name="b"), bits(own, sizes, "c", "code")]
        for count, own in ((40, nats), (30, 1.3 * nats))
    )
    found = retention(dense, pruned, measure=measure, resamples=50)
    points, whole = [], []
    for one, two, floor, told in zip(dense, pruned, floors, found.tasks, strict=False):
        made = parts(one, two, measure)
        points.append((made.retention, resampled(one.name, made, resamples=50, seed=0)))
        whole.append(made.whole.sum())
        assert told == TaskRetention(
            one.name, one.dimension, made.score, len(one.items),
            None if floor is None else pytest.approx(floor),
            mean_score(one, made.score), mean_score(two, made.score),
            one.accuracy, two.accuracy, noise(made.whole), True, estimate(*points[-1]),
        )  # fmt: skip
    shares = [1.0, 1.0] if measure == "ratio" else whole[:2]  # items are pooled but for the paper's
    value, draws = (np.average(some, axis=0, weights=shares)
                    for some in zip(*points[:2], strict=True))  # fmt: skip
    rolled = [(value, draws), *points[2:]]
    assert len(found.tasks) == len(points) == len(floors)
    for told, point in zip(found.dimensions, rolled, strict=True):
        assert told.kept.value == pytest.approx(point[0])
        assert told.kept.low == pytest.approx(estimate(*point).low)
        assert found.of(told.name) == told.kept
    assert found.worst == min(found.dimensions, key=lambda one: one.kept.value).name
    value, draws = mean_point(rolled)
    assert found.total.value == pytest.approx(value)
    assert found.total.high == pytest.approx(estimate(value, draws).high)
    assert (found.measure, found.resamples, found.seed) == (measure, 50, 0)
    alone = retention(dense[:1], pruned[:1], measure=measure, resamples=50)
    assert alone.tasks[0] == found.tasks[0]  # whatever its neighbours are
    assert found.to_dict()["tasks"][1]["name"] == "b"


def test_signal_is_that_of_the_measure():
    """The right choice is likely, but seldom the likeliest: no more often than by chance."""
    rows = [[0.0, -4.0, -4.0, -4.0]] * 25 + [[0.0, 0.1, -4.0, -4.0]] * 75
    dense = choices(rows, [0] * 100)
    signal = {m: retention([dense], [dense], measure=m, resamples=5).tasks[0].signal
              for m in ("primary", "accuracy", "ratio")}  # fmt: skip
    assert signal == {"primary": True, "accuracy": False, "ratio": False}


def test_draws_are_those_of_seed_name_and_count():
    """On every machine and in every version: what is published can be told again."""
    digest = hashlib.sha256(b"quiz").digest()
    rng = np.random.default_rng([3, int.from_bytes(digest[:8], "little")])
    expected = rng.multinomial(7, [1 / 7] * 7, size=20)
    found = item_weights("quiz", 7, resamples=20, seed=3)
    assert np.array_equal(found, expected)
    assert found.dtype == float
    other = item_weights("quiz", 7, resamples=20, seed=4)
    assert not np.array_equal(found, other)


def test_flips_are_counted_both_ways_and_texts_have_none():
    dense = [
        accuracy([1, 1, 1, 1, 0, 0, 0, 0], "a"), accuracy([1, 0], "b"), bits([3.0], [2]),
        accuracy([1, 1, 0, 0], "c", "math"),
    ]  # fmt: skip
    pruned = [
        accuracy([0, 0, 1, 1, 1, 0, 0, 0], "a"), accuracy([1, 0], "b"), bits([9.0], [2]),
        accuracy([0, 1, 0, 0], "c", "math"),
    ]  # fmt: skip
    found = flips(dense, pruned)
    assert {name: one.value for name, one in found.items()} == {
        "general": 3 / 16, "math": 1 / 4, "total": (3 / 16 + 1 / 4) / 2
    }  # fmt: skip
    assert found["general"].low < 3 / 16 < found["general"].high
    assert flips([dense[1]], [pruned[1]])["total"] == Estimate(0, 0, 0)
    assert flips(dense[2:3], pruned[2:3]) == {}
