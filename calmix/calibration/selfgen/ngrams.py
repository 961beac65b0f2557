"""N-grams of token ids: keys that compare them, and how many repeat. They never cross rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]


def ngram_keys(sets: Sequence[Ids], n: int) -> list[Ids]:
    """Return the key of every n-gram of every set; equal keys mean equal n-grams, also across sets.

    For ids (rows, length), one flat array of rows * max(0, length - n + 1) keys, row by row.
    """
    keys = tables = [np.asarray(ids, np.int64) for ids in sets]
    size = 1 + max(int(table.max(initial=0)) for table in tables)
    for k in range(1, n):
        keys = [key[:, :-1] * size + table[:, k:] for key, table in zip(keys, tables, strict=True)]
        # Renumbered, keys stay small enough for the next token.
        distinct = np.unique(np.concatenate([key.ravel() for key in keys]))
        keys = [np.searchsorted(distinct, key) for key in keys]
    return [key.ravel() for key in keys]


def aggregation(ids: Ids, n: int) -> float:
    """Return 1 - distinct n-grams / total n-grams: the share that repeats; 0 without any.

    It grows with the size of the set, so compare only sets of equal size.
    """
    (keys,) = ngram_keys([ids], n)
    return 1 - len(np.unique(keys)) / len(keys) if len(keys) else 0.0


def row_aggregation(ids: Ids, n: int) -> NDArray[np.float64]:
    """Return each row's share of n-grams that repeat within it, which is high if text loops."""
    (keys,) = ngram_keys([ids], n)
    rows = np.sort(keys.reshape(len(ids), -1), axis=1)
    return (rows[:, 1:] == rows[:, :-1]).sum(1) / max(1, rows.shape[1])
