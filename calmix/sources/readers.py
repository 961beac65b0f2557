"""Readers: how the documents of a source are read, one class per kind of place.

A reader yields its documents in a fixed order: the same source gives the same documents on the
same machine. Text of a record comes from a template: `{a.b}` is the field of that name or the
value at a dotted path, `*` steps into every element of a list, and a paragraph whose fields are
all empty is left out.
"""

from __future__ import annotations

import csv
import importlib.util
import platform
import re
import shlex
import sysconfig
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from calmix import assets
from calmix.errors import MissingExtraError, SourceError
from calmix.files import parse_json

LINE = 64 << 20  # bytes of a line of .jsonl
ROWS = 1024  # of a .parquet file, held at a time
SHORTEST = 200  # characters: shorter source files are mostly re-exports
FIELD = re.compile(r"\{([^{}\n]+)\}")

TEXT = "{text}"  # the template of a user's own rows
CHATS = ("messages", "conversations", "conversation")  # fields that hold a chat
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
CODE = {
    ".py", ".pyi", ".js", ".jsx", ".ts", ".tsx", ".java", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".cs", ".go", ".rs", ".rb", ".php", ".swift", ".kt", ".scala", ".sh", ".sql", ".r", ".jl",
    ".lua", ".pl", ".hs", ".ml", ".vue", ".css", ".html",
}  # fmt: skip
PAGES = {".css", ".html"}  # which lie beside notes too
LEFT = {"node_modules", "__pycache__", "venv", "site-packages"}  # folders of others' code

Items = Literal["all", "odd", "even"]


@dataclass(frozen=True)
class Document:
    """A piece of text with an identifier that is unique and stable within its source.

    `messages` are those of a chat, each with `role` and `content`; a model's template puts them in
    place of `text`, where they stand in plain words.
    """

    id: str
    text: str
    messages: tuple[dict[str, str], ...] | None = None


