"""Packing: how tokenised documents become full rows.

Rows hold no padding, and no row holds text of two sources (method section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from calmix.sources import Document

Packing = Literal["concat", "window"]

PACKINGS: tuple[Packing, ...] = get_args(Packing)
Tokenized = tuple[Document, list[int]]


@dataclass(frozen=True)
class Packed:
    """Rows cut from documents.

    Attributes:
        rows: lists of token ids, all of one length.
        used: the documents taken, in order, with their ids.
        spans: for each row the first and the last index into `used` it holds text of.
    """

    rows: list[list[int]]
    used: list[Tokenized]
    spans: list[tuple[int, int]]


def pack_concat(documents: Iterator[Tokenized], rows: int, length: int, end: int | None) -> Packed:
    """Join documents by the end token (if any) and cut the first `rows` rows of `length` ids.

    There are fewer rows if the documents run out; what is left of the last is dropped.
    """
    stream: list[int] = []
    used: list[Tokenized] = []
    starts: list[int] = []
    for document, ids in documents:
        used.append((document, ids))
        starts.append(len(stream))
        stream += ids if end is None else [*ids, end]
        if len(stream) >= rows * length:
            break
    whole = min(rows, len(stream) // length)
    cut = [stream[i * length : (i + 1) * length] for i in range(whole)]
    first = np.searchsorted(starts, np.arange(whole) * length, side="right") - 1
    last = np.searchsorted(starts, np.arange(1, whole + 1) * length, side="left") - 1
    return Packed(cut, used, list(zip(first.tolist(), last.tolist(), strict=True)))


def pack_window(
    documents: Iterator[Tokenized], rows: int, length: int, rng: np.random.Generator
) -> Packed:
    """Draw one random window of `length` ids from each document that is long enough.

    As the SparseGPT and Wanda papers draw C4, but without replacement: no document gives two
    windows. There are fewer rows if the documents run out.
    """
    packed: list[list[int]] = []
    used: list[Tokenized] = []
    for document, ids in documents:
        if len(ids) < length:
            continue
        start = int(rng.integers(0, len(ids) - length + 1))
        packed.append(ids[start : start + length])
        used.append((document, ids))
        if len(packed) == rows:
            break
    return Packed(packed, used, [(i, i) for i in range(len(packed))])
