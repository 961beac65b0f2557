"""Build a calibration set: documents in seeded order, tokenised, checked, packed into full rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import numpy as np
import torch

from calmix.calibration.leakage import Guard
from calmix.calibration.mix import Mix, rows_per_source
from calmix.calibration.packing import PACKINGS, Packed, Packing, pack_concat, pack_window
from calmix.calibration.select import BY_MODEL, OVERSAMPLE, SELECTORS, Selection
from calmix.calibration.set import CalibrationSet
from calmix.errors import InputError, SourceError, nearest
from calmix.sources import Document, Source, get_source
from calmix.sources.readers import LocalFile
from calmix.sources.registry import documents_hash

BATCH = 64  # documents handed to the tokenizer at a time

Tokenize = Callable[[list[str]], list[list[int]]]


class HasTokenizer(Protocol):
    """What building needs of a model: an `OpenModel` has it, and so has an `OpenTokenizer`."""

    @property
    def name(self) -> str:
        """The model as the user named it."""

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of transformers."""

    @property
    def context(self) -> int | None:
        """Longest sequence the model was made for, in tokens."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of what decides the tokenizer's ids."""


@dataclass(frozen=True)
class _Draw:
    source: Source
    packed: Packed
    documents: int
    sha256: str


def build(
    mix: Mix,
    opened: HasTokenizer,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    packing: Packing = "concat",
    select: Selection = "random",
    guard: Guard | None = None,
    own: Mapping[str, Source] | None = None,
    tick: Callable[[str], None] | None = None,
) -> CalibrationSet:
    """Draw a calibration set of `rows` full rows of `length` tokens from a mix of sources.

    Each row comes from one source; rows per source are shared out by largest remainder. The
    rows of all sources are shuffled together. If the model's tokenizer puts a begin token
    before text, every row begins with it.

    Args:
        mix: source names and weights.
        opened: the model, or its tokenizer alone.
        rows: number of rows.
        length: tokens in each row.
        seed: decides the documents, the windows and the order of the rows.
        packing: `concat` (documents joined by the end token) or `window` (a random window of
            each long document).
        select: `random`, or `zipcal` or `igsp` to choose among four times as many rows; `igsp`
            takes the model and not its tokenizer alone.
        guard: drops documents that share a run of tokens with an item of a suite.
        own: the user's own sources by name.
        tick: called with the name of each source once it is drawn.

    Raises:
        InputError: rows or length not positive, length beyond the model's context, unknown
            packing or selector.
        SourceError: a source is unknown, unreadable, too small for its rows, or leaks.
    """
    check_request(rows, length, packing, select, opened.context)
    if select in BY_MODEL:
        as_model(opened, f"--select {select}")
    tokenize = tokenizer_function(opened.tokenizer)
    begin = begin_token(opened.tokenizer)
    end = opened.tokenizer.eos_token_id
    body = length - (begin is not None)
    if body < 1:
        raise InputError(f"length {length} leaves no room for text after the begin token")
    counts = {name: n for name, n in rows_per_source(mix, rows).items() if n}
    sources = {name: get_source(name, own) for name in counts}
    pool = 1 if select == "random" else OVERSAMPLE
    draws: dict[str, _Draw] = {}
    for name, count in counts.items():
        documents = list(sources[name].documents())
        rng = np.random.default_rng(_seed_of(seed, sources[name], own))
        order = [documents[i] for i in rng.permutation(len(documents))]
        stream = _tokenized(order, tokenize)
        if guard is not None:
            stream = guard.filter(name, stream)
        if packing == "concat":
            packed = pack_concat(stream, pool * count, body, end)
        else:
            packed = pack_window(stream, pool * count, body, rng)
        if guard is not None:
            guard.verdict(name, stream)
        if len(packed.rows) < count:
            raise SourceError(_too_small(name, packed, count, length, body, packing, end))
        draws[name] = _Draw(sources[name], packed, len(documents), documents_hash(documents))
        if tick is not None:
            tick(name)
    head = [] if begin is None else [begin]
    chosen = _chosen(draws, counts, select, seed, opened, head)
    drawn = [(name, i) for name in counts for i in chosen[name]]
    drawn = [drawn[at] for at in np.random.default_rng(seed).permutation(len(drawn))]
    chosen = {name: [i for source, i in drawn if source == name] for name in counts}
    ids = torch.tensor([head + draws[name].packed.rows[i] for name, i in drawn])
    model: dict[str, Any] = {"name": opened.name}
    if select in BY_MODEL:
        model |= model_record(opened)
    manifest = {
        "kind": "calibration set",
        "model": model,
        "mix": mix.weights,
        "rows": rows,
        "length": length,
        "seed": seed,
        "packing": packing,
        "select": select,
        "begin_token": begin,
        "tokenizer": opened.tokenizer_fingerprint,
        "leakage": "off" if guard is None else guard.report(),
        "own": own_record(own, draws),
        "sources": {name: _described(draw, chosen[name]) for name, draw in draws.items()},
    }
    made = CalibrationSet(ids, tuple(name for name, _ in drawn), manifest)
    manifest["sha256"] = made.sha256
    return made


