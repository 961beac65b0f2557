"""Readers of documents, one class per kind of source.

A reader yields its documents in a fixed order: the same source gives the same documents on the
same machine. The text of a record comes from a template: `{a.b}` is the field of that name or the
value at a dotted path, `*` maps over a list, and a paragraph whose fields are all empty is dropped.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import platform
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from calmix import assets
from calmix.errors import SourceError, first_line, missing_extra
from calmix.files import (
    cache_dir,
    check_readable,
    leads_out,
    parse_json,
    sha256_json,
    write_bytes,
)
from calmix.options import Options
from calmix.progress import quiet

LINE = 64 << 20  # most bytes in a line of .jsonl
PARQUET_ROWS = 1024  # rows of a .parquet file in memory at a time
SHORTEST = 200  # characters: shorter source files are mostly re-exports
BUDGET = 8_000_000  # characters: about 2 million tokens, 60 usual calibration sets
FIELD = re.compile(r"\{([^{}\n]+)\}")

TEXT = "{text}"  # the default template of a user's rows
CHATS = ("messages", "conversations", "conversation")  # fields that hold a chat
ROLES = {
    "human": "user",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
}
CALLS = ("tool_calls", "tool_call_id", "name")  # keys of a message that templates use too
CODE = {
    ".py",
    ".pyi",
    ".js",
    ".jsx",
    ".ts",
    ".tsx",
    ".java",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".cs",
    ".go",
    ".rs",
    ".rb",
    ".php",
    ".swift",
    ".kt",
    ".scala",
    ".sh",
    ".sql",
    ".r",
    ".jl",
    ".lua",
    ".pl",
    ".hs",
    ".ml",
    ".vue",
    ".css",
    ".html",
}
PAGES = {".css", ".html"}  # also found beside notes
SKIPPED = {  # folders of a package or of the standard library
    "test",
    "tests",
    "testing",
    "idle_test",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "_vendor",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
}
LEFT = {"node_modules", "__pycache__", "venv", "site-packages"}  # folders of third-party code


def _of_fields(template: str) -> str:
    if not FIELD.search(template):  # else every document would be the template itself
        raise ValueError(f"'{template}' names no field, such as {TEXT}")
    return template


Template = Annotated[str, AfterValidator(_of_fields)]
Items = Literal["all", "odd", "even"]
Rows = Iterator[tuple[int, Any]]  # of a file, with their numbers


@dataclass(frozen=True)
class Document:
    """A piece of text with an identifier that is unique and stable within its source.

    `messages` are those of a chat, each with `role` and `content` (and calls of tools): a model's
    chat template formats them. `text` is the same chat as plain text.
    """

    id: str
    text: str
    messages: tuple[dict[str, Any], ...] | None = None


class Reader(Options):
    """The base of all readers."""

    origin: ClassVar[str] = "offline"  # or `hub`

    @property
    def version(self) -> str:
        """The origin of the text, with its version."""
        return f"Python {platform.python_version()}"

    @property
    def availability(self) -> str:
        """Whether the text can be read now, in a few words."""
        return "offline"

    def check(self) -> None:
        """Raise SourceError for unreadable text, as far as possible without downloading."""

    def read(self) -> Iterator[Document]:
        """Yield the documents in a fixed order; raise SourceError if that is impossible."""
        raise NotImplementedError


class PythonText(Reader):
    """Text of the running Python: the modules of its standard library, without tests and bundled
    pip, or the language reference in pydoc, one document per topic."""

    type: Literal["python-stdlib", "python-docs"]

    def read(self) -> Iterator[Document]:
        if self.type == "python-stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            yield from _source_files(root, root.glob("**/*.py"), SKIPPED)
        else:
            from pydoc_data.topics import topics

            yield from (Document(name, topics[name]) for name in sorted(topics))


class OfPackage(Reader):
    """Text of a package that may not be installed."""

    package: str

    @property
    def version(self) -> str:
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.package

    @property
    def availability(self) -> str:
        return "offline" if self._spec() else f"needs the package {self.package}"

    def _spec(self) -> Any:
        with suppress(ImportError, ValueError):  # of a package that a dotted name is inside
            return importlib.util.find_spec(self.package.replace("-", "_"))
        return None

    def check(self) -> None:
        if self._spec() is None:
            raise SourceError(
                f"the package {self.package} is not installed: pip install {self.package}"
            )


class PackageFiles(OfPackage):
    """Source files of an installed package, without its tests; the package is not imported."""

    type: Literal["package"]
    files: list[str]

    def read(self) -> Iterator[Document]:
        self.check()
        if not (places := self._spec().submodule_search_locations):
            raise SourceError(f"{self.package} is a single module: name a package")
        root = Path(places[0])
        for pattern in self.files:
            if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise SourceError(f"'{pattern}' is no pattern of files inside {self.package}")
        files = (path for pattern in self.files for path in root.glob(pattern))
        yield from _source_files(root, files, SKIPPED)


def _source_files(
    root: Path, files: Iterable[Path], skip: Collection[str] = ()
) -> Iterator[Document]:
    for path in sorted(set(files)):
        relative = path.relative_to(root)
        with suppress(UnicodeDecodeError, OSError):
            if set(skip).isdisjoint(relative.parts):
                text = path.read_text(encoding="utf-8-sig")
                if len(text) >= SHORTEST:
                    yield Document(relative.as_posix(), text)


class Apart(Options):
    """Texts to avoid: a document that shares a run of `words` words with one is dropped.

    They are the even-numbered requests of `members` (which the suite can score), the odd, or all.
    """

    members: list[str]
    items: Items = "even"
    words: Annotated[int, Field(gt=0)] = 8


class AssetText(Reader):
    """Text from the rendered requests of a data archive, each distinct text once.

    `template` is filled from each request's fields; `{answer}` is the text of the correct choice,
    and `where` keeps requests with given values. What a suite can score is left out: `items: odd`
    yields only requests with an odd `number` (the suite has the even ones), and `apart` drops text
    that overlaps with what the suite reads elsewhere.
    """

    type: Literal["asset"]
    asset: str
    members: list[str]
    template: Template
    after: str | None = None
    before: str | None = None
    items: Items = "all"
    number: str = "doc_id"
    apart: Apart | None = None
    where: dict[str, str | list[str]] = Field(default={})

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
        seen = {""}
        for member, request in self._requests(self.members, self.items):
            if any(lookup(request, key) not in values for key, values in wanted.items()):
                continue
            text = self.text(request)
            if self.after is not None:
                text = text.partition(self.after)[2]
            if self.before is not None:
                text = text.partition(self.before)[0]
            if (text := text.strip()) in seen:
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
        """Return a request's text, from the template."""
        doc = request.get("doc", {})
        if "choices" in doc and isinstance(doc.get("gold"), int):
            request = {**request, "answer": doc["choices"][doc["gold"]]}
        return fill(self.template, request)


