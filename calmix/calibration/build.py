"""Build a calibration set: documents in seeded order, tokenised, packed into full rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from calmix.calibration.mix import Mix, rows_per_source
from calmix.calibration.set import CalibrationSet
from calmix.errors import InputError, SourceError
from calmix.models import OpenModel
from calmix.sources import Document, get_source
from calmix.sources.registry import documents_hash

Packing = Literal["concat", "window"]
BATCH = 64  # documents handed to the tokenizer at a time

Tokenize = Callable[[list[str]], list[list[int]]]


def build(
    mix: Mix,
    opened: OpenModel,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    packing: Packing = "concat",
) -> CalibrationSet:
    """Draw a calibration set of `rows` full rows of `length` tokens from a mix of sources.

    Each row comes from one source; rows per source are shared out by largest remainder. The
    rows of all sources are shuffled together. If the model's tokenizer puts a begin token
    before text, every row begins with it.

    Raises:
        InputError: rows or length not positive, or length beyond the model's context.
        SourceError: a source is unknown or too small for its rows.
    """
    if rows < 1 or length < 1:
        raise InputError(f"rows and length must be positive, not {rows} and {length}")
    if opened.context is not None and length > opened.context:
        raise InputError(
            f"length {length} is beyond the model's context of {opened.context} tokens"
        )
    tokenize = tokenizer_function(opened.tokenizer)
    begin = begin_token(opened.tokenizer)
    end = opened.tokenizer.eos_token_id
    body = length - (begin is not None)
    if body < 1:
        raise InputError(f"length {length} leaves no room for text after the begin token")
    counts = {name: n for name, n in rows_per_source(mix, rows).items() if n}
    drawn: list[tuple[str, list[int]]] = []
    described: dict[str, Any] = {}
    for name, count in counts.items():
        documents = list(get_source(name).documents())
        rng = np.random.default_rng(_seed_of(seed, name))
        order = [documents[i] for i in rng.permutation(len(documents))]
        if packing == "concat":
            packed, used = pack_concat(_tokenized(order, tokenize), count, body, end)
        else:
            packed, used = pack_window(_tokenized(order, tokenize), count, body, rng)
        if len(packed) < count:
            raise SourceError(_too_small(name, used, count, length, packing))
        head = [] if begin is None else [begin]
        drawn += [(name, head + row) for row in packed]
        described[name] = {
            "rows": count,
            "documents": len(documents),
            "sha256": documents_hash(documents),
            "drawn": [document.id for document, _ in used],
        }
    shuffle = np.random.default_rng(seed).permutation(len(drawn))
    ids = torch.tensor([drawn[i][1] for i in shuffle], dtype=torch.int64)
    manifest = {
        "kind": "calibration set",
        "mix": mix.weights,
        "rows": rows,
        "length": length,
        "seed": seed,
        "packing": packing,
        "begin_token": begin,
        "tokenizer": opened.tokenizer_fingerprint,
        "sources": described,
    }
    made = CalibrationSet(ids, tuple(drawn[i][0] for i in shuffle), manifest)
    manifest["sha256"] = made.sha256
    return made


def pack_concat(
    documents: Iterator[tuple[Document, list[int]]], rows: int, length: int, end: int | None
) -> tuple[list[list[int]], list[tuple[Document, list[int]]]]:
    """Join documents by the end token (if any) and cut the first `rows` rows of `length` ids.

    Returns the rows (fewer if the documents ran out) and the documents used.
    """
    stream: list[int] = []
    used: list[tuple[Document, list[int]]] = []
    for document, ids in documents:
        if len(stream) >= rows * length:
            break
        used.append((document, ids))
        stream += ids if end is None else [*ids, end]
    whole = min(rows, len(stream) // length)
    return [stream[i * length : (i + 1) * length] for i in range(whole)], used


def pack_window(
    documents: Iterator[tuple[Document, list[int]]],
    rows: int,
    length: int,
    rng: np.random.Generator,
) -> tuple[list[list[int]], list[tuple[Document, list[int]]]]:
    """Draw one random window of `length` ids from each document that is long enough.

    As the SparseGPT and Wanda papers draw C4, but without replacement: no document gives two
    windows. Returns the rows (fewer if the documents ran out) and the documents used.
    """
    packed: list[list[int]] = []
    used: list[tuple[Document, list[int]]] = []
    for document, ids in documents:
        if len(packed) == rows:
            break
        if len(ids) >= length:
            start = int(rng.integers(0, len(ids) - length + 1))
            packed.append(ids[start : start + length])
            used.append((document, ids))
    return packed, used


def tokenizer_function(tokenizer: Any) -> Tokenize:
    """Return a function from texts to ids without special tokens and without warnings."""

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return tokenize


def begin_token(tokenizer: Any) -> int | None:
    """Return the token the tokenizer itself puts before every text, or None."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def _tokenized(
    documents: list[Document], tokenize: Tokenize
) -> Iterator[tuple[Document, list[int]]]:
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        yield from zip(batch, tokenize([document.text for document in batch]), strict=True)


def _seed_of(seed: int, name: str) -> list[int]:
    """Give every source a stream of its own, so that adding one does not move the others."""
    return [seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")]


def _too_small(
    name: str, used: list[tuple[Document, list[int]]], rows: int, length: int, packing: Packing
) -> str:
    needed = rows * length
    if packing == "concat":
        has = sum(len(ids) + 1 for _, ids in used)
        return (
            f"source {name} has {has} tokens, but {rows} rows of {length} need {needed}: ask "
            "for fewer or shorter rows, or give it less weight"
        )
    return (
        f"source {name} has {len(used)} documents of at least {length} tokens, but {rows} rows "
        f"need as many ({needed} tokens): ask for fewer or shorter rows, or --packing concat"
    )
