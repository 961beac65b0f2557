"""IGSP's selection: rows with few repeated 4-grams and perplexity in balance across groups.

Ours, from one sentence of the abstract of arXiv 2606.03328 (method section 6). What it minimises
over sets S with a given number of rows of each group is

    J(S) = A4(S) + lambda * mean_d (log PPL_d(S) - mu(S))^2

where A4 is 4-gram aggregation (1 - distinct / total, over the rows of S), PPL_d the perplexity of
S's rows of group d, token-weighted, and mu the mean of log PPL_d over the groups.

Two steps. A greedy pick of the row that adds most distinct 4-grams: a monotone submodular cover,
so with one group the pick holds at least 1 - 1/e of the distinct 4-grams of the best set, with
several (a partition matroid) at least 1/2. Then swaps of a chosen row for another of its group,
each of which lowers J, until none is found; from the greedy pick and from the first rows of each
group: the better of the two. The bound is of the pick alone and of 4-grams alone: the balance is
not submodular, and swaps may give 4-grams up for it, so for J and for the set after the swaps
there is none. Pure and deterministic.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calmix.errors import InputError
from calmix.information.ngrams import Ids, ngram_keys

ORDER = 4
LAMBDA = 1.0
SWEEPS = 20  # of swaps; a few are enough in practice
LOOK = 16  # partners of a swap that are evaluated exactly, best bound first
EPSILON = 1e-12  # what a swap must lower J by, so that rounding cannot make it run in a circle

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """J of a set and its parts: 4-gram aggregation and log perplexity by group."""

    J: float
    aggregation_4: float
    log_perplexity: dict[str, float]

    @property
    def perplexity(self) -> dict[str, float]:
        """Perplexity by group."""
        return {name: math.exp(value) for name, value in self.log_perplexity.items()}


@dataclass(frozen=True)
class Selected:
    """Chosen rows in the order they entered the set, and J along the way.

    Attributes:
        rows: indices; a row that was swapped in stands where the other stood.
        before: J of the first rows of each group, which no selection would have taken.
        greedy: J after the greedy pick.
        after: J of the set.
        trace: J at the start of the swaps that led to the set and after each; never rises.
    """

    rows: list[int]
    before: Objective
    greedy: Objective
    after: Objective
    trace: list[float] = field(default_factory=list)


class _Pool:
    """The pool's 4-grams. Only those that several rows hold are kept: a row's others always count.

    `zero[r]` and `one[r]` are how many of row r's shared 4-grams no row, or one row, of the set
    holds, so that what adding or removing a row changes is read off.
    """

    def __init__(self, ids: Ids) -> None:
        count, length = ids.shape
        self.per_row = max(0, length - ORDER + 1)
        (keys,) = ngram_keys([ids], ORDER)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        rows = order // max(1, self.per_row)
        new_key = np.ones(len(keys), bool)
        new_key[1:] = keys[1:] != keys[:-1]
        new_pair = new_key.copy()
        new_pair[1:] |= rows[1:] != rows[:-1]  # the sort is stable: equal keys stand by row
        gram = (np.cumsum(new_key) - 1)[new_pair]
        rows = rows[new_pair]
        held_by = np.bincount(gram) if len(gram) else np.zeros(0, np.int64)
        shared = held_by[gram] > 1
        self.own: Ints = np.bincount(rows[~shared], minlength=count).astype(np.int64)
        number = np.cumsum(held_by > 1) - 1
        gram, rows = number[gram[shared]], rows[shared]
        grams = int(gram[-1]) + 1 if len(gram) else 0
        self.rows_of, self.gram_start = rows, _starts(gram, grams)
        by_row = np.argsort(rows, kind="stable")
        self.grams_of, self.row_start = gram[by_row], _starts(rows[by_row], count)
        self.held: Ints = np.zeros(grams, np.int64)
        self.zero: Ints = np.diff(self.row_start)
        self.one: Ints = np.zeros(count, np.int64)
        self.distinct = 0

    def grams(self, row: int) -> Ints:
        return self.grams_of[self.row_start[row] : self.row_start[row + 1]]

    def gain(self, row: int) -> int:
        """Distinct 4-grams a row outside the set would add."""
        return int(self.own[row] + self.zero[row])

    def loss(self, row: int) -> int:
        """Distinct 4-grams that go with a row of the set."""
        return int(self.own[row] + self.one[row])

    def overlap(self, out: int, into: int) -> int:
        """4-grams only `out` holds in the set and `into` has too: a swap does not lose them."""
        mine = self.grams(out)
        mine = mine[self.held[mine] == 1]
        return len(np.intersect1d(mine, self.grams(into), assume_unique=True))

    def add(self, row: int) -> None:
        self.distinct += self.gain(row)
        grams = self.grams(row)
        held = self.held[grams]
        first = self._holders(grams[held == 0])
        self.zero -= first
        self.one += first - self._holders(grams[held == 1])
        self.held[grams] += 1

    def remove(self, row: int) -> None:
        self.distinct -= self.loss(row)
        grams = self.grams(row)
        held = self.held[grams]
        last = self._holders(grams[held == 1])
        self.zero += last
        self.one += self._holders(grams[held == 2]) - last
        self.held[grams] -= 1

    def _holders(self, grams: Ints) -> Ints:
        """Return for each row of the pool how many of some 4-grams it holds."""
        start, stop = self.gram_start[grams], self.gram_start[grams + 1]
        sizes = stop - start
        total = int(sizes.sum())
        places = np.arange(total) + np.repeat(start - (np.cumsum(sizes) - sizes), sizes)
        return np.bincount(self.rows_of[places], minlength=len(self.own))


def _starts(sorted_numbers: Ints, count: int) -> Ints:
    """Return where each number's run begins in an ascending array, and its end."""
    return np.searchsorted(sorted_numbers, np.arange(count + 1))


