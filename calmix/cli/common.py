"""What every verb shares: consoles, progress, a line, a table or JSON, the error line."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from calmix.progress import Progress

LONGEST = 2000  # characters of the line of a mistake


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
