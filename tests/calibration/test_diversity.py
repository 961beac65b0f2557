"""IGSP's selection against exhaustive search and definitions."""

import itertools

import numpy as np
import pytest

from calmix.calibration.diversity import select_rows
from calmix.errors import InputError
from calmix.information.metrics import aggregation


def objective(ids, rows, groups, nll, tokens, weight):
    """J as it is defined."""
    logs = []
    for name in dict.fromkeys(groups):
        own = [row for row in rows if groups[row] == name]
        logs.append(sum(nll[r] for r in own) / sum(tokens[r] for r in own))
    return aggregation(ids[list(rows)], 4) + weight * float(np.var(logs))


def pool(seed, symbols=4, size=(12, 30)):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, symbols, size)
    tokens = rng.integers(8, 13, size[0])
    return ids, ["a"] * 6 + ["b"] * 6, rng.uniform(1.8, 2.6, size[0]) * tokens, tokens


def best_by_search(ids, groups, nll, tokens, quota, weight):
    first = itertools.combinations(range(6), quota["a"])
    pairs = itertools.product(first, itertools.combinations(range(6, 12), quota["b"]))
    return min(objective(ids, [*a, *b], groups, nll, tokens, weight) for a, b in pairs)


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_against_exhaustive_search(weight):
    quota = {"a": 3, "b": 2}
    equal, gaps = 0, []
    for seed in range(30):
        ids, groups, nll, tokens = pool(seed)
        found = select_rows(ids, groups, quota, nll, tokens, weight=weight)
        assert sorted(groups[row] for row in found.rows) == ["a"] * 3 + ["b"] * 2
        assert len(set(found.rows)) == 5
        exact = objective(ids, found.rows, groups, nll, tokens, weight)
        assert abs(found.after.J - exact) < 1e-12
        best = best_by_search(ids, groups, nll, tokens, quota, weight)
        gaps.append(exact - best)
        equal += gaps[-1] < 1e-9
        if not weight:  # the greedy pick's guarantee under a partition matroid
            assert 1 - found.greedy.aggregation_4 >= (1 - best) / 2
    assert equal >= 20
    assert max(gaps) < 0.02


def test_one_group_is_within_the_greedy_guarantee():
    for seed in range(20):
        ids, _, nll, tokens = pool(seed, symbols=2, size=(12, 14))
        found = select_rows(ids, ["a"] * 12, {"a": 4}, nll, tokens, weight=0)
        sets = itertools.combinations(range(12), 4)
        best = min(aggregation(ids[list(rows)], 4) for rows in sets)
        assert 1 - found.greedy.aggregation_4 >= (1 - np.exp(-1)) * (1 - best)
        assert found.after.aggregation_4 <= found.greedy.aggregation_4


def test_j_only_falls():
    falls = 0
    for seed in range(20):
        ids, groups, nll, tokens = pool(seed)
        found = select_rows(ids, groups, {"a": 2, "b": 3}, nll, tokens, weight=0.5)
        assert found.trace == sorted(found.trace, reverse=True)
        assert found.trace[-1] == found.after.J <= found.greedy.J
        assert found.after.J <= found.before.J
        falls += len(found.trace) > 1
    assert falls > 5  # swaps do happen


def test_balance_pulls_perplexities_together():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5000, (40, 20))  # no repeats to speak of: only balance is left
    groups = ["a", "b"] * 20
    logs = np.where(np.array(groups) == "a", 2.0, 3.0) + rng.uniform(-1, 1, 40)
    tokens = np.full(40, 20)
    spread = {}
    for weight in (0.0, 1.0):
        found = select_rows(ids, groups, {"a": 5, "b": 5}, logs * 20, tokens, weight=weight)
        a, b = found.after.log_perplexity.values()
        spread[weight] = abs(a - b)
    assert spread[0.0] > 0.5
    assert spread[1.0] < 0.02


def test_degenerate_rows_are_left():
    """Repeating n-grams, endless punctuation and copies lose to any plain row."""
    rng = np.random.default_rng(1)
    plain = rng.integers(10, 4000, (20, 64))
    loop = np.tile([1, 2, 3, 4], (4, 16))
    dots = np.full((4, 64), 5)
    copies = plain[:4]
    ids = np.concatenate([loop, dots, plain, copies])
    found = select_rows(ids, ["a"] * 32, {"a": 18}, np.full(32, 100.0), np.full(32, 64))
    assert not set(found.rows) & set(range(8))
    kept = [tuple(ids[row]) for row in found.rows]
    assert len(set(kept)) == 18


def test_the_same_pool_gives_the_same_rows():
    ids, groups, nll, tokens = pool(3)
    first = select_rows(ids, groups, {"a": 3, "b": 3}, nll, tokens)
    assert first == select_rows(ids, groups, {"a": 3, "b": 3}, nll, tokens)


def test_rows_shorter_than_a_4_gram():
    found = select_rows(np.zeros((4, 3), int), ["a"] * 4, {"a": 2}, [1.0] * 4, [3] * 4)
    assert found.after.aggregation_4 == 0
    assert len(found.rows) == 2


@pytest.mark.parametrize(
    ("quota", "weight", "message"),
    [
        ({"a": 7, "b": 1}, 0.1, "7 rows of a are asked for, but there are only 6 candidates"),
        ({"c": 1}, 0.1, "1 rows of c are asked for, but there are only 0 candidates"),
        ({"a": 1}, -1.0, "--lambda -1.0 is not a number of 0 or more"),
        ({"a": 1}, float("nan"), "--lambda nan is not a number"),
    ],
)
def test_bad_requests(quota, weight, message):
    ids, groups, nll, tokens = pool(0)
    with pytest.raises(InputError, match=message):
        select_rows(ids, groups, quota, nll, tokens, weight=weight)
