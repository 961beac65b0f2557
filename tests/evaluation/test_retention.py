"""Retention: the definitions, self-comparison, signal, and what the bootstrap must satisfy."""

import hashlib
import math

import numpy as np
import pytest

from calmix.errors import InputError
from calmix.evaluation.measures import parts
from calmix.evaluation.retention import (
    Estimate,
    estimate,
    flips,
    item_weights,
    resampled,
    retention,
)
from tests.evaluation.helpers import accuracy, bits


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


@pytest.mark.parametrize("measure", ["primary", "ratio"])
def test_dimensions_and_total_are_means_of_what_tasks_keep(measure):
    rng = np.random.default_rng(0)
    nats, sizes = rng.uniform(2, 6, 40), rng.integers(9, 20, 40)
    pairs = [(right(40, 80, name="a"), right(30, 80, name="a")),
             (right(40, 50, name="b"), right(30, 50, name="b")),
             (bits(nats, sizes, "c", "code"), bits(1.3 * nats, sizes, "c", "code"))]  # fmt: skip
    found = retention(*zip(*pairs, strict=True), measure=measure, resamples=50)
    made = [parts(*both, measure) for both in pairs]
    points = [resampled(one.name, own, resamples=50, seed=0)
              for (one, _), own in zip(pairs, made, strict=True)]  # fmt: skip
    assert [one.kept for one in found.tasks] == list(map(estimate, points))
    floors = [0.25, 0.25, 3 / math.log(2)] if measure == "primary" else [None] * 3
    assert [one.floor for one in found.tasks] == pytest.approx(floors)
    # Items are pooled but for the paper's.
    shares = [1.0, 1.0] if measure == "ratio" else [own.whole.sum() for own in made[:2]]
    rolled = [np.average(points[:2], axis=0, weights=shares), points[2]]
    told = [*(one.kept for one in found.dimensions), found.total]
    for one, point in zip(told, [*rolled, np.mean(rolled, 0)], strict=True):
        assert (one.value, one.low) == pytest.approx((point[0], estimate(point).low))
    assert found.worst == min(found.dimensions, key=lambda one: one.kept.value).name


def test_draws_are_those_of_seed_name_and_count():
    """On every machine and in every version: what is published can be told again."""
    rng = np.random.default_rng([3, int.from_bytes(hashlib.sha256(b"quiz").digest()[:8], "little")])
    found = item_weights("quiz", 7, resamples=20, seed=3)
    assert np.array_equal(found, rng.multinomial(7, [1 / 7] * 7, size=20))
    assert found.dtype == float


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
