"""What pages are made of: one shell, tables that sort, figures, parts that fold."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix.report import words
from calmix.report.drawing import Drawing, inline

HERE = Path(__file__).parent


def escape(text: object) -> str:
    """Return text with HTML's own characters replaced."""
    return html.escape(str(text))


@dataclass(frozen=True)
class Cell:
    """One cell of a table: HTML to show, and the value it sorts by."""

    shown: str
    key: str | float | None
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A column's head; numbers are set right and sorted by value."""

    title: str
    number: bool = True


def shell(title: str, header: str, sections: Iterable[str], footer: str) -> str:
    """Return a whole page: one file that needs no network."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        header,
        "<main>",
        *sections,
        "</main>",
        f"<footer><p>{footer}</p></footer>",
        f"<script>\n{script}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def key_figures(cards: Iterable[tuple[str, str, str, str]]) -> str:
    """Return the most important figures large: head, name, value and note of each."""
    return '<section class="cards" aria-label="Key figures">' + "".join(
        f'<div class="card"><span>{escape(head)}</span><b>{escape(value)}</b>'
        f'<span class="name">{escape(name)}</span><span>{escape(words.held(note))}</span></div>'
        for head, name, value, note in cards
    ) + "</section>"  # fmt: skip


def figure(drawing: Drawing, folder: str | None = None) -> str:
    """Return a figure with its caption, and links to its files where it has any in `folder`."""
    links = " · ".join(
        f'<a href="{folder}/{drawing.name}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png")
    )
    return (
        f"<figure><figcaption><h3>{escape(drawing.title)}</h3><p>{escape(drawing.caption)}</p>"
        f'</figcaption><div class="scroll" tabindex="0" role="group" '
        f'aria-label="{escape(drawing.title)}">{inline(drawing)}</div>'
        + (f'<p class="files">{links}</p>' if folder is not None else "")
        + "</figure>"
    )


def fold(title: str, note: str, table: str, *, open_: bool = False) -> str:
    """Return a part that can be folded away, its table scrolling by itself."""
    return (
        f"<details{' open' if open_ else ''}><summary>{escape(title)} "
        f"<small>{escape(note)}</small></summary>"
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}">{table}'
        "</div></details>"
    )


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], same: Sequence[bool] = ()
) -> str:
    """Return a table whose columns sort on a click.

    Args:
        same: of each row, whether a filter for what differs hides it; none given hides none.
    """
    head = "".join(
        f'<th scope="col"{" class=number" if column.number else ""}>'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    body = "".join(
        f"<tr{' data-same' if hide else ''}>"
        + "".join(_td(column, cell) for column, cell in zip(columns, row, strict=True))
        + "</tr>"
        for row, hide in zip(rows, same or [False] * len(rows), strict=True)
    )  # fmt: skip
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _td(column: Column, cell: Cell) -> str:
    kinds = " ".join(kind for kind in ("number" if column.number else "", cell.kind) if kind)
    key = f"{cell.key:.6g}" if isinstance(cell.key, float) else cell.key
    kind = f' class="{kinds}"' if kinds else ""
    return f'<td{kind} data-v="{"" if key is None else escape(key)}">{cell.shown}</td>'


def plain(value: str, kind: str = "") -> Cell:
    """Return a cell of plain text, which sorts by itself."""
    return Cell(escape(value), value, kind)


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as rows of dotted name and text."""
    if isinstance(value, dict):
        return [
            row
            for key, part in value.items()
            for row in flat(part, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(str(part) for part in value))]
    return [(name, "–" if value is None else str(value))]
