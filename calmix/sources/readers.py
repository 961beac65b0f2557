"""Readers: how the documents of a source are read, one function per kind of place.

A reader yields documents in a fixed order, so that the same source gives the same documents on
the same machine. Drawing at random is the calibration set's work, not the reader's.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from calmix import assets
from calmix.errors import MissingExtraError, SourceError


@dataclass(frozen=True)
class Document:
    """A piece of text with an identifier that is unique and stable within its source."""

    id: str
    text: str


class _Reader(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PythonStdlib(_Reader):
    """The modules of the running Python's standard library, tests and bundled pip left out."""

    type: Literal["python-stdlib"]

    def read(self) -> Iterator[Document]:
        """Yield one document a module, in order of path."""
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
        skip |= {"ensurepip", "lib2to3", "pydoc_data"}
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if skip & set(relative.parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if len(text) >= 200:
                yield Document(relative.as_posix(), text)


class PythonDocs(_Reader):
    """The language reference as pydoc carries it."""

    type: Literal["python-docs"]

    def read(self) -> Iterator[Document]:
        """Yield one document a topic, in order of name."""
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise SourceError("this Python was installed without pydoc_data") from None
        for name in sorted(topics):
            yield Document(name, topics[name])


class Without(_Reader):
    """Items to leave out: those whose `field` also stands in one of the `members`."""

    members: list[str]
    field: str


class AssetText(_Reader):
    """Text out of the rendered requests of a data archive.

    `template` is filled from each request's fields; `{answer}` is the right choice's text.
    Requests that give the same text (one per choice of a question, say) are one document.
    """

    type: Literal["asset"]
    asset: str
    members: list[str]
    template: str
    after: str | None = None
    before: str | None = None
    items: Literal["all", "odd"] = "all"
    without: Without | None = None

    def read(self) -> Iterator[Document]:
        """Yield each distinct text once, in order of appearance."""
        left_out: set[str] = set()
        if self.without is not None:
            for member in self.without.members:
                for request in assets.read_jsonl(self.asset, member):
                    left_out.add(lookup(request, self.without.field))
        seen: set[str] = set()
        for member in self.members:
            for request in assets.read_jsonl(self.asset, member):
                if self.items == "odd" and int(request["doc_id"]) % 2 == 0:
                    continue
                if self.without is not None and lookup(request, self.without.field) in left_out:
                    continue
                text = self._cut(fill(self.template, _with_answer(request)))
                if text and text not in seen:
                    seen.add(text)
                    yield Document(f"{member.split('/')[-3]}/{request['doc_id']}", text)

    def _cut(self, text: str) -> str:
        if self.after is not None:
            text = text.partition(self.after)[2]
        if self.before is not None:
            text = text.partition(self.before)[0]
        return text.strip()


class ReasoningGym(_Reader):
    """Problems with answers from reasoning-gym's generators, which are seeded."""

    type: Literal["reasoning-gym"]
    datasets: list[str]
    documents: Annotated[int, Field(gt=0)]

    def read(self) -> Iterator[Document]:
        """Yield `documents` problems, the generators taking turns."""
        try:
            import reasoning_gym
        except ImportError:
            raise MissingExtraError("reasoning-gym problems", "reasoning") from None
        size = -(-self.documents // len(self.datasets))
        made = [reasoning_gym.create_dataset(name, size=size, seed=0) for name in self.datasets]
        for index in range(self.documents):
            which, item = index % len(made), index // len(made)
            entry = made[which][item]
            text = f"{entry['question'].strip()}\nAnswer: {entry['answer']}"
            yield Document(f"{self.datasets[which]}/{item}", text)


class LocalFile(_Reader):
    """A local `.txt` (one document), `.jsonl` or `.parquet` (one a row, field `text`) file."""

    type: Literal["file"]
    path: Path
    field: str = "text"

    def read(self) -> Iterator[Document]:
        """Yield the file's documents in order.

        Raises:
            SourceError: the file is missing, empty, binary, or a row lacks the field.
        """
        path = self.path
        if not path.is_file():
            raise SourceError(f"there is no file {path}")
        read = FORMATS.get(path.suffix.lower())
        if read is None:
            raise SourceError(f"cannot read {path}: known endings are {', '.join(FORMATS)}")
        found = False
        for document in read(path, self.field):
            if document.text.strip():
                found = True
                yield document
        if not found:
            raise SourceError(f"{path} is empty: it holds no text")


def _read_txt(path: Path, field: str) -> Iterator[Document]:
    yield Document("0", _decoded(path, path.read_bytes()))


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decoded(path, raw, f" line {number}")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SourceError(f"{path} line {number} is not JSON: {error}") from error
            yield Document(str(number), _field(row, field, f"{path} line {number}"))


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError(f"reading {path}", "parquet") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises its own classes for foreign bytes
        raise SourceError(f"{path} is not a parquet file") from error
    if field not in file.schema_arrow.names:
        raise SourceError(f"{path} has no column '{field}' (has: {file.schema_arrow.names})")
    number = 0
    for batch in file.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            yield Document(str(number), _field({field: value}, field, f"{path} row {number}"))
            number += 1


FORMATS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _decoded(path: Path, raw: bytes, where: str = "") -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}{where} is not UTF-8 text (byte {error.start}): convert it first"
        ) from error
    if "\0" in text:
        raise SourceError(f"{path}{where} is binary, not text")
    return text


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise SourceError(f"{where} has no field '{field}' (has: {has})")
    if not isinstance(row[field], str):
        raise SourceError(f"{where}: field '{field}' is not a string")
    return row[field]


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path of nested mappings.

    Raises:
        SourceError: a part of the path is missing.
    """
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            has = ", ".join(value) if isinstance(value, Mapping) else type(value).__name__
            raise SourceError(f"there is no field '{path}' (has: {has})")
        value = value[part]
    return value


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Replace each `{dotted.field}` of a template by the row's value.

    Raises:
        SourceError: the template names a field the row lacks.
    """
    return re.sub(r"\{([\w.]+)\}", lambda match: str(lookup(row, match[1])), template)


def _with_answer(request: dict[str, Any]) -> dict[str, Any]:
    doc = request.get("doc", {})
    if "choices" in doc and isinstance(doc.get("gold"), int):
        return {**request, "answer": doc["choices"][doc["gold"]]}
    return request


AnyReader = Annotated[
    PythonStdlib | PythonDocs | AssetText | ReasoningGym | LocalFile,
    Field(discriminator="type"),
]
