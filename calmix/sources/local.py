"""Reader of a user's own files, and of the chats in them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from calmix.errors import SourceError
from calmix.files import (
    leads_out,
    parse_json,
)
from calmix.sources.documents import (
    SHORTEST,
    TEXT,
    Document,
    Reader,
    Template,
    fields,
    fill,
    lines,
    lookup,
    source_files,
)

LINE = 64 << 20  # most bytes in a line of .jsonl
PARQUET_ROWS = 1024  # rows of a .parquet file in memory at a time
CHATS = ("messages", "conversations", "conversation")  # fields that hold a chat
CHAT_ROLES = {
    "human": "user",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
}
CALLS = ("tool_calls", "tool_call_id", "name")  # keys of a message that templates use too
CODE_ENDINGS = {
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
LEFT = {"node_modules", "__pycache__", "venv", "site-packages"}  # folders of third-party code
Rows = Iterator[tuple[int, Any]]  # of a file, with their numbers


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
            elif ending in {*FORMATS, *CODE_ENDINGS}:
                (code if ending in CODE_ENDINGS else rest).append(file)
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
            if files[0].suffix.lower() in CODE_ENDINGS:
                yield from source_files(path, files)
                return
        elif not path.is_file():
            raise SourceError(f"there is no file {path}")
        for file in files:
            ending = file.suffix.lower()
            if ending not in {*FORMATS, *CODE_ENDINGS}:
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
        return parse_json(text.rstrip())
    except ValueError as error:
        why: Any = error
        if isinstance(error, json.JSONDecodeError):
            at = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
            why = f"{error.msg} ({at}character {error.colno})"
        raise SourceError(f"{where} is not JSON: {why}") from error


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
        said = {"content", "value", "function_call", *CALLS} & one.keys()
        if not isinstance(role, str) or not isinstance(content, str | None) or not said:
            raise SourceError(
                f"message {number} of '{name}' has no role and content: write "
                '{"role": "user", "content": "..."}, or name another field, FILE@FIELD'
            )
        more = {key: one[key] for key in CALLS if one.get(key)}
        if one.get("function_call"):  # as it was before `tool_calls`
            call = {"type": "function", "function": one["function_call"]}
            more.setdefault("tool_calls", [call])
        role = CHAT_ROLES.get(role.lower(), role.lower())
        messages.append({"role": role, "content": lines(content or ""), **more})
    return tuple(messages)
