"""Pack the token sequences of many requests so that no shared token is computed twice.

Scoring a benchmark means running thousands of sequences that begin alike: the choices of a
question share the question, the questions of a task share its worked examples. Three levels
take that apart. A *run* is a group of sequences with a long common prefix, which is computed
once and kept as keys and values. A *tree* holds the rest of sequences that still share a
beginning, each shared token once. A *row* is a few trees side by side, so that rows come out
nearly equal in length. This module knows tokens and masks only: no model, no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_PREFIX = 48  # tokens: shorter prefixes are cheaper to compute again than to carry
MIN_SHARED = 6  # tokens in common that make two neighbours worth keeping in one tree
OPEN_ROWS = 64  # rows that may still be filled while packing


class Scored(NamedTuple):
    """A sequence of token ids of which those from `start` (at least 1) on are to be scored."""

    ids: list[int]
    start: int
    owner: int = 0


class Target(NamedTuple):
    """One token to score: predicted at `node` of its row, for the sequence of `owner`."""

    owner: int
    node: int
    token: int


@dataclass
class Row:
    """Token nodes of a few trees, and what is to be scored.

    `parent` is the node before each node, -1 at a root, always smaller than the node itself.
    """

    ids: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, tree: Row) -> None:
        """Put another tree beside what is here."""
        base = len(self)
        self.ids += tree.ids
        self.parent += [p + base if p >= 0 else -1 for p in tree.parent]
        self.targets += [Target(t.owner, t.node + base, t.token) for t in tree.targets]

    def visible(self) -> NDArray[np.bool_]:
        """Return which nodes each node attends to, shape (nodes, nodes): itself and before."""
        mask = np.zeros((len(self), len(self)), dtype=bool)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
        return mask


Run = tuple[list[int], list[Row]]  # a prefix, which may be empty, and rows that begin with it


def chain(scored: Scored) -> Row:
    """Return a row of one sequence."""
    return _trees([scored], [0], 0, len(scored.ids))[0]


def plan(sequences: Iterable[Scored], *, row_tokens: int) -> list[Run]:
    """Return runs of rows that hold every token to be scored exactly once per sequence.

    A row exceeds `row_tokens` only where a single tree of one sequence does. The plan depends
    on the sequences alone, not on their order of arrival.
    """
    ordered = sorted(sequences, key=lambda scored: (scored.ids, scored.start))
    arrays = [np.asarray(scored.ids[:-1], dtype=np.int64) for scored in ordered]
    shared = [0, *(_common(a, b) for a, b in pairwise(arrays))]  # tokens of k and k - 1 in common
    runs, loose = list[Run](), list[int]()
    for low, high, length in _prefixes(ordered, shared, row_tokens):
        if length:
            kept = [0, *(count - length for count in shared[low + 1 : high])]
            trees = _trees(ordered[low:high], kept, length, row_tokens)
            runs.append((ordered[low].ids[:length], fill_rows(trees, row_tokens)))
        else:
            loose += range(low, high)
    if loose:
        kept = [0, *(shared[b] if b == a + 1 else 0 for a, b in pairwise(loose))]
        trees = _trees([ordered[at] for at in loose], kept, 0, row_tokens)
        runs.append(([], fill_rows(trees, row_tokens)))
    return runs


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Return how many leading entries two arrays have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _prefixes(
    ordered: Sequence[Scored], shared: Sequence[int], row_tokens: int
) -> list[tuple[int, int, int]]:
    """Cut the sorted sequences into stretches (low, high, prefix length or 0)."""

    def size(low: int, high: int, prefix: int) -> int:
        own = sum(len(ordered[k].ids) - 1 - shared[k] for k in range(low, high))
        return own + shared[low] - prefix

    def length(low: int, high: int) -> int:
        # One context token must stay in the row: the first scored token is predicted there.
        reach = min(scored.start - 1 for scored in ordered[low:high])
        return min(reach, *shared[low + 1 : high]) if high - low > 1 else 0

    def split(low: int, high: int, prefix: int) -> list[tuple[int, int, int]]:
        least = min(shared[low + 1 : high])
        cuts = [low, *(k for k in range(low + 1, high) if shared[k] == least), high]
        parts = [(a, b, length(a, b)) for a, b in pairwise(cuts)]
        worth = all(p >= prefix + MIN_PREFIX and size(a, b, p) >= row_tokens for a, b, p in parts)
        if len(parts) > 1 and worth:
            return [piece for part in parts for piece in split(*part)]
        return [(low, high, prefix)]

    stretches: list[tuple[int, int, int]] = []
    bounds = [k for k in range(1, len(ordered)) if shared[k] < MIN_PREFIX]
    for low, high in pairwise([0, *bounds, len(ordered)] if ordered else []):
        prefix = length(low, high)
        if prefix >= MIN_PREFIX and size(low, high, prefix) >= row_tokens:
            stretches += split(low, high, prefix)
        else:  # a row or less: the tree alone shares everything there is to share
            stretches.append((low, high, 0))
    return stretches


def _trees(
    members: Sequence[Scored], shared: Sequence[int], prefix: int, row_tokens: int
) -> list[Row]:
    """Grow trees over neighbours, cutting where they share little or a tree grows long.

    `shared` says how many tokens beyond the prefix each sequence has in common with the last.
    """
    trees, path = list[Row](), list[int]()
    for scored, kept in zip(members, shared, strict=True):
        ids = scored.ids[prefix:]
        if kept < MIN_SHARED or len(trees[-1]) + len(ids) - 1 - kept > row_tokens:
            trees.append(Row())
            path, kept = [], 0
        tree, path = trees[-1], path[:kept]
        for token in ids[kept:-1]:
            tree.ids.append(token)
            tree.parent.append(path[-1] if path else -1)
            path.append(len(tree) - 1)
        for at in range(scored.start - prefix, len(ids)):
            tree.targets.append(Target(scored.owner, path[at - 1], ids[at]))
    return trees


def fill_rows(trees: list[Row], row_tokens: int) -> list[Row]:
    """Put trees into rows of at most `row_tokens` nodes, the longest first, best fit."""
    rows: list[Row] = []
    room: list[list[int]] = []  # [free tokens, row], at most OPEN_ROWS of them
    for tree in sorted(trees, key=len, reverse=True):
        place = min((place for place in room if place[0] >= len(tree)), default=None)
        if place is None:
            rows.append(Row())
            room.append(place := [row_tokens, len(rows) - 1])
        rows[place[1]].extend(tree)
        place[0] -= len(tree)
        if len(room) > OPEN_ROWS:
            room.remove(min(room))
    return rows
