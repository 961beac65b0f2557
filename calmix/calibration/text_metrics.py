"""Information metrics of calibration text, as pure functions of token ids.

They follow Objective Information Theory (Xu et al.), which describes information by eleven
properties; the three of time (delay, duration, sampling rate) have no meaning for text without
time stamps and are left out. The definitions are ours, not those of arXiv 2606.03328, which are
not available to us. Method section 3.

N-grams never cross rows. A begin token that the tokenizer puts before each row counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDERS = (1, 2, 3, 4)
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


def count_ngrams(ids: Ids, n: int) -> tuple[int, int]:
    """Return the numbers of distinct and of all n-grams in rows of token ids."""
    (keys,) = ngram_keys([ids], n)
    return len(np.unique(keys)), len(keys)


def aggregation(ids: Ids, n: int) -> float:
    """Return 1 - distinct n-grams / total n-grams: the share that repeats; 0 without any.

    It grows with the size of the set, so compare only sets of equal size.
    """
    distinct, total = count_ngrams(ids, n)
    return 1 - distinct / total if total else 0.0


def row_aggregation(ids: Ids, n: int) -> NDArray[np.float64]:
    """Return each row's share of n-grams that repeat within it, which is high if text loops."""
    (keys,) = ngram_keys([ids], n)
    rows = np.sort(keys.reshape(len(ids), -1), axis=1)
    return (rows[:, 1:] == rows[:, :-1]).sum(1) / max(1, rows.shape[1])


def coverage(sets: Sequence[Ids], n: int, reference: Sequence[Ids]) -> list[float]:
    """Return each set's share of the distinct n-grams of the reference."""
    keys = ngram_keys([*sets, *reference], n)
    pooled = np.unique(np.concatenate(keys[len(sets) :]))
    return [int(np.isin(pooled, part).sum()) / max(1, len(pooled)) for part in keys[: len(sets)]]


def entropy(weights: NDArray[Any]) -> float:
    """Return the Shannon entropy of a distribution in bits; weights need not sum to 1."""
    share = weights[weights > 0] / weights.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def mismatch(ids: Ids, others: Sequence[Ids]) -> float:
    """Return the Jensen-Shannon divergence, in bits, of the unigrams of `ids` and of `others`
    pooled. Larger sets weigh more in the pool.
    """
    pooled = np.concatenate([other.ravel() for other in others])
    size = int(max(ids.max(), pooled.max())) + 1
    p, q = (np.bincount(part, minlength=size) / part.size for part in (ids.ravel(), pooled))
    return min(1.0, max(0.0, entropy(p + q) - (entropy(p) + entropy(q)) / 2))


def compared(sets: Sequence[tuple[str, Ids]], pool: Mapping[str, Ids]) -> list[dict[str, float]]:
    """Return for each named set its coverage of the pool, and its mismatch with the sets in the
    pool that have other names."""
    shares = {n: coverage([ids for _, ids in sets], n, list(pool.values())) for n in ORDERS}
    results = []
    for at, (name, ids) in enumerate(sets):
        others = [other for label, other in pool.items() if label != name]
        values = {f"coverage_{n}": share[at] for n, share in shares.items()}
        results.append(values | {"mismatch": mismatch(ids, others)})
    return results


def of_ids(ids: Ids, vocabulary: int) -> dict[str, float]:
    """Return every metric that needs only the ids of one set, by name."""
    counts = {n: count_ngrams(ids, n) for n in ORDERS}
    bits = entropy(np.unique(ids, return_counts=True)[1])
    return {
        "tokens": int(ids.size),
        "entropy": bits,
        "volume": ids.size * bits,
        "scope_tokens": counts[1][0] / vocabulary,
        **{f"variety_{n}": distinct / ids.size for n, (distinct, _) in counts.items()},
        **{
            f"aggregation_{n}": 1 - distinct / total if total else 0.0
            for n, (distinct, total) in counts.items()
        },
    }
