"""Render the templates of all pages, and figures of bars with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from calmix import words


@dataclass(frozen=True)
class Bar:
    """A row of a figure: a share with its interval, in a colour of the page (`page.css`), and a
    second value of it that is drawn as a notch."""

    name: str
    share: Any
    colour: str = "d0"
    notch: float | None = None


@dataclass(frozen=True)
class Figure:
    """Bars with intervals on one axis; `keys` name their colours, a line marks the share `rule`."""

    title: str
    caption: str
    bars: Sequence[Bar]
    keys: Mapping[str, str] = field(default_factory=dict)
    rule: float | None = None

    def marks(self, bar: Bar) -> Iterator[tuple[str, str]]:
        """Yield the parts of a bar: their class, and where they are along the axis."""
        ends = [0.0, self.rule, *(end for one in self.bars for end in _values(one))]
        low, high = (pick(one for one in ends if one is not None) for pick in (min, max))
        share, whole = bar.share, high - low or 1.0
        for kind, start, end in (
            ("fill", 0.0, share.value),
            ("span", share.low, share.high),
            ("notch", bar.notch, bar.notch),
            ("rule", self.rule, self.rule),
        ):
            if start is not None and end is not None:
                left = 100 * (min(start, end) - low) / whole
                width = f"; width: {100 * abs(end - start) / whole:.2f}%" if start != end else ""
                yield kind, f"left: {left:.2f}%{width}"


def _values(bar: Bar) -> tuple[float | None, ...]:
    return bar.share.value, bar.share.low, bar.share.high, bar.notch


def render(name: str, **context: Any) -> str:
    """Return a filled-in template; in HTML everything is escaped."""
    templates = Environment(
        loader=PackageLoader("calmix"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.globals |= {"w": words, "zip": zip}
    return templates.get_template(name).render(context)