def word_runs(text: str, n: int) -> set[tuple[str, ...]]:
    """Return every run of `n` words of a text in lower case; for a shorter text, all of it."""
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class ReasoningGym(OfPackage):
    """Problems with answers from reasoning-gym's seeded generators, taken in turn.

    Text that matches the regular expression `strip` (notes on the answer's format) is removed.
    """

    type: Literal["reasoning-gym"]
    package: str = "reasoning-gym"
    datasets: Annotated[list[str], Field(min_length=1)]
    documents: Annotated[int, Field(gt=0)]
    strip: re.Pattern[str] | None = None

    def check(self) -> None:
        if self._spec() is None:
            raise missing_extra("reasoning-gym problems", "reasoning")

    def read(self) -> Iterator[Document]:
        self.check()
        with quiet():  # its cellpylib warns
            import reasoning_gym
        size = -(-self.documents // len(self.datasets))
        try:
            datasets = [reasoning_gym.create_dataset(n, size=size, seed=0) for n in self.datasets]
        except ValueError as error:  # an unknown name
            raise SourceError(f"reasoning-gym: {first_line(error)}") from error
        seen: set[str] = set()
        for index in range(self.documents):
            item, which = divmod(index, len(datasets))
            entry = datasets[which][item]
            question = re.sub(self.strip or "", "", entry["question"]).strip()
            text = f"{question}\nAnswer: {entry['answer']}"
            if text not in seen:
                seen.add(text)
                yield Document(f"{self.datasets[which]}/{item}", text)


class Answer(Options):
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
    answer: Answer | None = None
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


class LocalFile(Reader):
    """A file, or a folder of files. Text (`.txt`, `.md`) and source code are one document per file,
    tables (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`) one per row. Of a folder with more source
    code (not counting `.css` and `.html`) than other files only the code is read, else only the
    other files.

    The text of a row is the `template`, filled from the row's fields, or the chat in its field
    `messages` or `conversations`.
    """

    type: Literal["file"]
    path: Path
    template: Template = TEXT

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
        try:
            for document in self._documents():
                if document.text.strip():
                    empty = False
                    yield document
        except OSError as error:
            place = error.filename or self.path
            raise SourceError(f"cannot read {place}: {error.strerror}") from error
        if empty:
            short = f", and no source file of {SHORTEST} characters" if self.path.is_dir() else ""
            raise SourceError(f"{self.path} is empty: it has no text{short}")

    def files(self) -> tuple[list[Path], str]:
        """Return the files of the folder to read, and in a few words the others, if any."""
        rest, code, others = list[Path](), list[Path](), list[str]()
        for file in sorted(self.path.rglob("*")):
            inside, ending = file.relative_to(self.path).parts, file.suffix.lower()
            hidden = any(part.startswith(".") or part in LEFT for part in inside)
            linked = file.is_symlink() and not hidden
            if hidden or not file.is_file():
                others += ["linked folders"] * (file.is_dir() and linked)
            elif linked and leads_out(file, self.path):
                others.append("links out of the folder")
            elif ending in {*FORMATS, *CODE}:
                (code if ending in CODE else rest).append(file)
            else:
                others.append("files of other kinds")
        if not rest or sum(file.suffix.lower() not in PAGES for file in code) > len(rest):
            others += ["files other than source code"] * len(rest)
            rest = code
        else:
            others += ["source code files"] * len(code)
        return rest, ", ".join(f"{name} ({count})" for name, count in Counter(others).items())

    def _documents(self) -> Iterator[Document]:
        path, files = self.path, [self.path]
        if path.is_dir():
            files = self.files()[0]
            if not files:
                raise SourceError(f"folder {path} has no {', '.join(FORMATS)} file and no code")
            if files[0].suffix.lower() in CODE:
                yield from _source_files(path, files)
                return
        elif not path.is_file():
            raise SourceError(f"there is no file {path}")
        for file in files:
            ending = file.suffix.lower()
            if ending not in {*FORMATS, *CODE}:
                supported = f"{', '.join(FORMATS)} and those of source code"
                raise SourceError(f"cannot read {file}: supported endings are {supported}")
            prefix = f"{file.relative_to(path).as_posix()}/" if path.is_dir() else ""
            if (rows := FORMATS.get(ending)) is None:
                with file.open("rb") as opened:
                    head = opened.read(1 << 20)
                    # Of a binary file the rest is not read.
                    text = _decoded(file, head if b"\0" in head else head + opened.read())
                yield Document(f"{prefix}0", lines(text))
                continue
            kind = "line" if ending == ".jsonl" else "row"
            for number, row in rows(file, self.template):
                where = f"{file} {kind} {number}"
                yield _of_row(f"{prefix}{number}", self.template, row, where)


def _read_jsonl(path: Path, template: str) -> Rows:
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LINE + 1), b""), start=1):
            where = f"{path} line {number}"
            if len(raw) > LINE:
                raise SourceError(f"{where} has more than {LINE >> 20} MiB: split the document")
            if (line := _decoded(where, raw)).strip():
                yield number, _json(where, line)


