"""Build a calibration set from a mix: shuffle documents, tokenise, check for leakage, and pack.

Rows have no padding, and each row has text of one source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.calibration.dataset import SET_KIND, CalibrationSet
from calmix.calibration.leakage import Guard, Tokenized
from calmix.calibration.tokenizer import HasTokenizer, begin_token, token_ids
from calmix.errors import InputError, ModelError, SourceError
from calmix.models.chat_template import templated
from calmix.sources.documents import Document
from calmix.sources.local import LocalFile
from calmix.sources.mixes import Mix
from calmix.sources.registry import Source, documents_hash, get_source

TOKENISED_AT_ONCE = 64  # documents tokenised at a time
CHARACTERS = 4  # of a token, roughly


def rows_per_source(mix: Mix, rows: int) -> dict[str, int]:
    """Split `rows` by weight with the largest-remainder method; the counts add up to `rows`.

    Ties between remainders go to the source named first.
    """
    exact = {name: weight * rows for name, weight in mix.items()}
    # Weights such as 0.1 are not exact in binary: treat integers up to rounding as integers.
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: round(counts[name] - exact[name], 9))
    for name in order[: rows - sum(counts.values())]:
        counts[name] += 1
    return counts


Packed = tuple[list[list[int]], list[Tokenized]]  # rows, and the documents used, in order


def pack_concat(documents: Iterator[Tokenized], rows: int, length: int, end: int | None) -> Packed:
    """Join documents with the end token (if any) and cut the first `rows` rows of `length` ids.

    There are fewer rows if the documents run out; a partial last row is dropped.
    """
    stream: list[int] = []
    used: list[Tokenized] = []
    for document, ids in documents:
        used.append((document, ids))
        closed = document.messages is not None and end in ids[-2:]  # by the chat template
        stream += ids if end is None or closed else [*ids, end]
        if len(stream) >= rows * length:
            break
    whole = min(rows, len(stream) // length)
    return [stream[i * length : (i + 1) * length] for i in range(whole)], used


def pack_pieces(
    documents: Iterator[Tokenized], rows: int, length: int, rng: np.random.Generator
) -> Packed:
    """Cut documents into rows, and take `rows` of them at random."""
    used = list(documents)
    pieces = [
        ids[at : at + length] for _, ids in used for at in range(0, len(ids) - length + 1, length)
    ]
    return [pieces[at] for at in rng.permutation(len(pieces))[:rows]], used


def pack_window(
    documents: Iterator[Tokenized], rows: int, length: int, rng: np.random.Generator
) -> Packed:
    """Take one random window of `length` ids from each document that is long enough.

    The SparseGPT and Wanda papers sample C4 in this way, but can take several windows from one
    document. There are fewer rows if the documents run out.
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
    return packed, used


