"""Sources by name: builtin ones, a user's YAML file, local files and hub ids."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from calmix.errors import InputError, SourceError, nearest
from calmix.files import user_path
from calmix.options import Options
from calmix.sources.documents import FIELD, TEXT, Document
from calmix.sources.hub import HubText
from calmix.sources.licences import OWN_LICENCE, Use, use_of
from calmix.sources.local import CODE_ENDINGS, FORMATS, LocalFile
from calmix.sources.mixes import GENERATOR_NAMES, MIXES, OFFLINE, parse_mix
from calmix.sources.offline import AssetText, PackageFiles, PythonText, ReasoningGym
from calmix.yaml_files import first_problem, packaged, read_yaml

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
DATA_VARIABLE = "CALMIX_DATA"  # names a folder of texts to read instead of the hub
ON_HUB = "see its card on the hub"
AnyReader = Annotated[
    PythonText | PackageFiles | AssetText | ReasoningGym | LocalFile | HubText,
    Field(discriminator="type"),
]


class Source(Options):
    """A named source of text. `dimension` is the ability it mainly covers, if known; `local` is the
    file in the folder CALMIX_DATA, if set, to read instead of the hub."""

    name: str
    dimension: str = "-"
    kind: str = "the user's own"
    licence: str = OWN_LICENCE
    size: str = "-"
    description: str = ""
    local: str | None = None
    reader: AnyReader

    @property
    def use(self) -> Use:
        """What the licence permits (`calmix.sources.licences`)."""
        return use_of(self.licence)

    def documents(self) -> Iterator[Document]:
        """Yield the documents, in a fixed order.

        Raises SourceError if the text is missing, unreadable or not as the source's entry says.
        """
        with self._named():
            yield from self.reader.read()

    def check(self) -> list[Path]:
        """Raise SourceError for an unreadable source, as far as possible without downloading.

        Returns the user's own file or folder that it reads, if any.
        """
        with self._named():
            self.reader.check()
        return [self.reader.path] if isinstance(self.reader, LocalFile) else []

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except SourceError as error:
            hub = self.local is not None and isinstance(self.reader, HubText)
            hint = f"; or set {DATA_VARIABLE} to a folder with {self.local}" if hub else ""
            if self.name in str(error) and not hint:
                raise
            raise SourceError(f"source {self.name}: {error}{hint}") from error

    def placed(self) -> Source:
        """Return the source, read from the folder CALMIX_DATA if that is set."""
        if self.local is None or not (root := os.environ.get(DATA_VARIABLE)):
            return self
        reader = LocalFile(type="file", path=Path(root).expanduser() / self.local)
        return self.model_copy(
            update={
                "reader": reader,
                "licence": f"unstated (read from {DATA_VARIABLE})",
                "size": "-",
                "description": f"{self.local} in the folder {DATA_VARIABLE}",
            }
        )


def builtin_sources() -> dict[str, Source]:
    """Return the builtin sources by name, offline ones first."""
    return {name: one.placed() for name, one in _entries().items()}


@functools.cache
def _entries() -> dict[str, Source]:
    entries = packaged("sources/builtin.yaml") | packaged("sources/hub.yaml")
    return {name: Source(name=name, **entry) for name, entry in entries.items()}


def offline_sources() -> dict[str, Source]:
    """Return the builtin sources that need no hub, by name."""
    return {name: one for name, one in _entries().items() if one.reader.origin != "hub"}


def own_sources(
    entries: Path | str | Mapping[str, Any] | None, path: Path | None = None
) -> dict[str, Source]:
    """Return a user's own sources by name, from a mapping of names to entries or from a YAML file.

    An entry needs only `reader`; relative paths start at the folder of the file, for a mapping
    `path`. Raises InputError if the file is unreadable, or an entry has a wrong key or value.
    """
    if isinstance(entries, Path | str):
        path = Path(entries)
        entries = read_yaml(path)
    path = path or Path.cwd() / "sources"
    sources: dict[str, Source] = {}
    for name, entry in (entries or {}).items():
        if isinstance(entry, Source):
            sources[name] = entry
            continue
        if not isinstance(name, str) or not name.strip() or set(name) & set(":,"):
            raise InputError(f"{path}: '{name}' is not a name for a source (no ':' and no ',')")
        try:
            source = Source(name=name, **entry)
        except (ValidationError, TypeError) as error:
            what = first_problem(error) if isinstance(error, ValidationError) else str(error)
            raise InputError(f"{path}: source '{name}': {what}") from error
        if isinstance(reader := source.reader, LocalFile):
            reader = reader.model_copy(update={"path": path.parent / reader.path.expanduser()})
            source = source.model_copy(update={"reader": reader})
        elif isinstance(reader, HubText) and source.licence == OWN_LICENCE:
            source = source.model_copy(update={"licence": ON_HUB})
        sources[name] = source
    return sources


def get_source(name: str, own: Mapping[str, Source] | None = None) -> Source:
    """Return a source: one of the user's `own`, a builtin by name, a local file or folder by
    path (`mine.csv@prompt`: its field prompt), or a data set on the hub by id (`owner/name`, or
    `owner/name@subset`).

    Raises SourceError for an unknown name, with the nearest ones.
    """
    known = {**_entries(), **(own or {})}
    if name in known:
        return known[name].placed()
    reader = local_file(name)
    path = reader.path
    with suppress(OSError):  # the name can be too long for a path
        if path.exists():
            kind = "local file" if path.is_file() else "local folder"
            return Source(name=name, kind=kind, description=str(path), reader=reader)
    endings, whole = {*FORMATS, *CODE_ENDINGS}, user_path(re.sub(r"@[^/@]*$", "", name))
    named = path if path.suffix.lower() in endings else whole  # of FILE@FIELD
    is_file = named.suffix.lower() in endings
    if HUB_ID.fullmatch(name) and not name.startswith(".") and not is_file:
        identifier, _, subset = name.partition("@")
        return Source(
            name=name,
            kind="hub data set",
            licence=ON_HUB,
            description=f"the data set {identifier} on the hub",
            reader=HubText(type="hub", id=identifier, subset=subset or None),
        )
    if is_file or "/" in name:
        raise SourceError(f"there is no file {named}")
    raise SourceError(
        f"unknown source '{name}': {nearest(name, [*known, *MIXES, *GENERATOR_NAMES])}"
    )


def check_names(text: str, sources: Path | str | Mapping[str, Any] | None = None) -> None:
    """Refuse a calibration text that names an unknown source, as far as can be told without
    PyTorch; `sources` are the user's own (`own_sources`)."""
    written = text.partition(",")[0].strip() in GENERATOR_NAMES  # with settings
    if written or os.path.lexists(user_path(text)):
        return
    own = own_sources(sources)
    for name in parse_mix(text).keys() - {*MIXES, *GENERATOR_NAMES, OFFLINE}:
        get_source(name, own)


def local_file(name: str) -> LocalFile:
    """Return the reader of a user's path: `mine.csv@prompt` reads the field prompt,
    `mine.csv@question+answer` two fields."""
    path, template, (file, at, fields) = user_path(name), TEXT, name.rpartition("@")
    with suppress(OSError):
        if at and file and not path.exists() and user_path(file).exists():
            path = user_path(file)
            named = [f"{{{one}}}" for one in fields.split("+")]
            if not all(map(FIELD.fullmatch, named)):
                raise SourceError(f"{name}: name a field after the @, such as {file}@text")
            template = "\n\n".join(named)
    return LocalFile(type="file", path=path, template=template)


def documents_hash(documents: list[Document]) -> str:
    """Return a SHA-256 over the identifiers and texts of documents, in order."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.text):
            raw = part.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
