"""Sources on the Hugging Face hub, streamed so that a few megabytes suffice.

What was streamed is kept in the cache: the source then works offline and gives the same
documents in every later run, whatever happens to the hub's copy.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from calmix.errors import SourceError
from calmix.files import cache_dir, sha256_json, write_bytes
from calmix.sources.readers import Document, Reader
from calmix.sources.template import fill, lookup

MIRROR = "CALMIX_HUB_DIR"
BUDGET = 8_000_000  # characters: some 2 million tokens, 60 times a usual calibration set
GUESSES = ("text", "content")  # the field names tried where no template is given


class Answer(BaseModel):
    """Where the right choice's text is: `label`, found among `labels`, names one of `texts`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    labels: str
    texts: str

    def of(self, row: dict[str, Any]) -> str:
        """Return the text of the right choice, or nothing if no label matches."""
        labels, texts = lookup(row, self.labels), lookup(row, self.texts)
        wanted = lookup(row, self.label)
        return texts[labels.index(wanted)] if wanted in labels else ""


class HubText(Reader):
    """Rows of a data set on the hub, from its beginning up to a budget of `characters`.

    `subset` is the data set's configuration; of several, each gets an equal part of the budget.
    Without a `template` the field `text` or `content` is taken. Where an article is spread over
    rows, `starts` is a regular expression that matches an article's first row. With
    CALMIX_HUB_DIR set, a data set `owner/name` that lies in that folder is read from there.
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

    @property
    def origin(self) -> str:
        """Always `hub`."""
        return "hub"

    @property
    def version(self) -> str:
        """The data set's id, subset, split and revision."""
        parts = [self.id, *self._subsets(), self.split, self.revision or "main"]
        return " ".join(part for part in parts if part)

    @property
    def availability(self) -> str:
        """Whether it was fetched before, or has to be."""
        if self._mirror() is not None:
            return "offline (local copy)"
        if self._kept().is_file():
            return "offline (fetched before)"
        return "hub"

    def read(self) -> Iterator[Document]:
        """Yield the documents, from the mirror, the cache or the hub, in that order.

        Raises:
            SourceError: the hub cannot be reached, or a row lacks a field of the template.
        """
        mirror = self._mirror()
        if mirror is not None:
            yield from self._documents(str(mirror))
            return
        kept = self._kept()
        if not kept.is_file():
            documents = list(self._documents(self.id))
            _write_documents(kept, documents)
        yield from _read_documents(kept)

    def _subsets(self) -> list[str | None]:
        return list(self.subset) if isinstance(self.subset, list) else [self.subset]

    def _mirror(self) -> Path | None:
        local = Path(self.id)
        if local.is_absolute() and local.is_dir():
            return local
        root = os.environ.get(MIRROR)
        folder = Path(root).expanduser() / self.id if root else None
        return folder if folder is not None and folder.is_dir() else None

    def _kept(self) -> Path:
        return (
            cache_dir() / "sources" / f"{sha256_json(self.model_dump(mode='json'))[:16]}.jsonl.gz"
        )

    def _documents(self, where: str) -> Iterator[Document]:
        subsets = self._subsets()
        budget = -(-self.characters // len(subsets))
        for subset in subsets:
            left = budget
            rows = enumerate(_stream(where, self.id, subset, self.split, self.revision))
            for document in self._joined(rows, subset or self.split):
                yield document
                left -= len(document.text)
                if left <= 0:
                    break

    def _joined(
        self, rows: Iterable[tuple[int, dict[str, Any]]], prefix: str
    ) -> Iterator[Document]:
        begins = re.compile(self.starts) if self.starts else None
        part: list[str] = []
        first = 0
        for number, row in rows:
            text = self._text(row, number)
            if begins is None:
                if text.strip():
                    yield Document(f"{prefix}/{number}", text.strip())
                continue
            if begins.search(text):
                if joined := "".join(part).strip():
                    yield Document(f"{prefix}/{first}", joined)
                part, first = [], number
            part.append(text if text.endswith("\n") else text + "\n")
        if joined := "".join(part).strip():
            yield Document(f"{prefix}/{first}", joined)

    def _text(self, row: dict[str, Any], number: int) -> str:
        try:
            if self.answer is not None:
                row = {**row, "answer": self.answer.of(row)}
            return fill(self.template or _guess(row), row)
        except SourceError as error:
            raise SourceError(f"{self.id} row {number}: {error}") from error


def _guess(row: dict[str, Any]) -> str:
    for field in GUESSES:
        if isinstance(row.get(field), str):
            return f"{{{field}}}"
    raise SourceError(
        f"there is no field 'text' or 'content' (has: {', '.join(row)}): name the fields in a "
        "template, in a YAML file of sources"
    )


def _stream(
    where: str, name: str, subset: str | None, split: str, revision: str | None
) -> Iterator[dict[str, Any]]:
    with _quiet():
        import datasets
    local = where != name or Path(where).is_absolute()
    try:
        with _quiet():
            rows = iter(
                datasets.load_dataset(
                    where,
                    subset,
                    split=split,
                    streaming=True,
                    revision=None if local else revision,
                )
            )
    except Exception as error:  # the hub client gives being offline many forms
        raise _unreachable(name, subset, split, local, error) from error
    while True:
        try:
            with _quiet():
                row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreachable(name, subset, split, local, error) from error
        yield row


def _unreachable(
    name: str, subset: str | None, split: str, local: bool, error: Exception
) -> SourceError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    which = f"{name} ({subset}, {split})" if subset else f"{name} ({split})"
    if local:
        return SourceError(f"the local copy of {which} cannot be read: {reason}")
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return SourceError(f"the hub's {which} cannot be read: {reason}")
    return SourceError(
        f"the hub cannot be reached for {which}: go online once to fetch it, put a copy at "
        f"{name} in a folder and name that folder in {MIRROR}, or take an offline source "
        "(calmix sources ls)"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the hub client's warnings and retries; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "fsspec")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_documents(path: Path, documents: list[Document]) -> None:
    lines = (json.dumps([one.id, one.text], ensure_ascii=True) + "\n" for one in documents)
    write_bytes(path, gzip.compress("".join(lines).encode(), mtime=0))


def _read_documents(path: Path) -> Iterator[Document]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield Document(*json.loads(line))
    except (OSError, EOFError, ValueError) as error:
        raise SourceError(f"{path} is damaged: delete it to fetch it again") from error