class _Set:
    """A set of rows of a pool, with J kept up to date."""

    def __init__(
        self,
        pool: _Pool,
        groups: Ints,
        names: list[str],
        nll: Floats,
        tokens: Floats,
        weight: float,
    ) -> None:
        self.pool, self.groups, self.names, self.weight = pool, groups, names, weight
        self.nll, self.tokens = nll, tokens
        self.chosen: list[int] = []
        self.inside = np.zeros(len(groups), bool)
        self.sums, self.counts = np.zeros(len(names)), np.zeros(len(names))

    def add(self, row: int, at: int | None = None) -> None:
        self.pool.add(row)
        self._move(row, 1)
        if at is None:
            self.chosen.append(row)
        else:
            self.chosen[at] = row

    def swap(self, at: int, row: int) -> None:
        out = self.chosen[at]
        self.pool.remove(out)
        self._move(out, -1)
        self.add(row, at)

    def clear(self) -> None:
        for row in self.chosen:
            self.pool.remove(row)
            self._move(row, -1)
        self.chosen = []

    def _move(self, row: int, sign: int) -> None:
        self.inside[row] = sign > 0
        self.sums[self.groups[row]] += sign * self.nll[row]
        self.counts[self.groups[row]] += sign * self.tokens[row]

    def aggregation(self) -> float:
        total = len(self.chosen) * self.pool.per_row
        return 1 - self.pool.distinct / total if total else 0.0

    def logs(self) -> Floats:
        return self.sums / np.maximum(self.counts, 1)

    def objective(self) -> Objective:
        logs = self.logs()
        value = self.aggregation() + self.weight * float(np.mean((logs - logs.mean()) ** 2))
        named = {name: float(log) for name, log in zip(self.names, logs, strict=True)}
        return Objective(value, self.aggregation(), named)

    def changes(self, out: int, into: Ints) -> Floats:
        """Return an upper bound of how J changes if `out` gives way to each of `into`.

        The swap's overlap, which lowers J further, is not counted.
        """
        pool, group = self.pool, self.groups[out]
        total = max(1, len(self.chosen) * pool.per_row)
        spread = (pool.loss(out) - pool.own[into] - pool.zero[into]) / total
        if not self.weight or len(self.names) < 2:
            return spread.astype(np.float64)
        logs = self.logs()
        tokens = self.counts[group] - self.tokens[out] + self.tokens[into]
        moved = (self.sums[group] - self.nll[out] + self.nll[into]) / np.maximum(tokens, 1)
        # The variance of the group means when one of them moves.
        k, rest = len(logs), np.delete(logs, group)
        mean = (rest.sum() + moved) / k
        variance = ((rest**2).sum() + moved**2) / k - mean**2
        return spread + self.weight * (variance - float(np.mean((logs - logs.mean()) ** 2)))