def _read_json(path: Path, template: str) -> Rows:
    rows = _json(path, _decoded(path, path.read_bytes()))
    if not isinstance(rows, list):
        raise SourceError(f"{path} is not a list of rows but {type(rows).__name__}")
    yield from enumerate(rows)


def _read_csv(path: Path, template: str) -> Rows:
    csv.field_size_limit(LINE)
    with path.open("rb") as file:
        head = file.readline().partition(b"\r")[0].decode("utf-8", "replace")
        file.seek(0)
        lines = (
            _decoded(f"{path} line {number}", line)
            for number, raw in enumerate(file, start=1)
            for line in raw.splitlines(keepends=True)
        )
        mark = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
        rows = csv.DictReader(lines, delimiter=mark, strict=True)
        try:
            _check_names(path, rows.fieldnames or ())
            for number, row in enumerate(rows, start=1):
                if any(row.pop(None, ())):  # else the text would end at its first delimiter
                    raise SourceError(
                        f"{path} row {number} has more fields than the header: put text with "
                        f"{mark!r} in quotes"
                    )
                yield number, row
        except csv.Error as error:
            raise SourceError(f"{path} line {rows.line_num}: not CSV ({error})") from error


def _read_parquet(path: Path, template: str) -> Rows:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        _check_names(path, names := file.schema_arrow.names)
        columns: list[str] | None = fields(template, names)
        if template == TEXT:
            columns = [name for name in ("text", *CHATS) if name in names]
        if not columns or not set(columns) <= set(names):
            columns = None  # the error for the first row then lists all fields
        batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=columns)
        yield from enumerate(row for batch in batches for row in batch.to_pylist())
    except SourceError:
        raise
    except Exception as error:  # pyarrow raises its own classes for bad bytes
        raise SourceError(f"{path} is not a parquet file, or is damaged") from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    if doubled := next((name for name in names if list(names).count(name) > 1), None):
        raise SourceError(f"{path} has two columns named '{doubled}': rename one")


