"""The leakage guard: no calibration text that shares a long run of tokens with a scored item.

Windows of n ids of all items are hashed into one sorted array; a document's windows are looked
up in it, and every match is confirmed id by id, so that the answer is exact.

A run counts only if at least three in four of its ids are distinct: `([1, 2, 3, 4])` is twelve
tokens under a tokenizer that takes digits one by one, and stands in much code, but it is no item.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calmix.calibration.packing import Tokenized
from calmix.errors import SourceError

TOKENS = 13  # the run length common since GPT-3's contamination study (arXiv 2005.14165)
LIMIT = 0.05  # the share of a source's documents above which the source is refused
ENOUGH = 4_000  # documents, of which the share that leaks is told
Item = tuple[str, str, str]  # task, item id, text
DISTINCT = 0.75  # the share of a run's ids that must be distinct for it to count
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def window_hashes(ids: NDArray[np.int64], n: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of every window of `n` consecutive ids, shape (len(ids) - n + 1,)."""
    count = len(ids) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total *= _MIX
        total += mixed[offset : offset + count]
    return total


def _distinct(ids: NDArray[np.int64], starts: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return the number of distinct ids in the windows of `n` that begin at `starts`."""
    if not len(starts):
        return np.empty(0, np.int64)
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(ids, n)[starts], axis=1)
    return 1 + (windows[:, 1:] != windows[:, :-1]).sum(axis=1)


class ItemIndex:
    """The windows of `n` token ids of a suite's items, for look-up.

    Items shorter than `n` tokens have no window and cannot be found; nor can windows of which
    less than three in four ids are distinct.
    """

    def __init__(
        self,
        items: Iterable[Item],
        tokenize: Callable[[list[str]], list[list[int]]],
        n: int = TOKENS,
    ) -> None:
        self.n = n
        entries = list(items)
        self.names = [(task, item) for task, item, _ in entries]
        texts = [text for _, _, text in entries]
        ids = tokenize(texts) if texts else []
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self._ids = np.fromiter((i for row in ids for i in row), np.int64, int(lengths.sum()))
        hashes = window_hashes(self._ids, n)
        owner = np.repeat(np.arange(len(ids)), lengths)
        # A window that runs from one item into the next belongs to neither.
        inside = owner[: len(hashes)] == owner[n - 1 : n - 1 + len(hashes)]
        starts = np.flatnonzero(inside)
        starts = starts[_distinct(self._ids, starts, n) >= DISTINCT * n]
        order = np.argsort(hashes[starts], kind="stable")
        self._starts = starts[order]
        self._hashes = hashes[starts][order]
        self._owner = owner

    def find(self, ids: list[int]) -> tuple[str, str] | None:
        """Return task and id of the first item that shares a run of `n` tokens, or None."""
        row = np.asarray(ids, dtype=np.int64)
        hashes = window_hashes(row, self.n)
        if not len(hashes) or not len(self._hashes):
            return None
        at = np.searchsorted(self._hashes, hashes)
        hits = np.flatnonzero(self._hashes[np.minimum(at, len(self._hashes) - 1)] == hashes)
        for window in hits:
            place = int(at[window])
            while place < len(self._hashes) and self._hashes[place] == hashes[window]:
                start = int(self._starts[place])
                if np.array_equal(self._ids[start : start + self.n], row[window : window + self.n]):
                    return self.names[int(self._owner[start])]
                place += 1
        return None


@dataclass
class Guard:
    """A filter over a source's documents that drops and counts those that leak.

    Attributes:
        suite: the name of the suite the items are from.
        index: its items' windows.
    """

    suite: str
    index: ItemIndex
    checked: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def filter(self, source: str, documents: Iterable[Tokenized]) -> Iterator[Tokenized]:
        """Yield the documents that share no run with an item; count the others as dropped."""
        for document, ids in documents:
            if self.passes(source, document.id, ids):
                yield document, ids

    def passes(self, source: str, document: str, ids: list[int]) -> bool:
        """Tell whether a text shares no run with an item; count it as dropped if it does."""
        self.checked[source] += 1
        found = self.index.find(ids)
        if found is not None:
            entry = {"document": document, "task": found[0], "item": found[1]}
            self.dropped.setdefault(source, []).append(entry)
        return found is None

    def verdict(self, source: str, rest: Iterable[Tokenized]) -> None:
        """Refuse a source of which too large a share leaks.

        A draw may be small, so `rest` (what the draw left of the filtered documents) is read
        until enough documents have been looked at, but only if the draw gives reason to.

        Raises:
            SourceError: more than 5 % of the documents looked at leak.
        """

        def share() -> float:
            return len(self.dropped.get(source, ())) / max(1, self.checked[source])

        before = self.checked[source], len(self.dropped.get(source, ()))
        if share() <= LIMIT:
            return
        for _ in rest:
            if self.checked[source] >= ENOUGH:
                break
        if share() > LIMIT:
            task, hits = Counter(entry["task"] for entry in self.dropped[source]).most_common(1)[0]
            raise SourceError(
                f"source {source} leaks: {len(self.dropped[source])} of {self.checked[source]} "
                f"documents share {self.index.n} tokens in a row with items of suite "
                f"{self.suite}, {hits} with task {task}: calibrate on other text, or "
                "--leakage off"
            )
        self.checked[source] = before[0]
        del self.dropped[source][before[1] :]

    def report(self) -> dict[str, Any]:
        """Return what was checked and dropped, for the manifest."""
        return {
            "suite": self.suite,
            "tokens": self.index.n,
            "items": len(self.index.names),
            "checked": dict(self.checked),
            "dropped": self.dropped,
        }
