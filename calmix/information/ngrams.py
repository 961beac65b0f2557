"""Exact n-gram counting, vectorised.

An n-gram gets a 64-bit key: two n-grams have the same key if and only if they are the same. The
ids are first renumbered densely, so that most n-grams fit into the 64 bits as they are; where
they do not, two shorter n-grams that overlap or adjoin are renumbered and paired. Counting is
then a sort. N-grams never cross a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]
Keys = NDArray[np.uint64]
BITS = 64


def ngram_keys(sets: Sequence[Ids], n: int) -> list[Keys]:
    """Return the key of every n-gram of every set; keys are comparable between the sets.

    Args:
        sets: token ids, each of shape (rows, length); lengths may differ between sets.
        n: n-gram size, at least 1.

    Returns:
        One flat array a set, of rows * max(0, length - n + 1) keys, row by row.
    """
    tables, size = _renumbered([np.asarray(ids) for ids in sets])
    return [keys.ravel() for keys in _windows(tables, size, n, BITS)]


def _windows(tables: list[Keys], size: int, n: int, bits: int) -> list[Keys]:
    """Return the n-gram keys of tables of dense ids below `size`, each below 2 ** bits."""
    width = max(1, (size - 1).bit_length())
    if n * width <= bits:
        return [_packed(table, n, width) for table in tables]
    half = -(-n // 2)
    parts, count = _renumbered(_windows(tables, size, half, BITS))
    shift = np.uint64(max(1, (count - 1).bit_length()))  # at most 32 up to 4 billion n-grams
    joined = []
    for table, part in zip(tables, parts, strict=True):
        columns = max(0, table.shape[1] - n + 1)
        keys = part[:, :columns] << shift
        keys |= part[:, n - half : n - half + columns]
        joined.append(keys)
    return joined


def _packed(table: Keys, n: int, width: int) -> Keys:
    columns = max(0, table.shape[1] - n + 1)
    keys = table[:, :columns].copy()
    for offset in range(1, n):
        keys <<= np.uint64(width)
        keys |= table[:, offset : offset + columns]
    return keys


def _renumbered(tables: Sequence[NDArray[np.generic]]) -> tuple[list[Keys], int]:
    """Replace the values of tables by dense numbers from 0, the same in all; say how many."""
    distinct = distinct_sorted([table.ravel() for table in tables])
    numbers = [np.searchsorted(distinct, table).astype(np.uint64) for table in tables]
    return numbers, len(distinct)


def distinct_sorted(arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    """Return the distinct values of several flat arrays, ascending."""
    merged = np.sort(np.concatenate(arrays)) if arrays else np.empty(0, np.int64)
    if not len(merged):
        return merged
    keep = np.empty(len(merged), bool)
    keep[0] = True
    np.not_equal(merged[1:], merged[:-1], out=keep[1:])
    return merged[keep]


def count_ngrams(ids: Ids, n: int) -> tuple[int, int]:
    """Return how many distinct and how many n-grams rows of token ids hold, shape (rows, length).

    None crosses a row.
    """
    (keys,) = ngram_keys([ids], n)
    total = len(keys)
    keys.sort()
    distinct = int(np.count_nonzero(keys[1:] != keys[:-1])) + 1 if total else 0
    return distinct, total
