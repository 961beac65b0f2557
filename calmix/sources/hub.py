"""Reader of data sets on the hub."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from calmix.errors import SourceError, first_line
from calmix.files import (
    cache_dir,
    check_readable,
    sha256_json,
    write_bytes,
)
from calmix.options import Options
from calmix.progress import quiet
from calmix.sources.documents import Document, Reader, Template, fill, lines, lookup

BUDGET = 8_000_000  # characters: about 2 million tokens, 60 usual calibration sets


class CorrectChoice(Options):
    """Where the correct choice is: the position of `label` in `labels` selects one of `texts`."""

    label: str
    labels: str
    texts: str


class HubText(Reader):
    """Rows of a data set on the hub, from its beginning up to a budget of `characters`.

    `subset` is the data set's configuration; several share the budget equally. Without a `template`
    the field `text` or `content` is used. If articles span several rows, `starts` is a regular
    expression that matches an article's first row.
    """

    type: Literal["hub"]
    id: str
    subset: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None
    template: Template | None = None
    answer: CorrectChoice | None = None
    starts: re.Pattern[str] | None = None
    characters: Annotated[int, Field(gt=0)] = BUDGET

    origin: ClassVar[str] = "hub"

    @property
    def subsets(self) -> list[str | None]:
        """The configurations to read; None is the data set's only one."""
        return [*self.subset] if isinstance(self.subset, list) else [self.subset]

    @property
    def version(self) -> str:
        parts = [self.id, *self.subsets, self.split, self.revision or "main"]
        return " ".join(part for part in parts if part)

    @property
    def availability(self) -> str:
        return "offline (fetched before)" if self.cache_path().is_file() else "hub"

    def read(self) -> Iterator[Document]:
        if not (cached := self.cache_path()).is_file():
            with quiet():
                rows = [json.dumps([one.id, one.text]) + "\n" for one in self._documents()]
            write_bytes(cached, gzip.compress("".join(rows).encode(), mtime=0))
        try:
            with gzip.open(cached, "rt", encoding="utf-8") as file:
                for line in file:
                    key, text = json.loads(line)
                    yield Document(key, lines(text))
        except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
            check_readable(cached)
            raise SourceError(f"{cached} is damaged: delete it to fetch it again") from error

    def cache_path(self) -> Path:
        name = sha256_json(self.model_dump(mode="json"))[:16]
        return cache_dir() / "sources" / f"{name}.jsonl.gz"

    def _documents(self) -> Iterator[Document]:
        """Yield the documents of every subset: one per row, or all rows up to the next start."""
        for subset in self.subsets:
            left, part, first = -(-self.characters // len(self.subsets)), "", 0
            for number, row in enumerate(chain(self._rows(subset), [None])):
                text = "" if row is None else self._text(row, number)
                if row is None or self.starts is None or re.search(self.starts, text):
                    if document := part.strip():
                        yield Document(f"{subset or self.split}/{first}", document)
                        left -= len(document)
                        if left <= 0:
                            break
                    part, first = "", number
                part += text if text.endswith("\n") else text + "\n"

    def _rows(self, subset: str | None) -> Iterator[dict[str, Any]]:
        import datasets

        how = {"split": self.split, "revision": self.revision, "streaming": True}
        try:
            yield from datasets.load_dataset(self.id, subset, **how)
        except Exception as error:  # the hub client raises many kinds when offline
            which = f"{self.id} ({', '.join(filter(None, [subset, self.split]))})"
            # The last is for data sets that are not there, gated or damaged.
            answered = ValueError, RuntimeError, datasets.exceptions.DatasetsError
            if isinstance(error, answered) and not isinstance(error, UnicodeError):
                raise SourceError(f"{which} cannot be read: {first_line(error)}") from error
            raise SourceError(
                f"the hub cannot be reached for {which}: go online once to fetch it, copy "
                f"{cache_dir() / 'sources'} from a machine that has it, or use an offline source "
                "(calmix calibrate sources)"
            ) from error

    def _text(self, row: dict[str, Any], number: int) -> str:
        try:
            if (answer := self.answer) is not None:
                labels, texts = lookup(row, answer.labels), lookup(row, answer.texts)
                label = lookup(row, answer.label)
                row = {**row, "answer": texts[labels.index(label)] if label in labels else ""}
            if self.template is not None:
                return fill(self.template, row)
            values = [row[k] for k in ("text", "content") if isinstance(row.get(k, 0), str | None)]
            if values:
                return next((one for one in values if one is not None), "")
            raise SourceError(
                f"there is no field 'text' or 'content' (has: {', '.join(row)}): name the fields "
                "in a template, in a YAML file of sources"
            )
        except (SourceError, TypeError, AttributeError, IndexError) as error:
            raise SourceError(f"{self.id} row {number}: {error}") from error
