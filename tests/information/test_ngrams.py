"""N-gram counting against sets of tuples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmix.information import ngrams
from calmix.information.ngrams import count_ngrams, ngram_keys

tables = st.integers(1, 7).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([0, 1, 2, 7, 50_000, 260_000]), min_size=length, max_size=length),
        min_size=1,
        max_size=6,
    )
)


def grams(table, n):
    return [tuple(row[i : i + n]) for row in table for i in range(len(row) - n + 1)]


@given(tables, st.integers(1, 6))
def test_counts_equal_brute_force_and_never_cross_rows(table, n):
    expected = grams(table, n)
    assert count_ngrams(np.array(table), n) == (len(set(expected)), len(expected))


@given(tables, tables, st.integers(1, 6), st.sampled_from([4, 6, 64]))
def test_keys_are_equal_exactly_where_ngrams_are(first, second, n, bits):
    """Few bits force the pairing of shorter n-grams that large vocabularies need."""
    saved, ngrams.BITS = ngrams.BITS, bits
    try:
        keys = ngram_keys([np.array(first), np.array(second)], n)
    finally:
        ngrams.BITS = saved
    expected = [grams(first, n), grams(second, n)]
    pairs = set()
    for got, wanted in zip(keys, expected, strict=True):
        assert len(got) == len(wanted)
        pairs |= set(zip(got.tolist(), wanted, strict=True))
    assert len(pairs) == len({key for key, _ in pairs}) == len({gram for _, gram in pairs})


def test_a_vocabulary_too_large_for_packing():
    rng = np.random.default_rng(0)
    ids = rng.permutation(200_000)[:100_000].reshape(100, 1000)
    ids[50:] = ids[:50]  # every n-gram twice
    for n in (3, 4, 5):
        assert count_ngrams(ids, n) == (50 * (1001 - n), 100 * (1001 - n))


@pytest.mark.parametrize("n", [1, 4])
def test_rows_shorter_than_n_hold_none(n):
    ids = np.zeros((3, n - 1), dtype=np.int64)
    assert count_ngrams(ids, n) == (0, 0)
