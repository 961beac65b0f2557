"""Selection: which of a source's candidate rows go into the set.

Every selector is a pure function of candidate ids, the group (source) of each candidate, a quota
a group and, if it is in `BY_MODEL`, each candidate's mean -log p under the model; it returns the
indices of the chosen candidates in the order they were chosen.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from calmix.calibration.diversity import select_rows

Selection = Literal["random", "zipcal", "igsp"]
OVERSAMPLE = 4  # candidate rows drawn for each row wanted, where the selector has a choice


def select_random(
    rows: Sequence[Sequence[int]], groups: Sequence[str], quota: Mapping[str, int], seed: int
) -> list[int]:
    """Choose `quota[g]` candidates of every group g uniformly, without replacement.

    Candidates come in seeded order already, so this only matters for pools of other origin.
    """
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for group, count in quota.items():
        members = np.flatnonzero(np.array([name == group for name in groups]))
        chosen += rng.permutation(members)[:count].tolist()
    return chosen


def select_zipcal(
    rows: Sequence[Sequence[int]], groups: Sequence[str], quota: Mapping[str, int], seed: int
) -> list[int]:
    """Choose candidates greedily by the number of distinct tokens they add to the set.

    Each step takes the candidate with the most token ids not yet in the set, among the groups
    whose quota is not filled; of equals, the first. Distinct-token count is a monotone
    submodular cover, so the lazy greedy used here equals the plain one and holds, with one group,
    at least 1 - 1/e of the distinct tokens of the best set of its size, with several at least
    half. `seed` is not used.

    Our reading of ZipCal (arXiv 2603.16105), which maximises the lexical diversity of the
    calibration set: tokens stand for its words, and the mix's row counts for its way of
    treating several domains. The paper's own formulas were not available to us.
    """
    distinct = [set(row) for row in rows]
    left = dict(quota)
    covered: set[int] = set()
    heap = [(-len(tokens), index) for index, tokens in enumerate(distinct)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and any(left.values()):
        bound, index = heapq.heappop(heap)
        if not left.get(groups[index]):
            continue
        gain = len(distinct[index] - covered)
        if gain != -bound:
            heapq.heappush(heap, (-gain, index))
            continue
        chosen.append(index)
        covered |= distinct[index]
        left[groups[index]] -= 1
    return chosen


def select_igsp(
    rows: Sequence[Sequence[int]],
    groups: Sequence[str],
    quota: Mapping[str, int],
    seed: int,
    log_perplexity: Sequence[float],
) -> list[int]:
    """Choose candidates by IGSP's objective (ours; `calmix.calibration.diversity`): few repeated
    4-grams, and perplexity in balance across the sources. `seed` is not used.
    """
    tokens = [len(row) - 1 for row in rows]
    nll = [value * count for value, count in zip(log_perplexity, tokens, strict=True)]
    return select_rows(np.asarray(rows), groups, quota, nll, tokens).rows


SELECTORS: dict[str, Callable[..., list[int]]] = {
    "random": select_random,
    "zipcal": select_zipcal,
    "igsp": select_igsp,
}
BY_MODEL = ("igsp",)  # selectors that also take log_perplexity
