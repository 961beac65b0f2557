"""The chart kit: bars and dots, heat maps, scatter plots; in a page and as files.

Matplotlib draws with plain colours. In a page those of the theme become CSS variables, so that one
drawing is right in light and dark. What an artist's tip says is carried by its group id.
"""

from __future__ import annotations

import html
import importlib
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from calmix.report import words

INK, MUTED, GRID, PAPER = "#1a2230", "#5c6675", "#dde2e9", "#fefefe"
# Okabe and Ito's colours, darkened a little for marks on white.
COLOURS = ("#0a6fb1", "#b8730a", "#0b8a63", "#b0558e", "#8a6d00", "#c1440e")
MARKERS = ("o", "s", "D", "^", "v", "P")
STRATEGY_COLOURS = {
    "single": "#8a96a8",
    "mix": "#e07b1a",
    "self-cal": "#5b8def",
    "sgs": "#3aa6a0",
    "igsp": "#7e57c2",
    "self-written": "#9c4f96",
    "none": "#9c9080",
}
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    PAPER: "paper",
    **{colour: f"d{number}" for number, colour in enumerate(COLOURS)},
    **{colour: f"s-{name}" for name, colour in STRATEGY_COLOURS.items()},
}
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": MUTED,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.4,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "hatch.linewidth": 0.6,
}
WIDTH = 8.6  # inches of 72 units; drawn 1.15 times as large in a page, or more
NARROW = 3.35  # the same on a telephone
_width = ContextVar("width", default=WIDTH)
DOT = {"marker": "o", "linestyle": "none"}
Key = tuple[str, str, Mapping[str, Any]]  # of a legend: name, colour, look


class Mark(NamedTuple):
    """A value with its interval: a bar, a dot or a notch; in a scatter plot at x and y."""

    x: float
    tip: str
    colour: str
    marker: str = "o"
    low: float | None = None
    high: float | None = None
    y: float = 0.0
    hollow: bool = False
    label: str = ""


class Row(NamedTuple):
    """A row of bars and dots: lanes one below the other, a dot of a colour before its name."""

    name: str
    lanes: Sequence[Sequence[Mark]]
    colour: str | None = None


class Panel(NamedTuple):
    """One pair of axes and its marks."""

    title: str
    content: Sequence[Mark]
    below: str = ""
    beside: str = ""
    note: str = ""


