"""The leakage guard: drop calibration text that shares a long run of tokens with a scored item.

Every window of n ids of the items is hashed to 64 bits, and a document's windows are looked up in
the sorted hashes. A chance collision takes about 10^13 tokens of text.

A run counts only if at least three quarters of its ids are distinct: `([1, 2, 3, 4])` is twelve
tokens under a tokenizer that splits digits, and occurs in much code, but is not an item.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calmix.calibration.tokenizer import HasTokenizer, Tokenize, tokenizer_function
from calmix.errors import SourceError
from calmix.evaluation import evaluate
from calmix.evaluation.suites import Suite, load_suite
from calmix.sources import Document

TOKENS = 13  # the run length common since GPT-3's contamination study (arXiv 2005.14165)
LIMIT = 0.05  # the share of leaking documents above which a source is refused
ENOUGH = 4_000  # documents that suffice to estimate the share that leaks
DISTINCT = 0.75  # the share of a run's ids that must be distinct for it to count
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)

_INDICES: dict[tuple[int, str, int], ItemIndex] = {}

Item = tuple[str, str, str]  # task, item id, text
Tokenized = tuple[Document, list[int]]


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


class ItemIndex:
    """An index of the windows of `n` token ids in a suite's items.

    Items shorter than `n` tokens have no window and cannot be found.
    """

    def __init__(self, items: Sequence[Item], tokenize: Tokenize, n: int = TOKENS) -> None:
        self.n = n
        self.names = [(task, item) for task, item, _ in items]
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number, row in enumerate(tokenize([text for _, _, text in items]) if items else []):
            if len(row) >= n:
                windows = np.sort(np.lib.stride_tricks.sliding_window_view(row, n), axis=1)
                distinct = 1 + (windows[:, 1:] != windows[:, :-1]).sum(axis=1)
                hashes.append(window_hashes(np.array(row), n)[distinct >= DISTINCT * n])
                owners.append(np.full(len(hashes[-1]), number))
        self._hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self._owner = np.concatenate(owners)[first]

    def find(self, ids: list[int]) -> tuple[str, str] | None:
        """Return task and id of an item that shares a run of `n` tokens, or None."""
        hashes = window_hashes(np.asarray(ids, dtype=np.int64), self.n)
        if not len(hashes) or not len(self._hashes):
            return None
        at = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        hits = at[self._hashes[at] == hashes]
        return self.names[int(self._owner[hits[0]])] if len(hits) else None


@dataclass
class Guard:
    """A filter that drops and counts the documents of a source that leak."""

    suite: str
    index: ItemIndex
    checked: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def passes(self, source: str, document: str, ids: list[int]) -> bool:
        """Whether a text shares no run with an item; if it does, it is counted as dropped."""
        self.checked[source] += 1
        item = self.index.find(ids)
        if item is not None:
            entry = {"document": document, "task": item[0], "item": item[1]}
            self.dropped.setdefault(source, []).append(entry)
        return item is None

    def verdict(self, source: str, rest: Iterable[Tokenized]) -> None:
        """Raise SourceError for a source if more than 5 % of its documents leak.

        The sample can be small: if more of it leaks, the `rest` of the documents is checked too, up
        to `ENOUGH` in total.
        """
        dropped = self.dropped.get(source, [])
        checked, leaks = self.checked[source], len(dropped)
        if leaks <= LIMIT * checked:
            return
        for _ in rest:
            if self.checked[source] >= ENOUGH:
                break
        if len(dropped) > LIMIT * self.checked[source]:
            task, hits = Counter(entry["task"] for entry in dropped).most_common(1)[0]
            raise SourceError(
                f"source {source} leaks: {len(dropped)} of {self.checked[source]} documents share "
                f"{self.index.n} tokens in a row with items of suite {self.suite}, {hits} with "
                f"task {task}: calibrate on other text, or --leakage off"
            )
        self.checked[source] = checked
        del dropped[leaks:]

    def report(self) -> dict[str, Any]:
        """Return what was checked and dropped, for the manifest."""
        return {
            "suite": self.suite,
            "tokens": self.index.n,
            "items": len(self.index.names),
            "checked": dict(self.checked),
            "dropped": self.dropped,
        }


def guard_of(suite: str, tokens: int, opened: HasTokenizer) -> Guard | None:
    """Return the guard for the items of one or more suites (`a,b`); None for `off`."""
    if suite == "off":
        return None
    items = tuple(suite_items(suite))
    key = hash(items), opened.tokenizer_fingerprint, tokens
    if key not in _INDICES:  # a study builds many sets with the same guard
        _INDICES.clear()
        _INDICES[key] = ItemIndex(items, tokenizer_function(opened.tokenizer), tokens)
    return Guard(suite, _INDICES[key])


def suite_items(suite: str) -> list[Item]:
    """Return task, item id and text of every item that one or more suites (`a,b`) score."""
    return [item for one in guarded_suites(suite) for item in evaluate.suite_items(one)]


def guarded_suites(suite: str) -> list[Suite]:
    """Return the suites whose items a guard keeps out."""
    return [load_suite(name) for name in suite.split(",")]
