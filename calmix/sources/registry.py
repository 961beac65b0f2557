"""The registry of sources: builtin ones from a YAML file, and local files by path."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from calmix.errors import SourceError, nearest
from calmix.sources.readers import FORMATS, AnyReader, Document, LocalFile


class Source(BaseModel):
    """A named source of text. `dimension` is what it leans to; a user's file has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dimension: str
    kind: str
    licence: str
    size: str
    description: str
    reader: AnyReader

    def documents(self) -> Iterator[Document]:
        """Yield the documents, in a fixed order."""
        try:
            yield from self.reader.read()
        except SourceError as error:
            if self.name in str(error):
                raise
            raise SourceError(f"source {self.name}: {error}") from error


@functools.cache
def builtin_sources() -> dict[str, Source]:
    """Return the builtin sources by name."""
    text = resources.files("calmix.sources").joinpath("builtin.yaml").read_text(encoding="utf-8")
    return {name: Source(name=name, **value) for name, value in yaml.safe_load(text).items()}


def get_source(name: str) -> Source:
    """Return a builtin source by name, or a local file by path.

    Raises:
        SourceError: no such source or file, with the nearest names.
    """
    known = builtin_sources()
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.suffix.lower() in FORMATS or path.exists() or "/" in name:
        if path.is_dir():
            raise SourceError(f"{path} is a folder: name a file ({', '.join(FORMATS)})")
        if not path.is_file():
            raise SourceError(f"there is no file {path}")
        return Source(
            name=name,
            dimension="-",
            kind="local file",
            licence="the user's own",
            size=f"{path.stat().st_size / 1e6:.1f} MB",
            description=str(path),
            reader=LocalFile(type="file", path=path),
        )
    raise SourceError(f"unknown source '{name}': {nearest(name, known)}")


def documents_hash(documents: list[Document]) -> str:
    """Return a SHA-256 over the identifiers and texts of documents, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.text):
            raw = part.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