class Cell(NamedTuple):
    """A cell of a heat map; hatched without a value, with a mark in its corner or none."""

    value: float | None
    text: str
    tip: str
    bold: bool = False
    corner: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with its file name, title, caption, and a description for who cannot see it."""

    name: str
    title: str
    caption: str
    described: str
    draw: Callable[[], Any]

    def file(self) -> str:
        """Return the chart as a file of SVG, its title above."""
        with self._drawn(WIDTH) as figure:
            figure.suptitle(self.title, x=0.012, ha="left", fontsize=12, fontweight="bold")
            wide, high = figure.get_size_inches()
            figure.set_size_inches(wide, high + 0.3)
            return _svg(figure)

    @contextmanager
    def _drawn(self, width: float) -> Iterator[Any]:
        settings = {**SETTINGS, "svg.hashsalt": self.name}
        with matplotlib().rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            token = _width.set(width)
            try:
                yield self.draw()
            finally:
                _width.reset(token)

    def svg(self) -> str:
        """Return the chart as SVG elements for a page, coloured by its theme: a wide one, and one
        for narrow screens."""
        return self._element(self.name, "wide", WIDTH) + self._element(
            f"{self.name}-narrow", "narrow", NARROW
        )

    def _element(self, name: str, kind: str, wide: float) -> str:
        with self._drawn(wide) as figure:
            text = _svg(figure)
        text = text[text.index("<svg") :]
        width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(r"\n\s*", " ", text)
        text = re.sub(r"font: (\d+ )?([\d.]+px) [^;\"]*", _font, text)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var(--{variable})")
        used = set(re.findall(r"#([\w-]+)", text))
        text = re.sub(
            r' id="([\w.-]+)"',
            lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "",
            text,
        )
        text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
        opening = (
            f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
            f'viewBox="0 0 {width} {height}" class="{kind}" style="--w:{float(width):.0f}" '
            'xmlns:xlink="http://www.w3.org/1999/xlink">'
            f'<title id="{name}-title">{html.escape(self.title)}</title>'
            f'<desc id="{name}-desc">{html.escape(self.described)}</desc>'
        )
        return opening + text[text.index(">") + 1 :].strip()


def _font(found: re.Match[str]) -> str:
    weight = f"font-weight: {found[1].strip()}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}"


def matplotlib() -> Any:
    """Return matplotlib; it is slow to import, and few verbs draw."""
    found = importlib.import_module("matplotlib")
    for name in ("figure", "backends.backend_svg"):
        importlib.import_module(f"matplotlib.{name}")
    return found


# A canvas' own printing: `savefig` would draw everything once more beforehand, to lay it out.
def _svg(figure: Any) -> str:
    target, nothing = io.BytesIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas = matplotlib().backends.backend_svg.FigureCanvasSVG(figure)
    canvas.print_svg(target, metadata=nothing)
    tips = r'<g class="tip"><title>\1</title>'
    return re.sub(r'<g id="tip: ([^"]*)">', tips, target.getvalue().decode())


def _tip(artist: Any, text: str) -> None:
    if text:
        artist.set_gid(f"tip: {text}")


def _narrow() -> bool:
    return _width.get() < WIDTH


def _figure(height: float, width: float = 0.0) -> Any:
    size = _width.get() if _narrow() else max(WIDTH, width), height
    return matplotlib().figure.Figure(figsize=size, layout="constrained")


def _legend(figure: Any, keys: Sequence[Key]) -> None:
    line = matplotlib().lines.Line2D
    handles = [line([], [], label=name, color=colour, **look) for name, colour, look in keys]
    if handles:
        most = 5 if not _narrow() else 1 if max(len(name) for name, *_ in keys) > 16 else 2
        figure.legend(handles=handles, loc="outside lower left", ncols=min(most, len(handles)))


def _named(axes: Any, rows: Sequence[tuple[str, str | None]], lines: int = 1) -> None:
    """Name the rows of a chart from the top, each after a dot where it has a colour."""
    wide = 15 if _narrow() else 40
    names = ["\n".join(textwrap.wrap(words.short(name, wide * lines), wide)[:lines])
             for name, _ in rows]  # fmt: skip
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    mpl = matplotlib()
    left = mpl.transforms.ScaledTranslation(-9 / 72, 0, axes.figure.dpi_scale_trans)
    for y, (_, colour) in enumerate(rows):
        if colour:
            axes.plot([0], [y], marker="o", color=colour, clip_on=False, markeredgewidth=0,
                      transform=axes.get_yaxis_transform() + left)  # fmt: skip
            axes.tick_params(axis="y", pad=16)


def bars(
    panels: Mapping[str, Sequence[Row]], below: str, keys: Sequence[Key] = (), *,
    rule: float | None = None,
) -> Any:  # fmt: skip
    """Rows of bars and dots with their intervals, panels one below the other, by title."""
    heights = [0.2 + sum(0.24 + 0.12 * len(row.lanes) for row in rows) for rows in panels.values()]
    figure = _figure(0.6 + 0.3 * bool(keys) + sum(heights) + 0.4 * (len(panels) - 1))
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights).ravel()
    marks = [mark for rows in panels.values() for row in rows for lane in row.lanes
             for mark in lane]  # fmt: skip
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        for at, row in enumerate(rows):
            for number, lane in enumerate(row.lanes):
                y = at + 0.6 * ((number + 0.5) / len(row.lanes) - 0.5)
                for mark in lane:
                    _mark(axes, mark, y, 0.6 / len(row.lanes))
        _named(axes, [(row.name, row.colour) for row in rows], 1 + _narrow())
        axes.set_title("\n".join(textwrap.wrap(title, 36 if _narrow() else 90)))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        if rule is not None:
            axes.axvline(rule, color=MUTED, linewidth=1, linestyle="--" if rule else "-")
    if any(mark.marker == "bar" for mark in marks):
        ends = [end for mark in marks for end in (mark.x, mark.low, mark.high) if end is not None]
        axes.set_xlim(1.03 * min([0.0, *ends]), 1.03 * max(ends))
    axes.set_xlabel(below)
    _legend(figure, keys)
    return figure


def _mark(axes: Any, mark: Mark, y: float, height: float) -> None:
    bar = mark.marker == "bar"
    if bar:
        [drawn] = axes.barh(y, mark.x, height=height, color=mark.colour)
    else:
        edge = {"markeredgecolor": PAPER} if mark.marker != "|" else {}
        [drawn] = axes.plot([mark.x], [y], marker=mark.marker, markersize=8, linestyle="none",
                            color=mark.colour, zorder=3, **edge)  # fmt: skip
    _tip(drawn, mark.tip)
    if mark.low is not None and mark.high is not None:
        axes.plot([mark.low, mark.high], [y, y], color=INK if bar else mark.colour, linewidth=1.5,
                  solid_capstyle="butt")  # fmt: skip


def _grid(panels: Sequence[Panel]) -> Any:
    """Return a figure and the axes of each panel, titled and labelled."""
    columns = 1 if _narrow() else min(2 if len(panels) in (2, 4) else 3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(0.5 + 2.75 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_title(words.short(panel.title, 24), pad=20 if panel.note else None)
        axes.annotate(panel.note, (0, 1), xycoords="axes fraction", xytext=(0, 6), fontsize=9.5,
                      textcoords="offset points", color=MUTED)  # fmt: skip
        axes.set(xlabel=panel.below, ylabel=panel.beside)
        axes.grid()
        axes.tick_params(labelcolor=MUTED)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure, grid[: len(panels)]


def scatter(panels: Sequence[Panel], keys: Sequence[Key] = ()) -> Any:
    """Dots over a logarithmic axis, hollow or filled, some with their name beside them."""
    figure, grid = _grid(panels)
    for axes, panel in zip(grid, panels, strict=True):
        axes.margins(y=0.12)
        axes.set_xscale("log")
        for mark in panel.content:
            edge = mark.colour if mark.hollow else PAPER
            [dot] = axes.plot([mark.x], [mark.y], marker="o", markersize=7.5, linestyle="none",
                              color=PAPER if mark.hollow else mark.colour, markeredgecolor=edge,
                              markeredgewidth=1.8 if mark.hollow else 0.9)  # fmt: skip
            _tip(dot, mark.tip)
        low, high = (end((mark.x for mark in panel.content), default=1) for end in (min, max))
        for mark in panel.content:
            right = mark.x <= math.sqrt(low * high)
            axes.annotate(
                words.short(mark.label, 12 if _narrow() else 18), (mark.x, mark.y),
                xytext=(6 if right else -6, 8), textcoords="offset points",
                ha="left" if right else "right", fontsize=9.5,
            )  # fmt: skip
        rounds = [base * 10**power for power in range(-3, 9) for base in (1, 2, 3, 5)]
        shown = [x for x in rounds if low * 0.98 <= x <= high * 1.02]
        if len(shown) < 2:
            shown = [float(f"{low:.2g}"), float(f"{high:.2g}")]
        axes.set_xticks(shown, [f"{x:g}" for x in shown])
        axes.set_xticks([], minor=True)
    _legend(figure, keys)
    return figure


def heat(
    rows: Sequence[tuple[str, str | None]], columns: Sequence[str],
    cells: Sequence[Sequence[Cell]], *, ramp: str = "YlGnBu", low: float = 0.0,
    high: float = 1.0, keys: Sequence[Key] = (), tilted: bool = False,
) -> Any:  # fmt: skip
    """A map of coloured cells, rows by columns."""
    mpl = matplotlib()
    heads = 1.9 if tilted else 0.9 + 0.6 * _narrow()
    figure = _figure(heads + 0.3 * len(rows) + 0.3 * bool(keys),
                     2.4 + (0.55 if tilted else 1.15) * len(columns))  # fmt: skip
    small = _narrow() and len(columns) > 7  # no room for numbers
    axes = figure.subplots()
    colour = partial(_ramp, mpl.colormaps[ramp], low, high)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            fill = None if cell.value is None else colour(cell.value)
            box = mpl.patches.Rectangle(
                (x + 0.02, y - 0.45), 0.96, 0.9, facecolor=fill or "none", linewidth=0,
                edgecolor=GRID if fill is None else PAPER, hatch="///" if fill is None else None,
            )  # fmt: skip
            _tip(axes.add_patch(box), cell.tip)
            if fill is None:
                continue
            ink = _readable(mpl.colors.to_rgb(fill))
            axes.text(x + 0.5, y, "" if small else cell.text, ha="center", va="center", color=ink,
                      fontsize=9.5, fontweight="bold" if cell.bold else "normal")  # fmt: skip
            if cell.corner:
                corner = [(x + 0.02, y - 0.45), (x + 0.1, y - 0.45), (x + 0.02, y - 0.12)]
                axes.add_patch(mpl.patches.Polygon(corner, facecolor=ink, edgecolor="none"))
    _named(axes, rows)
    axes.set(xlim=(-0.02, len(columns) + 0.02), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(
        [at + 0.5 for at in range(len(columns))], [words.short(name, 22) for name in columns]
    )
    axes.tick_params(axis="x", labeltop=True, labelbottom=False, labelcolor=INK)
    if tilted or _narrow():
        for label in axes.get_xticklabels():
            label.set(rotation=90 if small else 50, ha="left", rotation_mode="anchor")
    axes.spines[:].set_visible(False)
    _legend(figure, keys)
    return figure


def _ramp(colours: Any, low: float, high: float, value: float) -> str:
    return str(matplotlib().colors.to_hex(colours(0.06 + 0.88 * (value - low) / (high - low))))


def _readable(colour: Any) -> str:
    """Return black or white, whichever stands out more on a colour (WCAG's luminance)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"
