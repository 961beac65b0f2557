"""Metrics against their definitions, written out plainly."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmix.information import metrics

tables = st.integers(1, 8).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, 11), min_size=length, max_size=length), min_size=1, max_size=6
    )
)


def grams(table, n):
    return [tuple(row[i : i + n]) for row in table for i in range(len(row) - n + 1)]


def entropy(counts):
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


@given(tables)
def test_volume_and_scope(table):
    ids = np.array(table)
    tokens = [i for row in table for i in row]
    assert metrics.unigram_entropy(ids) == pytest.approx(entropy(Counter(tokens)), abs=1e-12)
    assert metrics.volume(ids) == pytest.approx(len(tokens) * entropy(Counter(tokens)), abs=1e-9)
    assert metrics.scope(ids, 12) == len(set(tokens)) / 12


@given(tables, st.integers(1, 4))
def test_variety_and_aggregation(table, n):
    ids, all_grams = np.array(table), grams(table, n)
    assert metrics.variety(ids, n) == len(set(all_grams)) / ids.size
    if all_grams:
        assert metrics.aggregation(ids, n) == 1 - len(set(all_grams)) / len(all_grams)
        assert 0 <= metrics.aggregation(ids, n) < 1
    alone = [metrics.aggregation(row[None], n) for row in ids]
    assert metrics.row_aggregation(ids, n) == pytest.approx(alone, abs=1e-12)


@given(st.lists(tables, min_size=1, max_size=4), st.integers(1, 4))
def test_coverage_of_the_pool_and_of_a_reference(sets, n):
    arrays = [np.array(table) for table in sets]
    distinct = [set(grams(table, n)) for table in sets]
    pool = set().union(*distinct)
    expected = [len(own) / len(pool) if pool else 0 for own in distinct]
    assert metrics.coverage(arrays, n) == expected
    reference = distinct[-1]
    expected = [len(own & reference) / len(reference) if reference else 0 for own in distinct]
    assert metrics.coverage(arrays, n, [arrays[-1]]) == expected


@given(tables, st.lists(tables, min_size=1, max_size=3))
def test_mismatch_is_the_jensen_shannon_divergence(table, others):
    p = Counter(i for row in table for i in row)
    q = Counter(i for other in others for row in other for i in row)
    middle = Counter()
    for part in (p, q):
        for token, count in part.items():
            middle[token] += count / sum(part.values()) / 2
    expected = -sum(m * math.log2(m) for m in middle.values()) - (entropy(p) + entropy(q)) / 2
    found = metrics.mismatch(np.array(table), [np.array(other) for other in others])
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 <= found <= 1


def test_divergence_of_equal_and_disjoint_sets():
    assert metrics.mismatch(np.array([[1, 2]]), [np.array([[2, 1]])]) == 0
    assert metrics.mismatch(np.array([[1, 2]]), [np.array([[3, 4, 5]])]) == 1


def test_distortion():
    assert metrics.distortion(2 * math.log(7), 2) == pytest.approx(7)
    assert metrics.bits_per_byte(math.log(2) * 6, 3) == pytest.approx(2)


@given(tables)
def test_all_at_once_agrees_with_one_by_one(table):
    ids = np.array(table)
    found = metrics.of_ids(ids, 12)
    assert found["tokens"] == ids.size
    assert found["volume"] == pytest.approx(metrics.volume(ids))
    assert found["scope_tokens"] == metrics.scope(ids, 12)
    for n in metrics.ORDERS:
        assert found[f"variety_{n}"] == metrics.variety(ids, n)
        assert found[f"aggregation_{n}"] == metrics.aggregation(ids, n)
