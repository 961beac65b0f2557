"""Printing for all verbs: consoles, lines, tables that fit the terminal, JSON and errors."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from unicodedata import category

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calmix.files import size_text
from calmix.progress import Progress

if TYPE_CHECKING:
    from calmix.compression.estimate import StageCost
    from calmix.pruning.report import LayerReport

ERROR_CHARACTERS = 2000  # characters of an error line
ENDLESS, CELL_GAP = 10_000, 2  # columns without a terminal; padding of a cell
NUMBER_CELL = re.compile(r"[-\N{MINUS SIGN}>]?\d")


def printable(text: str) -> str:
    """Replace control characters, unpaired surrogates and whatever else does not print. Spaces of
    all widths stay; Python calls only the ASCII one printable."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


class Terminal(Console):
    """A console that prints text literally: names and paths may hold markup or escape codes."""

    @property
    def is_terminal(self) -> bool:
        """Whether output goes to a terminal; FORCE_COLOR, which notebooks set, is ignored."""
        return self.file.isatty()

    def render_str(self, text: str, **options: Any) -> Text:
        """Return printable text without markup and emoji codes."""
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


out = Terminal()
err = Terminal(stderr=True)
Progress.console = err


def line(text: str) -> None:
    """Print a line of the result without wrapping it."""
    out.print(text, soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """Print a line to stderr."""
    err.print(text, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Print a result as JSON with `--json`, which silences lines and tables."""
    if out.quiet:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fail(message: str) -> NoReturn:
    """Print one line to stderr and exit with code 2."""
    text = printable(" ".join(message.split()))
    if len(text) > ERROR_CHARACTERS:  # it quotes long input
        text = f"{text[: ERROR_CHARACTERS // 2]} ... {text[-ERROR_CHARACTERS // 2 :]}"
    sys.stderr.write(f"error: {text}\n")
    sys.exit(2)


def terminal_width() -> int | None:
    """Return the columns of the terminal; None without one."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit():
        return int(columns)
    return out.width if out.is_terminal else None


def print_table(
    rows: Sequence[Mapping[str, Any] | None],
    *,
    title: str | None = None,
    by: str | None = None,
    text: Collection[str] = (),
    least: Sequence[str] | None = None,
) -> None:
    """Print records as a table that fits the terminal, one column per key.

    A row of None is a gap. Records with the same value of `by` are grouped below it. A cell of None
    prints as a dash, and a column of them is omitted. Columns in `text` wrap between words. If the
    table is still too wide, the columns in `least` are dropped in that order, by default all but
    the first, starting from the last.
    """
    records = [row for row in rows if row is not None]
    cells: dict[str, list[str]] = {}
    for head in dict.fromkeys(key for row in records for key in row if key != by):
        column = [row.get(head) for row in records]
        if any(value is not None for value in column):
            start = "  " if by and not cells else ""
            cells[head] = [start + ("-" if value is None else str(value)) for value in column]
    heads, limit, left_out = list(cells), terminal_width() or ENDLESS, list[str]()
    narrow = {
        head: max([_widest(head), *(map(_widest if head in text else cell_len, cells[head]))])
        for head in heads
    }
    for head in heads[:0:-1] if least is None else least:
        if sum(narrow[one] + CELL_GAP for one in heads) <= limit:
            break
        if head in heads:
            heads.remove(head)
            left_out.insert(0, head)
    if by:
        narrow[heads[0]] = max(narrow[heads[0]], *(cell_len(row[by]) for row in records))
    if title:
        width = terminal_width()
        out.print(Text(title, style="bold"), soft_wrap=width is None, width=width)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    tight = sum(max(cell_len(head), narrow[head]) + CELL_GAP for head in heads) > limit
    for head in heads:
        filled = [cell for cell in cells[head] if cell not in ("", "-", "\N{EN DASH}")]
        numbers = sum(bool(NUMBER_CELL.match(cell)) for cell in filled) > len(filled) / 2
        table.add_column(
            head.replace(" ", "\n") if tight else head,
            justify="right" if numbers and head != heads[0] else "left",
            min_width=narrow[head],
            no_wrap=head not in text,
            overflow="fold",
        )
    lines, above = iter(zip(*(cells[head] for head in heads), strict=True)), None
    for row in rows:
        if row is None:
            table.add_section()
            continue
        if by and row[by] != above:
            table.add_row(Text(above := row[by], style="bold"))
        table.add_row(*next(lines))
    width = max(limit, sum(narrow[head] + CELL_GAP for head in heads))
    Terminal(width=width, quiet=out.quiet).print(table)
    if left_out:
        named = ", ".join(left_out)
        out.print(
            f"(a wider terminal shows {named} too; so does --json)", highlight=False, width=limit
        )


def _widest(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)


def not_here(model: str) -> bool:
    """Whether a model would have to be fetched first; if so, say what that takes."""
    from calmix.models.opening import to_fetch

    if first := to_fetch(model):
        print_json({"model": model, "first": first})
        line(
            f"{model} is not here: a run first {first}. Nothing was fetched or written; memory and "
            "disk are known once the model is here"
        )
    return bool(first)


def print_costs(costs: Sequence[StageCost], title: str) -> None:
    """Print work, memory and disk by stage, the stages' commands, and the totals."""
    rows = [
        {
            "stage": one.stage,
            "work": one.work or None,
            "memory": size_text(one.memory),
            "disk": size_text(one.disk) if one.disk else None,
        }
        for one in costs
    ]
    print_table(rows, title=title)
    for one in costs:
        if one.command:
            line(one.command)
    for one in costs:
        if one.tensors is not None:
            line(f"{one.stage}: {size_text(one.tensors)} of tensors in a GGUF file")
    line(
        f"\nabout {size_text(max(one.memory for one in costs))} of memory at peak, "
        f"{size_text(sum(one.disk for one in costs))} on disk; nothing was written"
    )


def print_layers(layers: Sequence[LayerReport], *, each: bool = False) -> None:
    """Print a row for each kind of layer, or for `each` layer."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(layer.name if each else layer.name.rpartition(".")[2], []).append(layer)
    rows = [
        {
            "layer": name,
            "blocks": len(same),
            "sparsity": _range([one.sparsity for one in same]),
            "error": _range([one.error for one in same if one.error is not None]),
            "fitted": _range([one.fitted_error or 0 for one in same if one.held_out]),
            "damping": max(
                (f"{one.damping:g}" for one in same if one.damping is not None),
                key=float,
                default=None,
            ),
            "dead inputs": sum(one.dead_inputs for one in same) or None,
            "bits": None
            if same[0].bits is None
            else f"{sum(one.bits or 0 for one in same) / len(same):.2f}",
        }
        for name, same in kinds.items()
    ]
    if rows:
        what = "error is the share of output energy lost on "
        if any(layer.held_out for layer in layers):
            what += "rows that were not fitted, fitted that on the others"
        else:
            what += "the fitted rows: too few, or --statistics plain, to hold any out"
        print_table(rows, title=what)
    if plain := sum(not layer.corrected for layer in layers):
        line(
            f"{plain} of {len(layers)} layers are left uncorrected: the correction lost more on "
            "rows that were not fitted"
        )


def _range(shares: list[float]) -> str | None:
    """Return shares as one percentage or a range of percentages."""
    if not shares:
        return None
    low, high = (f"{100 * end:.2f}" for end in (min(shares), max(shares)))
    return f"{low}%" if low == high else f"{low}-{high}%"
