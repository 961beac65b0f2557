"""IGSP's selection: texts with few repeated 4-grams, and perplexity in balance across groups.

Ours, from one sentence of the abstract of arXiv 2606.03328 (method section 6). It minimises over
sets S with a given number of texts of each group

    J(S) = A4(S) + LAMBDA * mean_d (log PPL_d(S) - mu(S))^2

where A4 is 4-gram aggregation (1 - distinct / total), PPL_d the perplexity of S's texts of group
d, token-weighted, and mu the mean of log PPL_d over the groups.

A greedy pick of the text that adds most distinct 4-grams comes first: a monotone submodular
cover, which holds at least 1 - 1/e of the distinct 4-grams of the best set with one group, 1/2
with several. Then swaps within a group while J falls. Pure and deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from calmix.calibration.text_metrics import Ids, aggregation, ngram_keys

ORDER = 4
LAMBDA = 1.0
SWEEPS = 20  # of swaps; a few are enough in practice
EPSILON = 1e-12  # what a swap must lower J by, so that rounding cannot make it run in a circle

Values = NDArray[np.float64]


def objective(ids: Ids, groups: NDArray[Any], nll: Values, tokens: NDArray[np.int64]) -> float:
    """Return J of a set of rows; `nll` is of each row in nats, over so many `tokens`."""
    parts = [groups == name for name in np.unique(groups)]
    logs = [nll[part].sum() / tokens[part].sum() for part in parts]
    return aggregation(ids, ORDER) + LAMBDA * float(np.var(logs))


def select_rows(
    ids: Ids,
    groups: NDArray[Any],
    nll: Values,
    tokens: NDArray[np.int64],
    quota: Mapping[str, int],
) -> list[int]:
    """Choose `quota[g]` rows of every group g, of as many or more, so that J is small."""
    (keys,) = ngram_keys([ids], ORDER)
    gram, per_row = np.unique(keys, return_inverse=True)[1].ravel(), len(keys) // len(ids)
    starts = np.arange(len(ids) + 1) * per_row
    holds = sparse.csr_matrix((np.ones(len(gram), np.int32), gram, starts))
    holds.sum_duplicates()
    holds.data[:] = 1
    grams = np.split(holds.indices, holds.indptr[1:-1])
    held = np.zeros(holds.shape[1], np.int32)  # how many chosen rows hold each 4-gram
    rows_of = {name: np.flatnonzero(groups == name) for name in quota if quota[name]}
    number = {name: at for at, name in enumerate(rows_of)}
    sums = np.zeros((2, len(rows_of)))  # nll and tokens of the chosen rows of each group
    inside = np.zeros(len(ids), bool)

    def move(row: int, sign: int) -> None:
        held[grams[row]] += sign
        sums[:, number[groups[row]]] += sign * np.array([nll[row], tokens[row]])
        inside[row] = sign > 0

    chosen: list[int] = []
    left = {name: quota[name] for name in rows_of}
    heap = [(-per_row, int(row)) for rows in rows_of.values() for row in rows]
    heapq.heapify(heap)
    while any(left.values()):
        bound, row = heapq.heappop(heap)
        gain = int((held[grams[row]] == 0).sum())
        if not left[groups[row]]:
            continue
        if gain != -bound:  # a gain only ever falls: the heap is the lazy greedy
            heapq.heappush(heap, (-gain, row))
            continue
        move(row, 1)
        chosen.append(row)
        left[groups[row]] -= 1
    own = {name: holds[rows] for name, rows in rows_of.items()}
    for _ in range(SWEEPS):
        swapped = False
        for at, out in enumerate(chosen):
            rows, place = rows_of[groups[out]], number[groups[out]]
            move(out, -1)
            new = own[groups[out]] @ (held == 0).astype(np.int32)
            logs = np.tile(sums[0] / np.maximum(sums[1], 1), (len(rows), 1))
            logs[:, place] = (sums[0, place] + nll[rows]) / (sums[1, place] + tokens[rows])
            value = LAMBDA * logs.var(1) - new / (len(chosen) * per_row)
            value[inside[rows]] = np.inf
            best = int(np.argmin(value))
            if value[best] < value[np.searchsorted(rows, out)] - EPSILON:
                chosen[at], swapped = int(rows[best]), True
            move(chosen[at], 1)
        if not swapped:
            break
    return chosen
