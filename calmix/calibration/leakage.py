"""The leakage guard: drop calibration text that shares a long run of words with a scored item.

Words are runs of letters and digits, after Unicode normalisation (NFKC) and case folding: line
breaks, spaces, punctuation and capitals make no difference, and nor does the tokenizer. A Chinese
or Japanese character is a word. Documents and items are compared both as they are and without
format: escapes of JSON and HTML are resolved, tags and line numbers removed.

Every window of n words of the items is hashed to 64 bits, and a document's windows are looked up in
the sorted hashes. A chance collision takes about 10^13 words of text. Of an item shorter than n
words all of it must occur, question and answers, if it has at least `SHORTEST_ITEM` words.

A run counts only if at least three quarters of its words are distinct and they are longer than
single letters and digits: `1 2 1 2 1 2` and `0 1 2 3 4 5` occur in much code, but are not items.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calmix.errors import SourceError
from calmix.evaluation import tasks
from calmix.evaluation.suites import Suite, load_suite
from calmix.sources.documents import Document

WORDS = 13  # the run length of GPT-3's contamination study (arXiv 2005.14165)
SHORTEST_ITEM = 5  # words of the shortest item that can be found
LIMIT = 0.05  # the share of leaking documents above which a source is refused
SAMPLED_DOCUMENTS = 4_000  # documents that suffice to estimate the share that leaks
ESCAPED = 3  # times that text may have been escaped for HTML
DISTINCT = 0.75  # the share of a run's words that must be distinct for it to count
BYTES = 1.25  # the mean length of a run's words, in UTF-8, for it to count
_IDEOGRAPH = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_IDEOGRAPH}]|[^\\W{_IDEOGRAPH}]+")
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_CODES = re.compile(r"(?:\\{1,8}u[0-9a-fA-F]{4})+")  # UTF-16, one or two for a character
_BYTE = re.compile(r"\\{1,8}x([0-9a-fA-F]{2})")
_CONTROL = re.compile(r"\\{1,8}[nrt]")
_TAG = re.compile(r"<[/!]?[a-zA-Z-][^<>]*>")
_NUMBERED = re.compile(r"\n[^\w\n]*((?:[Ll]ine +)?(\d{1,7}))(?!\w)")
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.cumprod(np.full(64, 0xBF58476D1CE4E5B9, np.uint64))  # modulo 2^64

Hashes = NDArray[np.int64]
Places = NDArray[np.intp]
Item = tuple[str, str, str]  # task, item id, text
Tokenized = tuple[Document, list[int]]


def without_format(text: str) -> str:
    """Return a text without escapes of JSON and HTML, however often applied, tags, and the numbers
    of lines that count up."""
    if "\\" in text:
        text = _CODES.sub(_decoded, text)
        text = _BYTE.sub(lambda match: chr(int(match[1], 16)), text)
        text = _CONTROL.sub("\n", text)
    for _ in range(ESCAPED):
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub("\n", text)
    numbered = list(_NUMBERED.finditer(f"\n{text}"))
    values = [int(match[2]) for match in numbered]
    parts, end, counted = [], 0, False
    for match, value, following in zip(numbered, values, [*values[1:], 0], strict=False):
        if (counts := following == value + 1) or counted:
            parts.append(text[end : match.start(1) - 1])
            end = match.end(1) - 1
        counted = counts
    return "".join([*parts, text[end:]])


def _decoded(codes: re.Match[str]) -> str:
    return bytes.fromhex(re.sub(r"\\+u", "", codes[0])).decode("utf-16-be", "replace")


def words(text: str) -> list[str]:
    """Return the words of a text, normalised."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())  # the same, in half the time
    return _WORD.findall(unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold())


def views(text: str) -> Iterator[list[str]]:
    """Yield the words of a text, and those without format if they differ."""
    yield words(text)
    plain = without_format(text)
    if plain != text:
        yield words(plain)


def word_hashes(row: Sequence[str]) -> Hashes:
    """Return a hash of each word, the same within this process."""
    return np.fromiter(map(hash, row), np.int64, len(row))


