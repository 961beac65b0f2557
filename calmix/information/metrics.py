"""Information metrics of a calibration set, as pure functions of token ids.

Ours, after Objective Information Theory (Xu et al.), which describes information by eleven
properties; the three of time (delay, duration, sampling rate) have no meaning for text without
time stamps and are left out. These are our definitions, not those of arXiv 2606.03328, whose own
are not public to us. Method section 3.

N-grams never cross a row. A begin token, where the tokenizer puts one before each row, counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calmix.information.ngrams import Ids, count_ngrams, distinct_sorted, ngram_keys

ORDERS = (1, 2, 3, 4)


def unigram_entropy(ids: Ids) -> float:
    """Return the Shannon entropy of the tokens' distribution, in bits a token."""
    _, counts = np.unique(ids, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def volume(ids: Ids) -> float:
    """Return tokens times unigram entropy, in bits."""
    return ids.size * unigram_entropy(ids)


def scope(ids: Ids, vocabulary: int) -> float:
    """Return the number of distinct tokens as a share of the vocabulary."""
    return len(np.unique(ids)) / vocabulary


def variety(ids: Ids, n: int) -> float:
    """Return distinct n-grams per token."""
    return count_ngrams(ids, n)[0] / ids.size


def aggregation(ids: Ids, n: int) -> float:
    """Return 1 - distinct n-grams / total n-grams: the share that repeats.

    It grows with the size of the set, so compare at one token budget only. n = 4 is IGSP's
    objective. 0 if rows are shorter than n.
    """
    distinct, total = count_ngrams(ids, n)
    return 1 - distinct / total if total else 0.0


def row_aggregation(ids: Ids, n: int) -> NDArray[np.float64]:
    """Return of each row the share of its n-grams that repeat within it: high where text loops."""
    (keys,) = ngram_keys([ids], n)
    rows = np.sort(keys.reshape(len(ids), -1), axis=1)
    return (rows[:, 1:] == rows[:, :-1]).sum(1) / max(1, rows.shape[1])


def coverage(sets: Sequence[Ids], n: int, reference: Sequence[Ids] | None = None) -> list[float]:
    """Return for each set the share of the reference's distinct n-grams that it holds.

    Args:
        sets: token ids, each of shape (rows, length).
        n: n-gram size.
        reference: what is to be covered; None means all sets pooled.
    """
    keys = ngram_keys([*sets, *(reference or ())], n)
    own, other = keys[: len(sets)], keys[len(sets) :]
    pooled = distinct_sorted(other if reference is not None else own)
    if not len(pooled):
        return [0.0 for _ in sets]
    return [
        len(np.intersect1d(distinct_sorted([part]), pooled, assume_unique=True)) / len(pooled)
        for part in own
    ]


def distortion(nll: float, predicted: int) -> float:
    """Return the perplexity exp(nll / predicted), from a total in nats."""
    return math.exp(nll / predicted)


def bits_per_byte(nll: float, size: int) -> float:
    """Return nll / (ln 2 * bytes of the predicted text), from a total in nats."""
    return nll / (math.log(2) * size)


def jensen_shannon(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """Return the Jensen-Shannon divergence of two distributions over one alphabet, in bits.

    Between 0 (equal) and 1 (disjoint). The arguments are weights and need not sum to 1.
    """
    p, q = left / left.sum(), right / right.sum()
    middle = (p + q) / 2

    def half(part: NDArray[np.floating]) -> float:
        held = part > 0
        return float((part[held] * np.log2(part[held] / middle[held])).sum())

    return min(1.0, max(0.0, (half(p) + half(q)) / 2))


def mismatch(ids: Ids, others: Sequence[Ids]) -> float:
    """Return the Jensen-Shannon divergence, in bits, of the unigrams of `ids` and of `others`
    pooled. Larger sets weigh more in the pool.
    """
    pooled = np.concatenate([other.ravel() for other in others])
    size = int(max(ids.max(), pooled.max())) + 1
    return jensen_shannon(
        np.bincount(ids.ravel(), minlength=size).astype(float),
        np.bincount(pooled, minlength=size).astype(float),
    )


def of_ids(ids: Ids, vocabulary: int) -> dict[str, Any]:
    """Return every metric that needs the ids of one set and nothing else, by name."""
    counts = {n: count_ngrams(ids, n) for n in ORDERS}
    entropy = unigram_entropy(ids)
    return {
        "tokens": int(ids.size),
        "entropy": entropy,
        "volume": ids.size * entropy,
        "scope_tokens": counts[1][0] / vocabulary,
        **{f"variety_{n}": distinct / ids.size for n, (distinct, _) in counts.items()},
        **{
            f"aggregation_{n}": 1 - distinct / total if total else 0.0
            for n, (distinct, total) in counts.items()
        },
    }