def check_weight(weight: float) -> None:
    """Raise InputError for a weight of the balance that is negative or not finite."""
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(f"--lambda {weight} is not a number of 0 or more")


def select_rows(
    ids: Ids,
    groups: Sequence[str],
    quota: Mapping[str, int],
    nll: Sequence[float],
    tokens: Sequence[int],
    *,
    weight: float = LAMBDA,
) -> Selected:
    """Choose `quota[g]` rows of every group g so that J is small.

    Args:
        ids: token ids of the candidates, shape (candidates, length).
        groups: the group of each candidate.
        quota: rows wanted of each group.
        nll: negative log-likelihood of each candidate in nats, and
        tokens: the number of tokens it is over.
        weight: lambda, the weight of the balance; 0 for distinct 4-grams alone.

    Raises:
        InputError: a group has fewer candidates than its quota, or weight is negative.
    """
    check_weight(weight)
    names = [name for name, count in quota.items() if count]
    numbers = {name: number for number, name in enumerate(names)}
    members = {name: [row for row, group in enumerate(groups) if group == name] for name in names}
    for name in names:
        if len(members[name]) < quota[name]:
            raise InputError(
                f"{quota[name]} rows of {name} are asked for, but there are only "
                f"{len(members[name])} candidates"
            )
    wanted = [quota[name] for name in names]
    pool = _Pool(np.asarray(ids))
    group = np.array([numbers.get(name, -1) for name in groups])
    made = _Set(
        pool, group, names, np.asarray(nll, np.float64), np.asarray(tokens, np.float64), weight
    )
    first = [row for name in names for row in members[name][: quota[name]]]
    for row in first:
        made.add(row)
    before = made.objective()
    made.clear()
    _greedy(made, wanted)
    greedy = made.objective()
    best: tuple[list[float], list[int], Objective] | None = None
    for start in (list(made.chosen), first):
        made.clear()
        for row in start:
            made.add(row)
        trace = _improve(made, members)
        if best is None or made.objective().J < best[2].J - EPSILON:
            best = trace, list(made.chosen), made.objective()
    assert best is not None
    trace, picked, after = best
    return Selected(picked, before, greedy, after, trace)


def _greedy(made: _Set, wanted: Sequence[int]) -> None:
    """Add the row that adds most distinct 4-grams, of equals the first, until quotas are full.

    A gain only ever falls, so a stale one is an upper bound: the heap is the lazy greedy.
    """
    left = list(wanted)
    heap = [(-made.pool.gain(row), row) for row in range(len(made.groups)) if made.groups[row] >= 0]
    heapq.heapify(heap)
    while heap and any(left):
        bound, row = heapq.heappop(heap)
        group = made.groups[row]
        if not left[group]:
            continue
        gain = made.pool.gain(row)
        if gain != -bound:
            heapq.heappush(heap, (-gain, row))
            continue
        made.add(row)
        left[group] -= 1


def _improve(made: _Set, members: Mapping[str, list[int]]) -> list[float]:
    """Swap rows within groups while J falls; return J from the start on."""
    trace = [made.objective().J]
    pools = {made.names.index(name): np.array(rows) for name, rows in members.items()}
    for _ in range(SWEEPS):
        swaps = 0
        for at in sorted(range(len(made.chosen)), key=lambda i: made.pool.loss(made.chosen[i])):
            out = made.chosen[at]
            into = pools[int(made.groups[out])]
            into = into[~made.inside[into]]
            if not len(into):
                continue
            changes = made.changes(out, into)
            look = np.argsort(changes, kind="stable")[:LOOK]
            total = max(1, len(made.chosen) * made.pool.per_row)
            exact = [changes[i] - made.pool.overlap(out, int(into[i])) / total for i in look]
            best = int(np.argmin(exact))
            if exact[best] < -EPSILON:
                made.swap(at, int(into[look[best]]))
                trace.append(made.objective().J)
                swaps += 1
        if not swaps:
            break
    return trace
