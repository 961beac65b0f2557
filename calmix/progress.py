"""Progress of long runs: one live line in a terminal or notebook, elsewhere a line now and then."""

from __future__ import annotations

import html
import importlib
import itertools
import logging
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from rich import progress as rich
from rich.console import Console

EVERY = 30.0  # seconds between lines without a terminal
OFTEN = 0.2  # seconds between updates in a notebook
INSIDE_CHARACTERS = 32  # characters of the text inside a stage
# Functions that draw a text, a share (None: unknown) and the time left, and that end the display.
View = tuple[Callable[[str, float | None, str], None], Callable[[], None]]


def duration(seconds: float) -> str:
    """Return a duration as text: `40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logs and warnings of libraries; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def half_progress(
    progress: Callable[[int, int], None], number: int, whole: int = 0
) -> Callable[[int, int], None]:
    """Return the progress of the first or second (0 or 1) of two passes, each of `whole` steps, by
    default as many as it has."""

    def tick(done: int, total: int) -> None:
        size = whole or total
        progress(number * size + done * size // max(1, total), 2 * size)

    return tick


class Progress:
    """A progress display for `with`; its methods return callbacks that long functions take.

    The share shown never falls and stays below 100 %. The time left is that of the work shown, from
    its own pace. A run of `stages` is one line, such as `3/6 recover: distill, 40%, 4 min left`;
    another `Progress` inside is shown as part of the current stage.

    Args:
        stages: the most stages there can be.
    """

    console: ClassVar[Any] = None  # of the terminal: other output is printed above the line
    _over: ClassVar[Progress | None] = None

    def __init__(self, stages: int = 0, *, shown: bool = True) -> None:
        self._shown, self._last = shown, 0.0
        self._view: View | None = None
        self._most: dict[str, float] = {}
        self._since: dict[str, tuple[float, float]] = {}  # time and share when it was first shown
        self._stages, self._begun, self._stage = stages, 0, ""

    def __enter__(self) -> Any:
        self._last = time.monotonic()
        if self._stages:
            Progress._over = self
        if self._shown and Progress._over in (None, self):
            # FORCE_COLOR, which notebooks set, makes no terminal.
            self._view = _notebook() or (_terminal() if sys.stderr.isatty() else None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stages:
            Progress._over = None
        if self._view is not None:
            self._view[1]()

    def of(self, what: str, between: str = ", ") -> Callable[..., None]:
        """Return a callback that shows how much is done, of how much, and a detail."""
        before = [0, 0, 0.0]  # done, total and share when the total last grew

        def show(done: int, total: int, more: str = "") -> None:
            if total != before[1]:
                before[:] = done if before[1] else 0, total, self._most.get(what, 0.0)
            left = total - before[0]
            share = before[2] + (1 - before[2]) * (done - before[0]) / left if left > 0 else None
            self.show(f"{what}{between}{more}" if more else what, share, what)

        return show

    def each(self, what: str, total: int | None = None) -> Callable[[str], None]:
        """Return a callback that shows the name of each item as it is done."""
        show, done = self.of(what, " "), itertools.count(1)
        return lambda name: show(next(done), total or 0, name)

    def writing(self, label: str, done: int, total: int) -> None:
        """Show how many tokens of a text the model has written."""
        self.show(label, done / total if total else None)

    def show(self, text: str, share: float | None, key: str = "") -> None:
        """Show a share of the work from 0 to 1, or None if it is unknown.

        Args:
            key: identifies the work, by default `text`.
        """
        if Progress._over is not None and Progress._over is not self:
            Progress._over.part(text, share, key or text)
            return
        key, now, left = key or text, time.monotonic(), None
        if share is not None:
            share = self._most[key] = max(self._most.get(key, 0.0), min(0.99, share))
            began, first = self._since.setdefault(key, (now, share))
            if share - first > 0.02:  # a resumed run begins with a share
                left = (now - began) / (share - first) * (1 - share)
        remaining = f"{duration(left)} left" if left is not None and left >= 1 else ""
        if self._view is not None:
            self._view[0](text, share, remaining)
        elif self._shown and now - self._last >= EVERY:
            self._last = now
            parts = text, "" if share is None else f"{share:.0%}", remaining
            sys.stderr.write(", ".join(filter(None, parts)) + "\n")

    def note(self, text: str) -> None:
        """Print a line above the display."""
        if self._shown:
            console = Progress.console or Console(stderr=True)
            console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def begin(self, name: str) -> None:
        """Start a stage."""
        self._begun, self._stage = self._begun + 1, name
        self.part("", None, "")

    def part(self, inside: str, share: float | None, key: str) -> None:
        """Show what runs inside the current stage."""
        text = f"{self._begun}/{self._stages} {self._stage}"
        text += (
            f": {textwrap.shorten(inside, INSIDE_CHARACTERS, placeholder='...')}" if inside else ""
        )
        self.show(text, share, f"{self._begun} {key}")


def _terminal() -> View:
    """Return a bar that pulses while the share is unknown and disappears at the end."""
    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(None),
        rich.TextColumn("{task.fields[remaining]}", markup=False),
        rich.TimeElapsedColumn(),
    )
    console = Progress.console or Console(stderr=True)
    bar = rich.Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=None, remaining="")
    bar.start()

    def draw(text: str, share: float | None, remaining: str) -> None:
        bar.tasks[0].total = None if share is None else 1.0  # an update takes None as no change
        bar.update(task, description=text, completed=share or 0.0, remaining=remaining)

    return draw, bar.stop


def _notebook() -> View | None:
    """Return a bar in a notebook's cell; None outside notebooks."""
    if not Console().is_jupyter:
        return None
    display = importlib.import_module("IPython.display").display  # every notebook has it
    cell, last = display({"text/plain": ""}, raw=True, display_id=True), 0.0

    def draw(text: str, share: float | None, remaining: str) -> None:
        nonlocal last
        if time.monotonic() - last >= OFTEN:
            last, value = time.monotonic(), "" if share is None else f"value='{share:.3f}'"
            page = f"{html.escape(text)} <progress {value}></progress> {remaining}"
            cell.update({"text/plain": f"{text} {remaining}", "text/html": page}, raw=True)

    return draw, lambda: cell.update({"text/plain": ""}, raw=True)
