"""How numbers, names and tables are written on pages, in text and on the command line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

DISTANCE = (
    "KL(dense || pruned) in nats per token, on held-out text; top-1: tokens with the same most "
    "likely successor; flips: items right under one model only"
)
FOOTER = (
    "Written by calmix from the files beside it. Right answers: those of this model over those of "
    "the dense model, by ability, then the mean; lost and gained: right under one model only, in "
    "the abilities of the mean; p: McNemar's exact test. Kept: of the dense model's right answers, "
    "the share that is still right. Brackets: 95 % intervals over items."
)
LIKELIHOOD_NOTE = "Likelihood kept: 100 % = dense model, 0 = no task knowledge."
TOO_FEW = "too few to tell"  # an ability in which the dense model gets few answers right
MINUS = "\N{MINUS SIGN}"
WIDTH = 80  # columns of a terminal


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return a number with a true minus and no sign on zero; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:z.{digits}f}"
    plus = "+" if sign and float(text) > 0 else ""
    return plus + text.replace("-", MINUS)


def megabytes(count: float) -> str:
    """Return bytes in megabytes: whole from 10 on, three digits below."""
    return f"{count / 1e6:.0f}" if count >= 1e7 else f"{count / 1e6:.3g}"


def percent(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Return a share as a percentage, without the sign for it."""
    return number(None if value is None else 100 * value, digits, sign=sign)


def span(low: float | None, high: float | None) -> str:
    """Return an interval of shares in percent, in brackets; empty if unknown."""
    return "" if low is None or high is None else f"[{percent(low)}, {percent(high)}]"


def with_span(one: Any, *, sign: bool = False) -> str:
    """Return an estimate in percent with its interval; a dash for None."""
    if one is None:
        return "–"
    return f"{percent(one.value, sign=sign)} {span(one.low, one.high)}".strip()


def p_value(value: float | None) -> str:
    """Return a p-value; below 0.001 as `<0.001`."""
    return "<0.001" if value is not None and value < 0.001 else number(value)


def sure(value: float | None) -> str:
    """Return a probability in whole percent, never 0 or 100."""
    return "–" if value is None else f"{min(99, max(1, round(100 * value)))} %"


def short(name: str, width: int = 26) -> str:
    """Return a name cut to a width, with an ellipsis."""
    return name if len(name) <= width else name[: width - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural if needed."""
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(names: Iterable[str]) -> str:
    """Return names joined by commas and `and`."""
    *first, last = names = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """Return text wrapped to the terminal's width; `first` and `rest` are the indents."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return an indented table of the terminal's width; the first column is cut to fit."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    wide[0] = min(wide[0], max(8, WIDTH - sum(2 + width for width in wide[1:]) - 2))
    return "\n".join(
        "  "
        + "  ".join(
            short(text, width).ljust(width) for text, width in zip(row, wide, strict=True)
        ).rstrip()
        for row in rows
    )
