"""What every verb shares: consoles, options that recur, tables or JSON, the error line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from calmix.errors import InputError

LONGEST = 2000  # characters of the line a mistake is told in


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


def fail(message: str) -> NoReturn:
    """Print one line to the error stream and end with exit code 2."""
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST:  # it quotes what somebody wrote
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    sys.stderr.write(f"error: {line}\n")
    sys.exit(2)


def print_json(value: Any) -> None:
    """Print a value as JSON on the output stream, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def progress_bar(*, shown: bool = True) -> Progress:
    """Return a progress bar on the error stream; silent where that is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not (shown and err.is_terminal),
    )


def writing_on(bar: Progress) -> Callable[[str, int, int], None]:
    """Return what shows on a bar how far the model's own writing is, and how fast.

    It is called with what is being written, tokens done and tokens in all.
    """
    tasks: dict[str, tuple[TaskID, float, int]] = {}

    def show(label: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if label not in tasks:  # what comes first may be from the cache, and is no speed
            tasks[label] = bar.add_task(label, total=total), now, done
        task, began, first = tasks[label]
        speed = (done - first) / max(1e-9, now - began)
        bar.update(task, completed=done, description=f"{label}, {speed:,.0f} tokens/s")

    return show


def line(text: str) -> None:
    """Print a line of the result, as long as it is."""
    out.print(text, soft_wrap=True, highlight=False, markup=False)


def note(line: str) -> None:
    """Print a line the user should see beside the result."""
    err.print(line, soft_wrap=True, highlight=False)


def parse_weights(text: str | None) -> dict[str, float] | None:
    """Return weights by name from `general=1,code=2`; a name given twice is refused."""
    if text is None:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not name or not equals:
            raise InputError(f"weights are written NAME=NUMBER,..., not '{part.strip()}'")
        if name in found:
            raise InputError(f"the weight of {name} is given twice")
        found[name] = weight
    return found


def size(count: float) -> str:
    """Return bytes in words: `3.2 MB`, `14 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Return a time in words: `40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
