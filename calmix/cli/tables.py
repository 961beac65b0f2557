"""Tables that fit: no number is cut and no word broken, whatever the width of the terminal.

A table is as wide as it likes to be where there is room, and where no terminal reads it. Where it
is too wide, heads and cells of text are broken into lines between words; if that is not enough,
the columns that matter least are left out, which a line below the table tells.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from calmix.cli.common import Terminal, duration, line, out, print_json, size

ENDLESS = 10_000


def room() -> int | None:
    """Return the columns there are; None where no terminal reads along."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit():
        return int(told)
    return out.width if out.is_terminal else None


def table_of(title: str | None, columns: Sequence[str], left: int = 1) -> Table:
    """Return an empty table; columns from `left` on are set right."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        justify: JustifyMethod = "left" if number < left else "right"
        table.add_column(column, justify=justify)
    return table


def print_rows(
    rows: Sequence[dict[str, Any]],
    *,
    as_json: bool,
    title: str | None = None,
    text: Collection[str] = (),
    least: Sequence[str] | None = None,
) -> None:
    """Print records as a table, one column a key, or as JSON; `text` and `least` as for `show`."""
    if as_json:
        print_json(list(rows))
        return
    table = table_of(title, list(rows[0]) if rows else [], left=ENDLESS)
    for column in table.columns:
        if all(isinstance(row[str(column.header)], int | float) for row in rows):
            column.justify = "right"
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    show(table, text=text, least=least)


def show(table: Table, *, text: Collection[str] = (), least: Sequence[str] | None = None) -> None:
    """Print a table so that it fits.

    Args:
        text: heads of the columns whose cells may be broken between words; others are never.
        least: heads of the columns that may be left out, what matters least first; None for all
            but the first, from the last on.
    """
    if table.title:
        title = Text(str(table.title), style="bold")
        out.print(title, soft_wrap=room() is None, width=room())
        table.title = None
    limit, left_out = room() or ENDLESS, []
    if least is None:
        least = [str(column.header) for column in table.columns[:0:-1]]
    for name in least:
        if _width(table, [_least(column, text) for column in table.columns]) <= limit:
            break
        table.columns = [column for column in table.columns if column.header != name]
        left_out.append(name)
    _set_widths(table, text, limit)
    width = Measurement.get(out, out.options.update(width=ENDLESS), table).maximum
    Terminal(width=width).print(table)
    if left_out:
        named = ", ".join(name for name in reversed(left_out) if name)
        note = f"(a wider terminal shows {named} too; so does --json)"
        out.print(note, highlight=False, width=limit)


def _shown(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _longest(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)


def _natural(column: Column) -> int:
    """Return the width of a column in which nothing is broken."""
    return max([cell_len(str(column.header)), *(cell_len(_shown(c)) for c in column._cells)])


def _least(column: Column, text: Collection[str]) -> int:
    """Return the least width of a column in which no word is."""
    head = _longest(str(column.header))
    measure = _longest if column.header in text else cell_len
    return max([head, *(measure(_shown(cell)) for cell in column._cells)])


def _width(table: Table, widths: Sequence[int]) -> int:
    """Return the width of a table whose columns have given widths."""
    for number, (column, width) in enumerate(zip(table.columns, widths, strict=True)):
        column._index, column.width = number, width  # padding goes by the place
    return Measurement.get(out, out.options.update(width=ENDLESS), table).maximum


def _set_widths(table: Table, text: Collection[str], limit: int) -> None:
    """Give every column its least width, and share out what is left, the narrowest first."""
    widths = [_least(column, text) for column in table.columns]
    spare = limit - _width(table, widths)
    wanted = [_natural(column) - width for column, width in zip(table.columns, widths, strict=True)]
    order = sorted(range(len(widths)), key=lambda at: wanted[at])
    for number, at in enumerate(order):
        more = min(wanted[at], max(0, spare) // (len(order) - number))
        widths[at] += more
        spare -= more
    _width(table, widths)
    for column in table.columns:
        column.overflow = "fold"


def print_taken(taken: Sequence[Any], title: str) -> None:
    """Print what stages will take, the commands of those that have one, and the whole."""
    rows = [
        {"stage": one.stage.name, "time": duration(one.seconds), "memory": size(one.memory),
         "disk": size(one.disk) if one.disk else "-"}
        for one in taken
    ]  # fmt: skip
    print_rows(rows, as_json=False, title=title)
    for one in taken:
        if one.stage.arguments:
            line(one.stage.command)
    line(f"\nabout {duration(sum(one.seconds for one in taken))}, "
         f"{size(max(one.memory for one in taken))} of memory at the peak, "
         f"{size(sum(one.disk for one in taken))} on disk; nothing was written")  # fmt: skip
