"""Figures as files and as part of a page: colours, fonts, and bytes that never change.

Matplotlib draws with plain colours. In a page, the few that belong to the theme are replaced by
CSS variables of the same name, so that one drawing is right in light and in dark.
"""

from __future__ import annotations

import html
import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

INK, MUTED, GRID, PAPER = "#1a2230", "#5c6675", "#dde2e9", "#fefefe"
# Okabe and Ito's colours, darkened a little for marks on white.
DIMENSION_COLOURS = ("#0a6fb1", "#b8730a", "#0b8a63", "#b0558e", "#8a6d00", "#c1440e")
DIMENSION_MARKERS = ("o", "s", "D", "^", "v", "P")
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
    **{colour: f"d{number}" for number, colour in enumerate(DIMENSION_COLOURS)},
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
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "hatch.linewidth": 0.6,
}
TIP = "tip-"


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        name: of its files, without ending.
        title, caption: what it shows and how to read it.
        described: what it shows for who cannot see it.
        draw: makes the matplotlib figure; asked to put the title above or not.
        tips: what the mouse tells over the artist with the group id `tip-N`.
    """

    name: str
    title: str
    caption: str
    described: str
    draw: Callable[[bool], Any]
    tips: Sequence[str] = ()


def matplotlib() -> Any:
    """Return matplotlib with its Agg backend; it is slow to import, and few verbs draw."""
    found = importlib.import_module("matplotlib")
    importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib.backends.backend_agg")
    return found


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure; inches of 72 drawing units."""
    return matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def files(drawing: Drawing) -> dict[str, bytes]:
    """Return the figure's PNG and SVG files by name, its title drawn above."""
    with _settings(drawing.name):
        figure = drawing.draw(True)
        return {
            f"{drawing.name}.svg": _svg(figure),
            f"{drawing.name}.png": _png(figure),
        }


def inline(drawing: Drawing) -> str:
    """Return the figure as an SVG element for a page."""
    with _settings(drawing.name):
        text = _svg(drawing.draw(False)).decode()
    text = text[text.index("<svg") :]
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r"\n\s*", " ", text)
    text = re.sub(r"font: (\d+) ([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    for number, tip in enumerate(drawing.tips):
        mark = f'<g id="{TIP}{number}">'
        text = text.replace(mark, f'<g class="tip"><title>{html.escape(tip)}</title>')
    used = set(re.findall(r"(?:#|url\(#)([\w-]+)", text))
    text = re.sub(
        r' id="([\w.-]+)"',
        lambda found: f' id="{drawing.name}-{found[1]}"' if found[1] in used else "",
        text,
    )
    text = re.sub(r'href="#([\w-]+)"', rf'href="#{drawing.name}-\1"', text)
    text = re.sub(r"url\(#([\w-]+)\)", rf"url(#{drawing.name}-\1)", text)
    opening = (
        f'<svg role="img" aria-labelledby="{drawing.name}-title {drawing.name}-desc" '
        f'viewBox="0 0 {width} {height}" style="--w:{float(width):.0f}" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{drawing.name}-title">{html.escape(drawing.title)}</title>'
        f'<desc id="{drawing.name}-desc">{html.escape(drawing.described)}</desc>'
    )
    return opening + text[text.index(">") + 1 :].strip()


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    """Matplotlib's settings of this report; glyphs a font lacks are drawn as boxes, unsaid."""
    settings = {**SETTINGS, "svg.hashsalt": salt}
    with matplotlib().rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


# A canvas' own printing: `savefig` would draw everything once more beforehand, to lay it out.
def _svg(figure: Any) -> bytes:
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    target = io.BytesIO()
    _backend("svg").FigureCanvasSVG(figure).print_svg(target, metadata=nothing)
    figure.set_layout_engine("none")  # laid out once, for the files that follow
    return target.getvalue()


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.set_dpi(160)
    _backend("agg").FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
    return target.getvalue()


def _backend(name: str) -> Any:
    return importlib.import_module(f"matplotlib.backends.backend_{name}")
