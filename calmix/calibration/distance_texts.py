"""Texts to measure distance on: one per dimension, in no builtin source, or the user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calmix.calibration.build import pack_concat, tokenized
from calmix.calibration.tokenizer import HasTokenizer, begin_token
from calmix.errors import InputError, SourceError
from calmix.evaluation.measures import RIGHT_OR_WRONG
from calmix.evaluation.suites import ARCHIVE, Suite
from calmix.files import user_path
from calmix.options import named_values
from calmix.sources.documents import Reader
from calmix.sources.offline import AssetText
from calmix.sources.registry import local_file
from calmix.yaml_files import packaged

TEXT_ROWS, TEXT_LENGTH, TEXT_SEED = 8, 256, 0
TOKEN_CHARACTERS = 16  # characters per token, more than any useful text has on average


@functools.cache
def builtin_readers() -> dict[str, list[AssetText]]:
    """Return the readers of the builtin texts of each dimension (texts.yaml)."""
    return {
        dimension: [AssetText(type="asset", asset=ARCHIVE, **entry) for entry in entries]
        for dimension, entries in packaged("calibration/texts.yaml").items()
    }


def parse_texts(pairs: Sequence[str]) -> dict[str, Path]:
    """Return the user's own texts by dimension, each given as `NAME=PATH`."""
    named = named_values("--text", pairs, "NAME=PATH, such as code=mine.jsonl")
    paths = {name: user_path(path) for name, path in named.items()}
    for name, path in paths.items():
        try:
            local_file(str(path)).check()
        except SourceError as error:
            raise InputError(f"--text {name}: {error}") from error
    return paths


def texts_for(
    suite: Suite, own: Mapping[str, Path] | None = None
) -> Callable[[HasTokenizer], dict[str, Tensor]] | None:
    """Return `texts` of a suite's dimensions and the user's own; None if there are none, or only
    answers are scored."""
    likely = any(one.primary not in RIGHT_OR_WRONG for one in suite.tasks.values())
    known = [name for name in suite.dimensions if likely and name in builtin_readers()]
    return functools.partial(texts, own=own, dimensions=known) if known or own else None


def texts(
    opened: HasTokenizer,
    own: Mapping[str, Path] | None = None,
    *,
    dimensions: Sequence[str] | None = None,
    rows: int = TEXT_ROWS,
    length: int = TEXT_LENGTH,
) -> dict[str, Tensor]:
    """Return rows of token ids by dimension, of the builtin texts and the user's own.

    Documents are in a fixed random order and joined with the end token; the readers of a dimension
    give equal numbers of rows. Rows begin with the tokenizer's begin token, if it puts one before
    text, and are no longer than the model's context. The user's `own` files replace builtin texts
    of the same name, or are added, and can give fewer rows; only the builtin texts of `dimensions`
    are used, if that is given.
    """
    known = builtin_readers()
    wanted = known if dimensions is None else dimensions
    readers: dict[str, Sequence[Reader]] = {name: known[name] for name in known if name in wanted}
    readers |= {name: [local_file(str(path))] for name, path in (own or {}).items()}
    if not readers:
        raise InputError(f"no builtin text for {', '.join(dimensions or ())}: give --text")
    tokenizer = opened.tokenizer
    head, length = begin_token(tokenizer), min(length, opened.context or length)
    rows_of: dict[str, Tensor] = {}
    for name, of_name in readers.items():
        packed_rows: list[list[int]] = []
        tokens = 0
        for number, reader in enumerate(of_name):
            share = rows // len(of_name) + (number < rows % len(of_name))
            most, documents = TOKEN_CHARACTERS * share * length, list(reader.read())
            order = np.random.default_rng(TEXT_SEED).permutation(len(documents))
            ordered = [documents[i] for i in order]
            stream = tokenized(ordered, tokenizer, name, batch=1, characters=most)
            packed, used = pack_concat(stream, share, length - len(head), tokenizer.eos_token_id)
            packed_rows += [head + row for row in packed]
            tokens += sum(len(ids) for _, ids in used)
        if not packed_rows:
            raise InputError(f"the text {name} has {tokens} tokens, fewer than a row of {length}")
        rows_of[name] = torch.tensor(packed_rows, dtype=torch.int64)
    return rows_of
