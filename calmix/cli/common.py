"""What every verb shares: consoles, a line, a table that fits or JSON, the error line."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calmix.progress import Progress, duration

if TYPE_CHECKING:
    from calmix.pruning.report import LayerReport

LONGEST = 2000  # characters of the line of a mistake
ENDLESS, GAP = 10_000, 2  # columns where no terminal reads, and what each cell has beside it
NUMBER = re.compile(r"[-\N{MINUS SIGN}>]?\d")


def printable(text: str) -> str:
    """Return text without what a terminal would obey or an encoder refuse."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


class Terminal(Console):
    """A console that shows names and paths as they are: they may hold markup, or escape codes."""

    @property
    def is_terminal(self) -> bool:
        """Whether somebody looks on: FORCE_COLOR, which notebooks set, makes no file a terminal."""
        return self.file.isatty()

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as it is printed."""
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


out = Terminal()
err = Terminal(stderr=True)
Progress.console = err


def line(text: str) -> None:
    """Print a line of the result, as long as it is."""
    out.print(text, soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """Print a line to see beside the result, on the error stream."""
    err.print(text, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Print a result as JSON where that is asked for: lines and tables are silent then."""
    if out.quiet:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fail(message: str) -> NoReturn:
    """Print one line to the error stream and end with exit code 2."""
    text = printable(" ".join(message.split()))
    if len(text) > LONGEST:  # it quotes what somebody wrote
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    sys.stderr.write(f"error: {text}\n")
    sys.exit(2)


def size(count: float) -> str:
    """Return bytes in words: `3.2 MB`, `14 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


def room() -> int | None:
    """Return the columns there are; None where no terminal reads along."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit():
        return int(told)
    return out.width if out.is_terminal else None


def print_table(
    rows: Sequence[Mapping[str, Any] | None],
    *,
    title: str | None = None,
    by: str | None = None,
    text: Collection[str] = (),
    least: Sequence[str] | None = None,
) -> None:
    """Print records, one column a key, so that they fit.

    A row of None is a gap. Records that have the same value of `by` stand below it. A cell of None
    is a dash, and a column of them is left out. Cells of the columns in `text` may be broken
    between words. Where that is not enough, columns in `least` go, what matters least first; None
    is all but the first, from the last on.
    """
    records = [row for row in rows if row is not None]
    cells: dict[str, list[str]] = {}
    for head in dict.fromkeys(key for row in records for key in row if key != by):
        column = [row.get(head) for row in records]
        if any(value is not None for value in column):
            start = "  " if by and not cells else ""
            cells[head] = [start + ("-" if value is None else str(value)) for value in column]
    heads, limit, left_out = list(cells), room() or ENDLESS, list[str]()
    narrow = {
        head: max([_longest(head), *(map(_longest if head in text else cell_len, cells[head]))])
        for head in heads
    }
    for head in heads[:0:-1] if least is None else least:
        if sum(narrow[one] + GAP for one in heads) <= limit:
            break
        if head in heads:
            heads.remove(head)
            left_out.insert(0, head)
    if by:
        narrow[heads[0]] = max(narrow[heads[0]], *(cell_len(row[by]) for row in records))
    if title:
        out.print(Text(title, style="bold"), soft_wrap=room() is None, width=room())
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in heads:
        filled = [cell for cell in cells[head] if cell not in ("", "-", "\N{EN DASH}")]
        numbers = sum(bool(NUMBER.match(cell)) for cell in filled) > len(filled) / 2
        table.add_column(head, justify="right" if numbers and head != heads[0] else "left",
                         min_width=narrow[head], no_wrap=head not in text,
                         overflow="fold")  # fmt: skip
    held, above = iter(zip(*(cells[head] for head in heads), strict=True)), None
    for row in rows:
        if row is None:
            table.add_section()
            continue
        if by and row[by] != above:
            table.add_row(Text(above := row[by], style="bold"))
        table.add_row(*next(held))
    width = max(limit, sum(narrow[head] + GAP for head in heads))
    Terminal(width=width, quiet=out.quiet).print(table)
    if left_out:
        named = ", ".join(left_out)
        out.print(f"(a wider terminal shows {named} too; so does --json)", highlight=False,
                  width=limit)  # fmt: skip


def _longest(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)


def print_taken(taken: Sequence[Any], title: str) -> None:
    """Print what stages will take, the commands of those that have one, and the whole."""
    rows = [
        {"stage": one.stage.name, "time": duration(one.seconds), "memory": size(one.memory),
         "disk": size(one.disk) if one.disk else "-"}
        for one in taken
    ]  # fmt: skip
    print_table(rows, title=title)
    for one in taken:
        if one.stage.arguments:
            line(one.stage.command)
    line(f"\nabout {duration(sum(one.seconds for one in taken))}, "
         f"{size(max(one.memory for one in taken))} of memory at the peak, "
         f"{size(sum(one.disk for one in taken))} on disk; nothing was written")  # fmt: skip


def print_layers(layers: Sequence[LayerReport], *, each: bool = False) -> None:
    """Print a row for the layers of each kind, or for `each` layer; nothing of none."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(layer.name if each else layer.name.rpartition(".")[2], []).append(layer)
    rows = [
        {
            "layer": name, "blocks": len(held),
            "sparsity": _range([one.sparsity for one in held]),
            "error": _range([one.error for one in held if one.error is not None]),
            "damping": max((f"{one.damping:g}" for one in held if one.damping is not None),
                           key=float, default=None),
            "dead inputs": sum(one.dead_inputs for one in held) or None,
            "bits": None if held[0].bits is None
            else f"{sum(one.bits or 0 for one in held) / len(held):.2f}",
        }
        for name, held in kinds.items()
    ]  # fmt: skip
    if rows:
        print_table(rows, title="error is output energy lost: lower is better")


def _range(shares: list[float]) -> str | None:
    """Return percentages as one, or from the least to the largest."""
    if not shares:
        return None
    low, high = (f"{100 * end:.2f}" for end in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low}-{high}%"
