"""Data sets on the Hugging Face hub, streamed up to a budget and kept in the cache.

Once streamed, a source works offline and gives the same documents in every later run.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from calmix.errors import SourceError, first_line
from calmix.files import cache_dir, sha256_json, write_bytes
from calmix.progress import quiet
from calmix.sources.readers import Document, Reader, fill, lookup

BUDGET = 8_000_000  # characters: some 2 million tokens, 60 times a usual calibration set


class Answer(BaseModel):
    """Where the right choice's text is: `label`, found among `labels`, names one of `texts`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    labels: str
    texts: str


class HubText(Reader):
    """Rows of a data set on the hub, from its beginning up to a budget of `characters`.

    `subset` is the data set's configuration; of several, each gets an equal part of the budget.
    Without a `template` the field `text` or `content` is taken. Where an article is spread over
    rows, `starts` is a regular expression that matches an article's first row.
    """

    type: Literal["hub"]
    id: str
    subset: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None
    template: str | None = None
    answer: Answer | None = None
    starts: str | None = None
    characters: Annotated[int, Field(gt=0)] = BUDGET

    origin: ClassVar[str] = "hub"

    @property
    def subsets(self) -> list[str | None]:
        """The configurations to read; None is the data set's only one."""
        return list(self.subset) if isinstance(self.subset, list) else [self.subset]

    @property
    def version(self) -> str:
        parts = [self.id, *self.subsets, self.split, self.revision or "main"]
        return " ".join(part for part in parts if part)

    @property
    def availability(self) -> str:
        return "offline (fetched before)" if self._kept().is_file() else "hub"

    def read(self) -> Iterator[Document]:
        if not (kept := self._kept()).is_file():
            lines = [json.dumps([one.id, one.text]) + "\n" for one in self._documents()]
            write_bytes(kept, gzip.compress("".join(lines).encode(), mtime=0))
        try:
            with gzip.open(kept, "rt", encoding="utf-8") as held:
                for line in held:
                    yield Document(*json.loads(line))
        except (OSError, EOFError, ValueError) as error:
            raise SourceError(f"{kept} is damaged: delete it to fetch it again") from error

    def _kept(self) -> Path:
        name = sha256_json(self.model_dump(mode="json"))[:16]
        return cache_dir() / "sources" / f"{name}.jsonl.gz"

    def _documents(self) -> Iterator[Document]:
        """Yield the documents of every subset: a row each, or all rows up to the next start."""
        for subset in self.subsets:
            left, part, first = -(-self.characters // len(self.subsets)), "", 0
            for number, row in enumerate(chain(_stream(self, subset), [None])):
                text = "" if row is None else self._text(row, number)
                if row is None or self.starts is None or re.search(self.starts, text):
                    if document := part.strip():
                        yield Document(f"{subset or self.split}/{first}", document)
                        left -= len(document)
                        if left <= 0:
                            break
                    part, first = "", number
                part += text if text.endswith("\n") else text + "\n"

    def _text(self, row: dict[str, Any], number: int) -> str:
        try:
            if (asked := self.answer) is not None:
                labels, texts = lookup(row, asked.labels), lookup(row, asked.texts)
                wanted = lookup(row, asked.label)
                row = {**row, "answer": texts[labels.index(wanted)] if wanted in labels else ""}
            if self.template is not None:
                return fill(self.template, row)
        except SourceError as error:
            raise SourceError(f"{self.id} row {number}: {error}") from error
        for key in ("text", "content"):
            if isinstance(found := row.get(key), str):
                return found
        raise SourceError(
            f"{self.id} row {number}: there is no field 'text' or 'content' (has: "
            f"{', '.join(row)}): name the fields in a template, in a YAML file of sources"
        )


def _stream(reader: HubText, subset: str | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one subset."""
    try:
        with quiet():
            import datasets

            rows = iter(datasets.load_dataset(
                reader.id, subset, split=reader.split, streaming=True, revision=reader.revision
            ))  # fmt: skip
        while True:
            with quiet():
                row = next(rows, None)
            if row is None:
                return
            yield row
    except Exception as error:  # the hub client gives being offline many forms
        which = f"{reader.id} ({', '.join(filter(None, [subset, reader.split]))})"
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise SourceError(f"{which} cannot be read: {first_line(error)}") from error
        raise SourceError(
            f"the hub cannot be reached for {which}: go online once to fetch it, copy "
            f"{cache_dir() / 'sources'} from a machine that has, or take an offline source "
            "(calmix calibrate sources)"
        ) from error
