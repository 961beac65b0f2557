"""Documents, their readers' base, and templates.

A reader yields its documents in a fixed order: the same source gives the same documents on the
same machine. The text of a record comes from a template: `{a.b}` is the field of that name or the
value at a dotted path, `*` maps over a list, and a paragraph whose fields are all empty is dropped.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from calmix.errors import SourceError
from calmix.options import Options

SHORTEST = 200  # characters: shorter source files are mostly re-exports
FIELD = re.compile(r"\{([^{}\n]+)\}")
TEXT = "{text}"  # the default template of a user's rows


def _of_fields(template: str) -> str:
    if not FIELD.search(template):  # else every document would be the template itself
        raise ValueError(f"'{template}' names no field, such as {TEXT}")
    return template


Template = Annotated[str, AfterValidator(_of_fields)]


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


def source_files(
    root: Path, files: Iterable[Path], skip: Collection[str] = ()
) -> Iterator[Document]:
    for path in sorted(set(files)):
        relative = path.relative_to(root)
        with suppress(UnicodeDecodeError, OSError):
            if set(skip).isdisjoint(relative.parts):
                text = path.read_text(encoding="utf-8-sig")
                if len(text) >= SHORTEST:
                    yield Document(relative.as_posix(), text)


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
        parts[1::2] = values = [text_of(lookup(row, path)) for path in parts[1::2]]
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


def text_of(value: Any) -> str:
    if isinstance(value, Mapping):
        has = ", ".join(map(str, value))
        raise SourceError(
            f"a field is not text but has fields of its own ({has}): name one, as A.B"
        )
    if isinstance(value, list | tuple):
        return "\n\n".join(text for part in value if (text := text_of(part)).strip())
    return "" if value is None else str(value)