def window_hashes(values: Hashes, n: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of every window of `n` consecutive values, shape (windows,)."""
    if len(values) < n:
        return np.empty(0, np.uint64)
    mixed = (values.view(np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    return np.correlate(mixed, _POWERS[:n], "valid")


class ItemIndex:
    """An index of the windows of `n` words in a suite's items, and of shorter items."""

    def __init__(self, items: Sequence[Item], n: int = WORDS) -> None:
        self.n, self._least = n, min(n, SHORTEST_ITEM)
        self.names = [(task, item) for task, item, _ in items]
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        self._short: dict[int, list[tuple[int, Hashes]]] = {}  # by the hash of their first words
        rows = [(number, row) for number, one in enumerate(items) for row in views(one[2])]
        for number, row in rows:
            size, hashed = min(n, len(row)), word_hashes(row)
            if size < self._least:
                continue
            lengths = np.array([len(word.encode()) for word in row])
            long = np.convolve(lengths, np.ones(size, int), "valid") >= BYTES * size
            windows = np.sort(np.lib.stride_tricks.sliding_window_view(hashed, size), axis=1)
            distinct = 1 + (windows[:, 1:] != windows[:, :-1]).sum(axis=1)
            counts = long & (distinct >= DISTINCT * size)
            if size == n:
                hashes.append(window_hashes(hashed, n)[counts])
                owners.append(np.full(len(hashes[-1]), number))
            elif counts[0]:
                head = int(window_hashes(hashed[: self._least], self._least)[0])
                self._short.setdefault(head, []).append((number, hashed))
        self._hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self._owner = np.concatenate(owners)[first]
        self._heads = np.array(sorted(self._short), np.uint64)

    def find(self, text: str) -> tuple[str, str] | None:
        """Return task and id of an item that shares a run of words with a text, or None."""
        for row in map(word_hashes, views(text)):
            _, indices = _known(window_hashes(row, self.n), self._hashes)
            if len(indices):
                return self.names[int(self._owner[indices[0]])]
            places, indices = _known(window_hashes(row, self._least), self._heads)
            for at, head in zip(places, indices, strict=True):
                for number, item in self._short[int(self._heads[head])]:
                    if np.array_equal(row[at : at + len(item)], item):
                        return self.names[number]
        return None


def _known(hashes: NDArray[np.uint64], known: NDArray[np.uint64]) -> tuple[Places, Places]:
    """Return where hashes are among sorted known ones, and which they are there."""
    if not len(hashes) or not len(known):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    places = np.flatnonzero(known[at] == hashes)
    return places, at[places]


@dataclass
class Guard:
    """A filter that drops and counts the documents of a source that leak."""

    suite: str
    index: ItemIndex
    checked: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def passes(self, source: str, document: str, text: str) -> bool:
        """Whether a text shares no run with an item; if it does, it is counted as dropped."""
        self.checked[source] += 1
        item = self.index.find(text)
        if item is not None:
            entry = {"document": document, "task": item[0], "item": item[1]}
            self.dropped.setdefault(source, []).append(entry)
        return item is None

    def check_share(self, source: str, rest: Iterable[Tokenized]) -> None:
        """Raise SourceError for a source if more than 5 % of its documents leak.

        The sample can be small: if more of it leaks, the `rest` of the documents is checked too, up
        to `SAMPLED_DOCUMENTS` in total.
        """
        dropped = self.dropped.get(source, [])
        checked, leaks = self.checked[source], len(dropped)
        if leaks <= LIMIT * checked:
            return
        for _ in rest:
            if self.checked[source] >= SAMPLED_DOCUMENTS:
                break
        if len(dropped) > LIMIT * self.checked[source]:
            task, hits = Counter(entry["task"] for entry in dropped).most_common(1)[0]
            raise SourceError(
                f"source {source} leaks: {len(dropped)} of {self.checked[source]} documents share "
                f"{self.index.n} words in a row with items of suite {self.suite}, {hits} with "
                f"task {task}: calibrate on other text, or --leakage off"
            )
        self.checked[source] = checked
        del dropped[leaks:]

    def report(self) -> dict[str, Any]:
        """Return what was checked and dropped, for the manifest."""
        return {
            "suite": self.suite,
            "words": self.index.n,
            "items": len(self.index.names),
            "checked": dict(self.checked),
            "dropped": self.dropped,
        }


def guard_of(suite: str) -> Guard | None:
    """Return the guard for the items of one or more suites (`a,b`); None for `off`."""
    if suite == "off":
        return None
    return Guard(suite, _index(tuple(suite_items(suite))))


@functools.lru_cache(1)  # a study builds many sets with the same guard
def _index(items: tuple[Item, ...]) -> ItemIndex:
    return ItemIndex(items)


def suite_items(suite: str) -> list[Item]:
    """Return task, item id and text of every item that one or more suites (`a,b`) score."""
    return [item for one in guarded_suites(suite) for item in tasks.suite_items(one)]


def guarded_suites(suite: str) -> list[Suite]:
    """Return the suites whose items a guard keeps out."""
    return [load_suite(name) for name in suite.split(",")]
