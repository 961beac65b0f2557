"""The chart kit: bars with dots, for pages and files.

Matplotlib draws in plain colours. In a page the theme's colours become CSS variables, so that one
drawing suits light and dark mode. An artist's group id carries the text of its tooltip. Every
function takes the figure's width in inches; a narrow one is laid out for a phone.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from calmix.report import words

INK, MUTED, GRID, PAPER = "#1a2230", "#5c6675", "#dde2e9", "#fefefe"
# Okabe and Ito's colours, darkened a little for marks on white.
COLOURS = ("#0a6fb1", "#b8730a", "#0b8a63", "#b0558e", "#8a6d00", "#c1440e")
MARKERS = ("o", "s", "D", "^", "v", "P")
LOOKS = tuple(zip(COLOURS, MARKERS, strict=True))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    PAPER: "paper",
    **{colour: f"d{number}" for number, colour in enumerate(COLOURS)},
    **{colour: f"s-{name}" for name, (_, colour) in words.STRATEGIES.items()},
}
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": MUTED,
    "legend.handletextpad": 0.4,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}
WIDTH = 8.6  # inches of 72 units; drawn 1.15 times as large in a page, or more
NARROW = 3.35  # the same on a phone
Key = tuple[str, str, str]  # of a legend: name, colour, marker
Named = tuple[str, str | None]  # a row: its name, and the colour of a dot before it
# A share with its interval: the estimate, tip, colour, a marker or `bar`, and a second value, which
# is a notch on a bar.
Mark = tuple[Any, str, str, str, float | None]


@dataclass(frozen=True)
class Chart:
    """A chart with file name, title, caption and a description for screen readers; `draw` makes a
    figure of a given width."""

    name: str
    title: str
    caption: str
    described: str
    draw: Callable[[float], Any]

    def file(self, width: float = WIDTH, ending: str = "") -> str:
        """Return the chart as an SVG file without its title; `ending` makes its ids distinct."""
        settings = {**SETTINGS, "svg.hashsalt": self.name + ending}
        with mpl.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure, target = self.draw(width), io.BytesIO()
            # Print the canvas directly: `savefig` would draw everything twice.
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            FigureCanvasSVG(figure).print_svg(target, metadata=nothing)
        tips = r'<g class="tip"><title>\1</title>'
        return re.sub(r'<g id="tip: ([^"]*)">', tips, target.getvalue().decode())

    def svg(self) -> str:
        """Return SVG elements in the page's colours, for wide and for narrow screens."""
        return self._element("", "wide", WIDTH) + self._element("-narrow", "narrow", NARROW)

    def _element(self, ending: str, kind: str, wide: float) -> str:
        name, text = self.name + ending, self.file(wide, ending)
        text = text[text.index("<svg") :]
        width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
        for pattern, new in (
            (r"(?s)<metadata>.*?</metadata>|<style.*?</style>", ""),
            (r"\n\s*", " "),
            (r"font: (\d+) ([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2"),
            (r"font: ([\d.]+px) [^;\"]*", r"font-size: \1"),
            (r"font-family: [^;\"]*;? ?", ""),
            *((colour, f"var(--{variable})") for colour, variable in VARIABLES.items()),
        ):
            text = re.sub(pattern, new, text)
        used = set(re.findall(r"#([\w-]+)", text))
        text = re.sub(r' id="([\w.-]+)"', lambda id: id[0] if id[1] in used else "", text)
        opening = (
            f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
            f'viewBox="0 0 {width} {height}" class="{kind}" style="--w:{float(width):.0f}" '
            'xmlns:xlink="http://www.w3.org/1999/xlink">'
            f'<title id="{name}-title">{html.escape(self.title)}</title>'
            f'<desc id="{name}-desc">{html.escape(self.described)}</desc>'
        )
        return opening + text[text.index(">") + 1 :].strip()


def _legend(figure: Any, keys: Sequence[Key], narrow: bool) -> None:
    handles = [
        mpl.lines.Line2D([], [], label=name, color=colour, marker=marker, linestyle="none")
        for name, colour, marker in keys
    ]
    if handles:
        most = 5 if not narrow else 1 if max(len(name) for name, *_ in keys) > 16 else 2
        figure.legend(handles=handles, loc="outside lower left", ncols=min(most, len(handles)))


def _named(axes: Any, rows: Sequence[Named], narrow: bool, lines: int = 1) -> None:
    """Label the rows of a chart from the top, with a dot if they have a colour."""
    wide = 15 if narrow else 40
    names = [
        "\n".join(textwrap.wrap(words.short(name, wide * lines), wide)[:lines]) for name, _ in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    left = mpl.transforms.ScaledTranslation(-9 / 72, 0, axes.figure.dpi_scale_trans)
    for y, (_, colour) in enumerate(rows):
        if colour:
            axes.plot(
                [0],
                [y],
                marker="o",
                color=colour,
                clip_on=False,
                markeredgewidth=0,
                transform=axes.get_yaxis_transform() + left,
            )
            axes.tick_params(axis="y", pad=16)


def bars(
    width: float,
    rows: Sequence[Named],
    marks: Sequence[Sequence[Mark]],
    below: str,
    keys: Sequence[Key],
    rule: float,
) -> Any:
    """Draw rows of bars and markers with intervals, and a line at `rule`."""
    narrow = width < WIDTH
    height = 0.8 + 0.3 * bool(keys) + sum(0.24 + 0.12 * len(row) for row in marks)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots()
    dot: dict[str, Any] = {"markersize": 8, "linestyle": "none", "zorder": 3}
    for at, row in enumerate(marks):
        for number, (share, tip, colour, marker, notch) in enumerate(row):
            y, bar = at + 0.6 * ((number + 0.5) / len(row) - 0.5), marker == "bar"
            value, low, high = (
                None if end is None else 100 * end for end in (share.value, share.low, share.high)
            )
            if bar:
                [drawn] = axes.barh(y, value, height=0.6 / len(row), color=colour)
            else:
                [drawn] = axes.plot(
                    [value], [y], marker=marker, color=colour, markeredgecolor=PAPER, **dot
                )
            drawn.set_gid(f"tip: {tip}: {words.with_span(share)} %")
            if low is not None:
                axes.plot(
                    [low, high],
                    [y, y],
                    color=INK if bar else colour,
                    linewidth=1.5,
                    solid_capstyle="butt",
                )
            if notch is not None:
                axes.plot([100 * notch], [y], marker="|", color=INK, **dot)
    _named(axes, rows, narrow, 1 + narrow)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.axvline(rule, color=MUTED, linewidth=1, linestyle="--" if rule else "-")
    axes.margins(x=0.03)
    axes.set_xlabel(below)
    _legend(figure, keys, narrow)
    return figure
