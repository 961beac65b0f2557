"""N-gram keys against sets of tuples; the metrics are in `tests/test_properties.py`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmix.calibration.text_metrics import aggregation, count_ngrams, row_aggregation

tables = st.integers(1, 7).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([0, 1, 2, 7, 50_000, 260_000]), min_size=length, max_size=length),
        min_size=1,
        max_size=6,
    )
)


@given(tables, st.integers(1, 4))
def test_a_row_is_known_by_what_repeats_within_it(table, n):
    ids = np.array(table)
    alone = [aggregation(row[None], n) for row in ids]
    assert row_aggregation(ids, n) == pytest.approx(alone, abs=1e-12)


def test_a_vocabulary_too_large_for_packing_and_rows_shorter_than_n():
    rng = np.random.default_rng(0)
    ids = rng.permutation(200_000)[:100_000].reshape(100, 1000)
    ids[50:] = ids[:50]  # every n-gram twice
    for n in (3, 4, 5):
        assert count_ngrams(ids, n) == (50 * (1001 - n), 100 * (1001 - n))
        assert count_ngrams(np.zeros((3, n - 1), dtype=np.int64), n) == (0, 0)
