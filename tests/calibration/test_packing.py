"""Packing: full rows, nothing invented, nothing crossed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from calmix.calibration.packing import pack_concat, pack_window
from calmix.sources import Document

END = 0
texts = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12)


def stream(documents):
    return ((Document(str(i), ""), ids) for i, ids in enumerate(documents))


@given(texts, st.integers(1, 6), st.integers(1, 8), st.sampled_from([END, None]))
def test_concat_is_the_joined_stream_cut(documents, rows, length, end):
    packed = pack_concat(stream(documents), rows, length, end)
    joined = [i for ids in documents for i in (ids if end is None else [*ids, end])]
    assert len(packed.rows) == min(rows, len(joined) // length)
    assert [i for row in packed.rows for i in row] == joined[: len(packed.rows) * length]
    assert all(len(row) == length for row in packed.rows)


@given(texts, st.integers(1, 6), st.integers(1, 8))
def test_concat_spans_name_the_documents_of_a_row(documents, rows, length):
    packed = pack_concat(stream(documents), rows, length, END)
    owner = [i for i, ids in enumerate(documents) for _ in range(len(ids) + 1)]
    for number, (first, last) in enumerate(packed.spans):
        held = owner[number * length : (number + 1) * length]
        assert (first, last) == (held[0], held[-1])


@given(texts, st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32))
def test_windows_lie_in_documents_of_their_own(documents, rows, length, seed):
    packed = pack_window(stream(documents), rows, length, np.random.default_rng(seed))
    long = [ids for ids in documents if len(ids) >= length]
    assert len(packed.rows) == min(rows, len(long))
    for row, ids, (document, used) in zip(packed.rows, long, packed.used, strict=False):
        assert used == ids == documents[int(document.id)]
        assert any(ids[at : at + length] == row for at in range(len(ids)))
