"""Text templates: how a record of nested fields becomes the text of a document.

`{a.b}` stands for the value at a dotted path; `*` steps into every element of a list. A list is
joined by blank lines. A paragraph of the template (they are set apart by a blank line) whose
fields are all empty is left out, so that an optional field leaves no hole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from calmix.errors import SourceError

FIELD = re.compile(r"\{([\w*-]+(?:\.[\w*-]+)*)\}")


def lookup(row: Any, path: str) -> Any:
    """Return the value at a dotted path of nested mappings; `*` maps over a list.

    Raises:
        SourceError: a part of the path is missing.
    """
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
    """Replace each `{dotted.field}` of a template by the row's value.

    Raises:
        SourceError: the template names a field the row lacks.
    """
    kept = []
    for paragraph in template.split("\n\n"):
        values = [_text(lookup(row, path)) for path in FIELD.findall(paragraph)]
        if values and not any(value.strip() for value in values):
            continue
        filled = iter(values)
        kept.append(FIELD.sub(lambda _, filled=filled: next(filled), paragraph))  # type: ignore[misc]
    return "\n\n".join(kept)


def fields(template: str) -> list[str]:
    """Return the top-level names of the fields a template uses, in order, each once."""
    return list(dict.fromkeys(path.split(".")[0] for path in FIELD.findall(template)))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\n\n".join(_flat(value))
    return str(value)


def _flat(values: list[Any] | tuple[Any, ...]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        elif value is not None and (text := str(value)).strip():
            yield text