def check_request(rows: int, length: int, packing: str, select: str, context: int | None) -> None:
    """Refuse a request no calibration set can answer.

    Raises:
        InputError: rows or length not positive, length beyond the context, an unknown word.
    """
    if rows < 1 or length < 1:
        raise InputError(f"rows and length must be positive, not {rows} and {length}")
    if context is not None and length > context:
        raise InputError(f"length {length} is beyond the model's context of {context} tokens")
    if packing not in PACKINGS:
        raise InputError(f"unknown packing '{packing}': {nearest(packing, PACKINGS)}")
    if select not in get_args(Selection):
        raise InputError(f"unknown selection '{select}': {nearest(select, get_args(Selection))}")


def as_model(opened: HasTokenizer, what: str) -> Any:
    """Return an open model as it is.

    Raises:
        InputError: it is a tokenizer alone.
    """
    if getattr(opened, "model", None) is None:
        raise InputError(f"{what} runs the model: open it, not its tokenizer alone")
    return opened


def model_record(opened: Any) -> dict[str, Any]:
    """Return what a manifest says of an open model that was run for the set."""
    weight = next(opened.model.parameters())
    return {
        "name": opened.name,
        "fingerprint": opened.fingerprint,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }


def own_record(own: Mapping[str, Source] | None, used: Iterable[str]) -> dict[str, Any]:
    """Return the user's own sources among those used, as JSON-serialisable values."""
    known = own or {}
    return {name: known[name].model_dump(mode="json") for name in used if name in known}


def _log_perplexity(opened: Any, rows: list[list[int]]) -> list[float]:
    """Return the mean -log p of each row's tokens under the model, the first token's left out."""
    from calmix.capability.likelihood import row_nll

    return row_nll(opened.model, torch.tensor(rows)).double().mean(1).tolist()


def _chosen(
    draws: dict[str, _Draw],
    counts: dict[str, int],
    select: str,
    seed: int,
    opened: HasTokenizer,
    head: list[int],
) -> dict[str, list[int]]:
    """Return for each source the indices of its packed rows that go into the set, ascending."""
    if select == "random":  # the rows are a seeded draw already
        return {name: list(range(count)) for name, count in counts.items()}
    place = [(name, i) for name, draw in draws.items() for i in range(len(draw.packed.rows))]
    rows = [head + draws[name].packed.rows[i] for name, i in place]
    by_model: dict[str, Any] = {}
    if select in BY_MODEL:
        by_model["log_perplexity"] = _log_perplexity(opened, rows)
    picked = SELECTORS[select](rows, [name for name, _ in place], counts, seed, **by_model)
    chosen: dict[str, list[int]] = {name: [] for name in counts}
    for index in sorted(picked):
        name, i = place[index]
        chosen[name].append(i)
    return chosen


def _described(draw: _Draw, chosen: list[int]) -> dict[str, Any]:
    """Return what the manifest says of a source; `chosen` are its rows in the set's order."""
    packed = draw.packed
    held = held_documents(packed.spans[i] for i in chosen)
    place = {document: at for at, document in enumerate(held)}
    lengths = [len(packed.used[d][1]) for d in held]
    return {
        "rows": len(chosen),
        "candidates": len(packed.rows),
        "version": draw.source.version,
        "licence": draw.source.licence,
        "documents": draw.documents,
        "sha256": draw.sha256,
        "drawn": [packed.used[d][0].id for d in held],
        "drawn_tokens": sum(lengths),
        "lengths": lengths,
        "spans": [[place[first], place[last]] for first, last in (packed.spans[i] for i in chosen)],
    }


def held_documents(spans: Iterable[Sequence[int]]) -> list[int]:
    """Return the documents rows hold text of, ascending, from the first and last of each row."""
    return sorted({document for first, last in spans for document in range(first, last + 1)})


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


def _seed_of(seed: int, source: Source, own: Mapping[str, Source] | None) -> list[int]:
    """Give every source a stream of its own, so that adding one does not move the others.

    A file that is named by its path has that of its last part, wherever it lies.
    """
    name, reader = source.name, source.reader
    if isinstance(reader, LocalFile) and name not in (own or {}):
        name = reader.path.resolve().name
    return [seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")]


def _too_small(
    name: str, packed: Packed, rows: int, length: int, body: int, packing: Packing, end: int | None
) -> str:
    if packing == "concat":
        has = sum(len(ids) + (end is not None) for _, ids in packed.used)
        return (
            f"source {name} has {has} tokens, but {rows} rows of {length} need {rows * body}: ask "
            "for fewer or shorter rows, or give it less weight"
        )
    return (
        f"source {name} has {len(packed.used)} documents of at least {body} tokens, but {rows} "
        f"rows need as many ({rows * body} tokens): ask for fewer or shorter rows, or "
        "--packing concat"
    )