def build(
    mix: Mix,
    opened: HasTokenizer,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    packing: str = "concat",
    guard: Guard | None = None,
    own: Mapping[str, Source] = {},
    tick: Callable[[str], None] = lambda name: None,
) -> CalibrationSet:
    """Build a calibration set of `rows` full rows of `length` tokens from a mix of sources.

    Each row comes from one source; `rows_per_source` gives their numbers, and all rows are
    shuffled. If the tokenizer puts a begin token before text, every row begins with it.

    `packing` is `concat` (documents joined with the end token) or `window` (a random window of each
    long document); `guard` drops documents that leak, `tick` is called after each source.
    """
    head, end = begin_token(opened.tokenizer), opened.tokenizer.eos_token_id
    body = length - len(head)
    if body < 1:
        raise InputError(f"length {length} leaves no room for text after the begin token")
    counts = {name: count for name, count in rows_per_source(mix, rows).items() if count}
    drawn: list[tuple[str, list[int]]] = []
    described: dict[str, dict[str, Any]] = {}
    for name, count in counts.items():
        source = get_source(name, own)
        documents = list(source.documents())
        # Each source has its own random stream, so that adding one does not change the others; that
        # of a file named by its path depends on the file's name, not on its folder.
        key = name
        if isinstance(source.reader, LocalFile) and name not in own:
            key = source.reader.path.resolve().name
        digest = hashlib.sha256(key.encode()).digest()[:8]
        rng = np.random.default_rng([seed, int.from_bytes(digest, "little")])
        order = [documents[i] for i in rng.permutation(len(documents))]
        stream = tokenized(order, opened.tokenizer, name)
        if guard is not None:
            stream = (one for one in stream if guard.passes(name, one[0].id, one[0].text))
        if packing == "concat" and _few_documents(documents, count, body):
            packed, used = pack_pieces(stream, count, body, rng)
        elif packing == "concat":
            packed, used = pack_concat(stream, count, body, end)
        else:
            packed, used = pack_window(stream, count, body, rng)
        if guard is not None:
            guard.check_share(name, stream)
        if len(packed) < count:
            hint = "give it less weight in the mix"
            if len(counts) == 1:
                hint = f"mix it with another source ({name}:1,encyclopedia:1)"
            if packing == "window":
                hint = "use --packing concat"
            raise SourceError(
                f"source {name} has text for {len(packed)} rows of {length} tokens, not "
                f"{count}: add text, {hint}, or ask for fewer rows (calibrate --rows; compress "
                "--effort quick)"
            )
        described[name] = {
            "rows": count,
            "version": source.reader.version,
            "licence": source.licence,
            "documents": len(documents),
            "sha256": documents_hash(documents),
            "drawn": [document.id for document, _ in used],
            "drawn_tokens": sum(len(ids) for _, ids in used),
        }
        drawn += [(name, head + row) for row in packed]
        tick(name)
    drawn = [drawn[at] for at in np.random.default_rng(seed).permutation(len(drawn))]
    names, ids = zip(*drawn, strict=True)
    manifest = {
        "kind": SET_KIND,
        "model": {"name": opened.name},
        "mix": mix,
        "rows": rows,
        "length": length,
        "seed": seed,
        "packing": packing,
        **checks(opened, guard),
        "own": {name: own[name].model_dump(mode="json") for name in counts if name in own},
        "sources": described,
    }
    return hashed(torch.tensor(ids), names, manifest)


def _few_documents(documents: list[Document], rows: int, length: int) -> bool:
    """Whether joined documents would give rows from the beginnings of one or few of them only: one
    document, or fewer than rows, each of several rows and all together of twice as many."""
    sizes = [len(one.text) // CHARACTERS // length for one in documents]  # in rows
    return len(sizes) == 1 or (
        len(sizes) < rows and min(sizes, default=0) > 3 and sum(sizes) > 2 * rows
    )


def checks(opened: HasTokenizer, guard: Guard | None) -> dict[str, Any]:
    """Return what a manifest says of the tokenizer and of leakage."""
    return {
        "begin_token": next(iter(begin_token(opened.tokenizer)), None),
        "tokenizer": opened.tokenizer_fingerprint,
        "leakage": "off" if guard is None else guard.report(),
    }


def hashed(ids: Tensor, names: Sequence[str], manifest: dict[str, Any]) -> CalibrationSet:
    """Return a new set, with the hash of its ids added to its manifest."""
    drawn = CalibrationSet(ids, tuple(names), manifest)
    manifest["sha256"] = drawn.sha256
    return drawn


def tokenized(
    documents: list[Document],
    tokenizer: Any,
    name: str,
    *,
    batch: int = TOKENISED_AT_ONCE,
    characters: int | None = None,
) -> Iterator[Tokenized]:
    """Yield a source's documents with the token ids of their first `characters`, or of all; chats
    in the model's chat template."""
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        texts = [_formatted(document, tokenizer, name)[:characters] for document in part]
        yield from zip(part, token_ids(tokenizer, texts), strict=True)


def _formatted(document: Document, tokenizer: Any, name: str) -> str:
    """Return the text of a source's document; of a chat in the model's chat template, if any."""
    if document.messages is None or not getattr(tokenizer, "chat_template", None):
        return document.text
    try:
        text = templated(tokenizer, document.messages)
    except ModelError:
        raise
    except Exception as error:  # templates can raise anything
        why = " ".join(str(error).split())[:160]
        raise SourceError(
            f"source {name}: chat {document.id} does not fit the model's chat template ({why}): "
            "change the roles or the order of its messages, or remove it"
        ) from error
    for one in document.messages:
        if (
            one["role"] not in ("system", "assistant", "tool")
            and one["content"].strip() not in text
        ):
            raise SourceError(
                f"source {name}: the model's chat template leaves out what '{one['role']}' says in "
                f"chat {document.id}: change the role"
            )
    return text.removeprefix(tokenizer.bos_token or "")