FORMATS: dict[str, Callable[[Path, str], Rows] | None] = {  # None: the file is one document
    ".txt": None,
    ".md": None,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _json(where: Path | str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise SourceError(f"{where} is not JSON: {error}") from error


def _decoded(where: Path | str, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{where} is not UTF-8 text (byte {error.start}): convert it first"
        ) from error
    if "\0" in text:
        raise SourceError(f"{where} is binary, not text")
    return text


def _of_row(key: str, template: str, row: Any, where: str) -> Document:
    """Return a row as a document, from its template or its chat."""
    messages, mapping = None, row if isinstance(row, Mapping) else {}
    searched = template == TEXT and not mapping.get("text")  # for a chat in the usual fields
    name = next((one for one in CHATS if one in mapping), None) if searched else template[1:-1]
    try:
        if name is not None:
            messages = chat_messages(mapping.get(name), name, searched)
        if messages is not None:
            said = ((one["role"], one["content"] or one.get("tool_calls")) for one in messages)
            text = "\n\n".join(
                f"{role}: {part if isinstance(part, str) else json.dumps(part)}"
                for role, part in said
                if part
            )
        else:
            for path in fields(template, mapping):
                if not isinstance(value := lookup(row, path), str | list | dict | None):
                    raise SourceError(f"field '{path}' is not text but {type(value).__name__}")
            text = lines(fill(template, row))
        text.encode("utf-8")
    except RecursionError as error:
        raise SourceError(f"{where}: its lists are nested too deeply") from error
    except SourceError as error:
        other = mapping and template == TEXT and "no field" in str(error)
        hint = ": name one, as FILE@FIELD" if other else ""
        raise SourceError(f"{where}: {error}{hint}") from error
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}: invalid Unicode: unpaired surrogate") from error
    return Document(key, text, messages)


def chat_messages(value: Any, name: str, expected: bool) -> tuple[dict[str, Any], ...] | None:
    """Return the messages in a field, a list or JSON in any of the usual formats, as `role` and
    `content`; None if there are none and none are `expected`."""
    chat, messages = value, []
    with suppress(ValueError):
        if isinstance(value, str) and value.lstrip().startswith("["):
            chat = parse_json(value)
    listed = isinstance(chat, list) and chat and isinstance(chat[0], Mapping)
    if not listed or not (chat is value or {"role", "from"} & chat[0].keys()):
        if not expected:
            return None
        chat = value if isinstance(value, list) else [value]
    for number, one in enumerate(chat):
        one = one if isinstance(one, Mapping) else {}
        role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if isinstance(content, list):  # parts: only text is kept
            parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
            content = "\n".join(part for part in parts if part and isinstance(part, str))
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise SourceError(
                f"message {number} of '{name}' has no role and content: write "
                '{"role": "user", "content": "..."}, or name another field, FILE@FIELD'
            )
        more = {key: one[key] for key in CALLS if one.get(key)}
        if one.get("function_call"):  # as it was before `tool_calls`
            call = {"type": "function", "function": one["function_call"]}
            more.setdefault("tool_calls", [call])
        role = ROLES.get(role.lower(), role.lower())
        messages.append({"role": role, "content": lines(content or ""), **more})
    return tuple(messages)


def lookup(row: Any, path: str) -> Any:
    """Return the value of a field, or at a dotted path of nested mappings; `*` maps over a list."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    first, _, rest = path.partition(".")
    if first == "*" and isinstance(row, list):
        return [lookup(item, rest) if rest else item for item in row]
    if not rest or not isinstance(row, Mapping) or first not in row:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise SourceError(f"there is no field '{path}' (has: {has})")
    return lookup(row[first], rest)


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Return a template with each `{dotted.field}` replaced; lists are joined by blank lines."""
    paragraphs = []
    for paragraph in template.split("\n\n"):
        parts = FIELD.split(paragraph)  # every second part is the name of a field
        parts[1::2] = values = [_text(lookup(row, path)) for path in parts[1::2]]
        if not values or any(value.strip() for value in values):
            paragraphs.append("".join(parts))
    return "\n\n".join(paragraphs)


def fields(template: str, names: Collection[str] = ()) -> list[str]:
    """Return the distinct fields of a row that a template uses, in order: a whole path if it is in
    `names`, else its first part."""
    paths = FIELD.findall(template)
    return list(dict.fromkeys(path if path in names else path.split(".")[0] for path in paths))


def lines(text: str) -> str:
    """Return a text with the line ends of Unix."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        has = ", ".join(map(str, value))
        raise SourceError(
            f"a field is not text but has fields of its own ({has}): name one, as A.B"
        )
    if isinstance(value, list | tuple):
        return "\n\n".join(text for part in value if (text := _text(part)).strip())
    return "" if value is None else str(value)


AnyReader = Annotated[
    PythonText | PackageFiles | AssetText | ReasoningGym | LocalFile | HubText,
    Field(discriminator="type"),
]
