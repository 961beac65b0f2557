"""Pack the token sequences of many requests so that no shared token is computed twice.

Scoring a benchmark means running thousands of sequences that begin alike: the choices of a
question share the question, the questions of a task share its worked examples. Three levels
take that apart. A *run* is a group of sequences with a long common prefix, which is computed
once and kept as keys and values. A *tree* holds the rest of sequences that still share a
beginning, each shared token once. A *row* is a few trees side by side, so that rows come out
nearly equal in length. Knows tokens and masks only: no model, no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MIN_PREFIX = 48  # tokens: shorter prefixes are cheaper to compute again than to carry
MIN_SHARED = 6  # tokens in common that make two neighbours worth keeping in one tree
OPEN_ROWS = 64  # rows that may still be filled while packing


@dataclass(frozen=True)
class Scored:
    """A sequence of token ids of which the ids from `start` on are to be scored.

    `start` is at least 1: what is scored needs something before it.
    """

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Target:
    """One token to score: predicted at `node` of its row, belonging to sequence `owner`."""

    owner: int
    node: int
    token: int


@dataclass
class Row:
    """Token nodes of a few trees.

    Attributes:
        ids: token of each node.
        parent: node that comes before each node, -1 at a root; always smaller than the node.
        depth: position of each node within its sequence, counted from the end of the prefix.
        targets: what is to be scored.
    """

    ids: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, tree: Row) -> None:
        """Put another tree beside what is here."""
        base = len(self)
        self.ids += tree.ids
        self.parent += [p + base if p >= 0 else -1 for p in tree.parent]
        self.depth += tree.depth
        self.targets += [Target(t.owner, t.node + base, t.token) for t in tree.targets]

    def visible(self) -> NDArray[np.bool_]:
        """Return which nodes each node attends to, shape (nodes, nodes): itself and before."""
        mask = np.zeros((len(self), len(self)), dtype=bool)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
        return mask


@dataclass(frozen=True)
class Run:
    """Rows whose sequences all begin with `prefix` (may be empty)."""

    prefix: list[int]
    rows: list[Row]


def plan(sequences: Sequence[Scored], *, row_tokens: int) -> list[Run]:
    """Return runs of rows that hold every token to be scored exactly once per sequence.

    A row exceeds `row_tokens` only where a single tree of one sequence does. The plan depends
    on the sequences alone, not on their order of arrival.
    """
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].ids, sequences[i].start))
    inputs = [np.asarray(sequences[i].ids[:-1], dtype=np.int64) for i in order]
    shared = np.zeros(len(order), dtype=np.int64)  # shared[k]: tokens k has in common with k - 1
    for k in range(1, len(order)):
        shared[k] = common(inputs[k - 1], inputs[k])
    runs: list[Run] = []
    loose: list[int] = []
    for low, high, length in _prefixes(order, sequences, inputs, shared, row_tokens):
        members = range(low, high)
        if length == 0:
            loose += members
            continue
        prefix = sequences[order[low]].ids[:length]
        trees = _trees(members, order, sequences, shared, length, row_tokens)
        runs.append(Run(prefix, fill_rows(trees, row_tokens)))
    if loose:
        trees = _trees(loose, order, sequences, shared, 0, row_tokens)
        runs.append(Run([], fill_rows(trees, row_tokens)))
    return runs


def common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Return how many leading entries two arrays have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _prefixes(
    order: list[int],
    sequences: Sequence[Scored],
    inputs: list[NDArray[np.int64]],
    shared: NDArray[np.int64],
    row_tokens: int,
) -> list[tuple[int, int, int]]:
    """Cut the sorted sequences into stretches (low, high, prefix length or 0)."""

    def size(low: int, high: int, prefix: int) -> int:
        new = sum(len(inputs[k]) - int(shared[k]) for k in range(low + 1, high))
        return len(inputs[low]) - prefix + new

    def length(low: int, high: int) -> int:
        # One context token must stay in the row: the first scored token is predicted there.
        reach = min(sequences[order[k]].start - 1 for k in range(low, high))
        return min(int(shared[low + 1 : high].min()), reach) if high - low > 1 else 0

    def split(low: int, high: int, prefix: int) -> list[tuple[int, int, int]]:
        least = int(shared[low + 1 : high].min())
        cuts = [low, *(k for k in range(low + 1, high) if shared[k] == least), high]
        parts = [(a, b, length(a, b)) for a, b in pairwise(cuts)]
        worth = all(p >= prefix + MIN_PREFIX and size(a, b, p) >= row_tokens for a, b, p in parts)
        if len(parts) > 1 and worth:
            return [piece for a, b, p in parts for piece in split(a, b, p)]
        return [(low, high, prefix)]

    stretches: list[tuple[int, int, int]] = []
    low = 0
    for high in range(1, len(order) + 1):
        if high < len(order) and shared[high] >= MIN_PREFIX:
            continue
        prefix = length(low, high)
        if prefix >= MIN_PREFIX and size(low, high, prefix) >= row_tokens:
            stretches += split(low, high, prefix)
        else:  # a row or less: the tree alone shares everything there is to share
            stretches.append((low, high, 0))
        low = high
    return stretches


def _trees(
    members: Sequence[int],
    order: list[int],
    sequences: Sequence[Scored],
    shared: NDArray[np.int64],
    prefix: int,
    row_tokens: int,
) -> list[Row]:
    """Grow trees over neighbours in sorted order, cutting where they share little or grow long."""
    trees: list[Row] = []
    path: list[int] = []
    for position, k in enumerate(members):
        index = order[k]
        scored = sequences[index]
        ids = scored.ids[prefix:]
        follows = position > 0 and members[position - 1] == k - 1
        kept = int(shared[k]) - prefix if follows else 0
        fits = bool(trees) and len(trees[-1]) + len(ids) - 1 - kept <= row_tokens
        if kept < MIN_SHARED or not fits:
            trees.append(Row())
            path, kept = [], 0
        tree = trees[-1]
        path = path[:kept]
        for depth in range(kept, len(ids) - 1):
            tree.ids.append(ids[depth])
            tree.parent.append(path[-1] if path else -1)
            tree.depth.append(depth)
            path.append(len(tree) - 1)
        for at in range(scored.start - prefix, len(ids)):
            tree.targets.append(Target(index, path[at - 1], ids[at]))
    return trees


def fill_rows(trees: list[Row], row_tokens: int) -> list[Row]:
    """Put trees into rows of at most `row_tokens` nodes, the longest first, best fit."""
    rows: list[Row] = []
    room: list[list[int]] = []  # [free tokens, row], at most OPEN_ROWS of them
    for tree in sorted(trees, key=len, reverse=True):
        fitting = [place for place in room if place[0] >= len(tree)]
        if fitting:
            place = min(fitting)
            rows[place[1]].extend(tree)
            place[0] -= len(tree)
            continue
        rows.append(Row())
        rows[-1].extend(tree)
        room.append([row_tokens - len(tree), len(rows) - 1])
        if len(room) > OPEN_ROWS:
            room.remove(min(room))
    return rows