class Reader(BaseModel):
    """What every reader has: where its text is, and which version of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: ClassVar[str] = "offline"  # or `hub`

    @property
    def version(self) -> str:
        """What the text comes from, with its version."""
        return f"Python {platform.python_version()}"

    @property
    def availability(self) -> str:
        """Whether the text can be read here and now, in a few words."""
        return "offline"

    def check(self) -> None:
        """Raise SourceError for what cannot be read, as far as that is known without a fetch."""

    def read(self) -> Iterator[Document]:
        """Yield the documents in a fixed order; raise SourceError where that is impossible."""
        raise NotImplementedError


class PythonStdlib(Reader):
    """The modules of the running Python's standard library, without tests and bundled pip."""

    type: Literal["python-stdlib"]

    def read(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
        skip |= {"ensurepip", "lib2to3", "pydoc_data"}
        yield from _source_files(root, _globbed(root, ["**/*.py"], skip))


class PythonDocs(Reader):
    """The language reference as pydoc carries it, one document a topic."""

    type: Literal["python-docs"]

    def read(self) -> Iterator[Document]:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise SourceError("this Python was installed without pydoc_data") from None
        for name in sorted(topics):
            yield Document(name, topics[name])


class PackageFiles(Reader):
    """Source files of an installed package, which is not imported; without its tests."""

    type: Literal["package"]
    package: str
    files: list[str]

    @property
    def version(self) -> str:
        return _version(self.package)

    @property
    def availability(self) -> str:
        return "offline" if self._root() else f"needs the package {self.package}"

    def _root(self) -> Path | None:
        spec = importlib.util.find_spec(self.package)
        held = None if spec is None else spec.submodule_search_locations
        return Path(held[0]) if held else None

    def check(self) -> None:
        if self._root() is None:
            raise SourceError(f"the package {self.package} is not installed")

    def read(self) -> Iterator[Document]:
        self.check()
        skip = {"test", "tests", "testing", "_vendor", "__pycache__"}
        if root := self._root():
            yield from _source_files(root, _globbed(root, self.files, skip))


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def _globbed(root: Path, patterns: list[str], skip: set[str]) -> list[Path]:
    found = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return [path for path in found if not skip & set(path.relative_to(root).parts)]


def _source_files(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    for path in files:
        relative = path.relative_to(root)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) >= SHORTEST:
            yield Document(relative.as_posix(), text)


class Apart(BaseModel):
    """Texts to keep away from: what shares a run of `words` words with one is left out.

    They are the even-numbered requests of `members` (which the suite may score), the odd, or all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: list[str]
    items: Items = "even"
    words: Annotated[int, Field(gt=0)] = 8


class AssetText(Reader):
    """Text out of the rendered requests of a data archive, each distinct text once.

    `template` is filled from each request's fields; `{answer}` is the right choice's text, and
    `where` keeps requests with given values. What a suite may score is left out: `items: odd`
    gives only requests whose `number` is odd (the even ones are the suite's), and `apart` keeps
    away from those that the suite reads elsewhere.
    """

    type: Literal["asset"]
    asset: str
    members: list[str]
    template: str
    after: str | None = None
    before: str | None = None
    items: Items = "all"
    number: str = "doc_id"
    apart: Apart | None = None
    where: dict[str, str | list[str]] = {}

    @property
    def version(self) -> str:
        asset = assets.get_asset(self.asset)
        return f"{asset.distribution} {asset.version}"

    @property
    def availability(self) -> str:
        state = assets.get_asset(self.asset).state
        return "offline" if state == "ok" else f"fetched on first use (asset {self.asset})"

    def read(self) -> Iterator[Document]:
        scored: set[tuple[str, ...]] = set()
        if self.apart is not None:
            for _, request in self._requests(self.apart.members, self.apart.items):
                scored |= word_runs(self.text(request), self.apart.words)
        wanted = {k: [v] if isinstance(v, str) else v for k, v in self.where.items()}
        seen: set[str] = set()
        for member, request in self._requests(self.members, self.items):
            if any(lookup(request, key) not in values for key, values in wanted.items()):
                continue
            text = self.text(request)
            if self.after is not None:
                text = text.partition(self.after)[2]
            if self.before is not None:
                text = text.partition(self.before)[0]
            text = text.strip()
            if not text or text in seen:
                continue
            seen.add(text)
            if self.apart is None or scored.isdisjoint(word_runs(text, self.apart.words)):
                yield Document(f"{member.split('/')[-3]}/{request['doc_id']}", text)

    def _requests(self, members: list[str], items: Items) -> Iterator[tuple[str, dict[str, Any]]]:
        for member in members:
            for request in assets.read_jsonl(self.asset, member):
                parity = "odd" if int(lookup(request, self.number)) % 2 else "even"
                if items in ("all", parity):
                    yield member, request

    def text(self, request: dict[str, Any]) -> str:
        """Return a request's text by the template."""
        doc = request.get("doc", {})
        if "choices" in doc and isinstance(doc.get("gold"), int):
            request = {**request, "answer": doc["choices"][doc["gold"]]}
        return fill(self.template, request)


def word_runs(text: str, n: int) -> set[tuple[str, ...]]:
    """Return every run of `n` words of a text in lower case; of a shorter text, all of it."""
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class ReasoningGym(Reader):
    """Problems with answers from reasoning-gym's seeded generators, which take turns.

    What the regular expression `strip` matches (notes on the answer's format) is removed.
    """

    type: Literal["reasoning-gym"]
    datasets: list[str]
    documents: Annotated[int, Field(gt=0)]
    strip: str | None = None

    @property
    def version(self) -> str:
        return _version("reasoning-gym")

    @property
    def availability(self) -> str:
        installed = importlib.util.find_spec("reasoning_gym") is not None
        return "offline" if installed else "needs calmix[reasoning]"

    def check(self) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise MissingExtraError("reasoning-gym problems", "reasoning")

    def read(self) -> Iterator[Document]:
        self.check()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of its own cellpylib
            import reasoning_gym
        size = -(-self.documents // len(self.datasets))
        made = [reasoning_gym.create_dataset(name, size=size, seed=0) for name in self.datasets]
        seen: set[str] = set()
        for index in range(self.documents):
            item, which = divmod(index, len(made))
            entry = made[which][item]
            question = entry["question"]
            if self.strip:
                question = re.sub(self.strip, "", question)
            text = f"{question.strip()}\nAnswer: {entry['answer']}"
            if text not in seen:
                seen.add(text)
                yield Document(f"{self.datasets[which]}/{item}", text)


class LocalFile(Reader):
    """A file, or a folder of them. Of text (`.txt`, `.md`) and source code each is one document, of
    rows (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`) each row. A folder with more source code
    (but `.css` and `.html`) than other files is read as code alone, another without it.

    The text of a row is its `template`, filled from the row's fields, or the chat in its field
    `messages` or `conversations`.
    """

    type: Literal["file"]
    path: Path
    template: str = TEXT

    @property
    def version(self) -> str:
        return self.path.name

    @property
    def availability(self) -> str:
        return "offline" if self.path.exists() else "missing"

    def check(self) -> None:
        next(self.read(), None)

    def read(self) -> Iterator[Document]:
        empty = True
        for document in self._documents():
            if document.text.strip():
                empty = False
                yield document
        if empty:
            is_code = self.path.is_dir() and self._files()[2]
            short = f", and no source file of {SHORTEST} characters" if is_code else ""
            raise SourceError(f"{self.path} is empty: it holds no text{short}")

    @property
    def left(self) -> str:
        """Which files of a folder are not read, in a few words; nothing where all are."""
        _, left, are_code = self._files()
        kind = "other files than source code" if are_code else "files of source code"
        return f"{kind} ({len(left)})" if left else ""

    def _files(self) -> tuple[list[Path], list[Path], bool]:
        """Return the files of the folder that are read, those that are not, and whether the first
        are source code."""
        files = [
            file for file in sorted(self.path.rglob("*"))
            if file.suffix.lower() in {*FORMATS, *CODE}
            and not _is_left(file.relative_to(self.path)) and file.is_file()
        ]  # fmt: skip
        code = [file for file in files if file.suffix.lower() in CODE]
        rest = [file for file in files if file.suffix.lower() in FORMATS]
        are_code = not rest or sum(file.suffix.lower() not in PAGES for file in code) > len(rest)
        return (code, rest, True) if are_code else (rest, code, False)

    def _documents(self) -> Iterator[Document]:
        path, files = self.path, [self.path]
        if path.is_dir():
            files, _, are_code = self._files()
            if not files:
                raise SourceError(f"folder {path} holds no {', '.join(FORMATS)} file and no code")
            if are_code:
                yield from _source_files(path, files)
                return
        elif not path.is_file():
            raise SourceError(f"there is no file {path}")
        for file in files:
            prefix, ending = "", file.suffix.lower()
            if path.is_dir():
                prefix = f"{file.relative_to(path).as_posix()}/"
            reads = _read_txt if ending in CODE else FORMATS.get(ending)
            if reads is None:
                known_ones = f"{', '.join(FORMATS)} and those of source code"
                raise SourceError(f"cannot read {file}: known endings are {known_ones}")
            for document in reads(file, self.template):
                yield replace(document, id=prefix + document.id)


def _is_left(path: Path) -> bool:
    return any(part.startswith(".") or part in LEFT for part in path.parts)


def _read_txt(path: Path, template: str) -> Iterator[Document]:
    with path.open("rb") as file:
        head = file.read(1 << 20)
        if b"\0" in head:  # refused before all of it is read
            _decoded(path, head)
        yield Document("0", _decoded(path, head + file.read()))


def _read_jsonl(path: Path, template: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LINE + 1), b""), start=1):
            where = f"{path} line {number}"
            if len(raw) > LINE:
                raise SourceError(f"{where} has more than {LINE >> 20} MiB: split the document")
            line = _decoded(path, raw, f" line {number}")
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise SourceError(f"{where} is not JSON: {error}") from error
            yield _of_row(str(number), template, row, where)


def _read_json(path: Path, template: str) -> Iterator[Document]:
    try:
        rows = parse_json(_decoded(path, path.read_bytes()))
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise SourceError(f"{path} is not a list of rows but {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield _of_row(str(number), template, row, f"{path} row {number}")


def _read_csv(path: Path, template: str) -> Iterator[Document]:
    csv.field_size_limit(LINE)
    where = str(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            rows = csv.DictReader(
                _texts(file, path), delimiter=max(",;\t", key=head.count), strict=True
            )
            for number, row in enumerate(rows, start=1):
                where = f"{path} row {number}"
                row.pop(None, None)
                yield _of_row(str(number), template, row, where)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: convert it first") from error
    except csv.Error as error:
        raise SourceError(f"{where}: not CSV ({error})") from error


def _texts(lines: Iterable[str], path: Path) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise SourceError(f"{path} is binary, not text")
        yield line


def _read_parquet(path: Path, template: str) -> Iterator[Document]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises its own classes for foreign bytes
        raise SourceError(f"{path} is not a parquet file") from error
    names = file.schema_arrow.names
    columns = fields(template, names)
    if template == TEXT and "text" not in names:
        columns = [name for name in CHATS if name in names][:1] or columns
    if missing := next((column for column in columns if column not in names), None):
        told = f"{path} has no column '{missing}' (has: {', '.join(names)})"
        kinds = {one.name: str(one.type) for one in file.schema_arrow}
        row = {name: "" for name, kind in kinds.items() if kind.endswith("string")}
        row |= {name: [{}] for name, kind in kinds.items() if re.match(r"\w*list<.*struct<", kind)}
        raise SourceError(told + _other_field(template, row))
    number = 0
    batches = file.iter_batches(batch_size=ROWS, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except Exception as error:  # as above
            raise SourceError(f"{path} is damaged after row {number}") from error
        for row in rows:
            yield _of_row(str(number), template, row, f"{path} row {number}")
            number += 1
        if batch is None:
            return


FORMATS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".md": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _decoded(path: Path, raw: bytes, where: str = "") -> str:
    try:
        text = raw.decode("utf-8-sig")  # a mark that some editors set is no text
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}{where} is not UTF-8 text (byte {error.start}): convert it first"
        ) from error
    if "\0" in text:
        raise SourceError(f"{path}{where} is binary, not text")
    return text


def _of_row(key: str, template: str, row: Any, where: str) -> Document:
    """Return a row as a document: its template filled, or its chat."""
    messages, text = None, ""
    plain = template != TEXT or (isinstance(row, Mapping) and "text" in row)
    named = [template[1:-1]] if plain else CHATS
    try:
        if isinstance(row, Mapping):
            for name in named:
                if name in row and (_is_chat(chat := _chat(row[name])) or not plain):
                    messages = chat_messages(chat, name)
                    text = "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)
                    break
        if messages is None:
            for path in fields(template, row if isinstance(row, Mapping) else ()):
                if not isinstance(value := lookup(row, path), str | list | dict | None):
                    raise SourceError(f"field '{path}' is not text but {type(value).__name__}")
            text = fill(template, row)
        text.encode("utf-8")
    except SourceError as error:
        names = row if isinstance(row, Mapping) and "no field" in str(error) else {}
        raise SourceError(f"{where}: {error}{_other_field(template, names)}") from error
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}: invalid Unicode: unpaired surrogate") from error
    return Document(key, text, messages)


def _other_field(template: str, row: Mapping[str, Any]) -> str:
    """Return how to read another field than `text`: a chat, or the one with the longest text."""
    chats = [name for name, value in row.items() if _is_chat(_chat(value))]
    texts = {name: len(value) for name, value in row.items() if isinstance(value, str)}
    if template != TEXT or not (chats or texts):
        return ""
    named = chats[0] if chats else max(texts, key=texts.__getitem__)
    return f": name one, as {shlex.quote(f'FILE@{named}')}"


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _chat(value: Any) -> Any:
    """Return the chat that a string holds as JSON; any other value as it is."""
    with suppress(ValueError):
        if isinstance(value, str) and value.lstrip().startswith("["):
            held = parse_json(value)
            if _is_chat(held) and {"role", "from"} & held[0].keys():
                return held
    return value


def chat_messages(value: Any, name: str) -> tuple[dict[str, str], ...]:
    """Return the messages of a chat, as `role` and `content`, from any of the usual forms.

    Raises SourceError where they are in none.
    """
    found = []
    for number, one in enumerate(value if isinstance(value, list) else [value]):
        one = one if isinstance(one, Mapping) else {}
        role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if isinstance(content, list):  # parts, of which the texts count
            content = "\n".join(str(p.get("text", "")) for p in content if isinstance(p, Mapping))
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise SourceError(
                f"message {number} of '{name}' has no role and content: write "
                '{"role": "user", "content": "..."}, or name another field, FILE@FIELD'
            )
        found.append({"role": ROLES.get(role, role), "content": content or ""})
    return tuple(found)


def lookup(row: Any, path: str) -> Any:
    """Return the value of a field, or at a dotted path of nested mappings; `*` maps over a list."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value: Any = row
    parts = path.split(".")
    for at, part in enumerate(parts):
        if part == "*" and isinstance(value, list):
            rest = ".".join(parts[at + 1 :])
            return [lookup(item, rest) if rest else item for item in value]
        if not isinstance(value, Mapping) or part not in value:
            has = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise SourceError(f"there is no field '{path}' (has: {has})")
        value = value[part]
    return value


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Return a template with each `{dotted.field}` replaced; a list is joined by blank lines."""
    kept = []
    for paragraph in template.split("\n\n"):
        values = [_text(lookup(row, path)) for path in FIELD.findall(paragraph)]
        if values and not any(value.strip() for value in values):
            continue
        filled = iter(values)
        kept.append(FIELD.sub(lambda _, filled=filled: next(filled), paragraph))  # type: ignore[misc]
    return "\n\n".join(kept)


def fields(template: str, names: Collection[str] = ()) -> list[str]:
    """Return the fields of a row that a template uses, in order, each once: the one of a path's
    own name, if `names` has it, or that of its first part."""
    paths = FIELD.findall(template)
    return list(dict.fromkeys(path if path in names else path.split(".")[0] for path in paths))


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "\n\n".join(text for part in value if (text := _text(part)).strip())
    return "" if value is None else str(value)
