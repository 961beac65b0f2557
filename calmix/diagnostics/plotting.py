"""The health of a pruned checkpoint as a small figure: sparsity and lost output, by block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from calmix.diagnostics.inspecting import Health, LayerHealth
from calmix.errors import InputError
from calmix.files import check_output_file, write_bytes
from calmix.report.drawing import (
    DIMENSION_COLOURS,
    DIMENSION_MARKERS,
    MUTED,
    Drawing,
    files,
    new_figure,
)

FORMATS = (".png", ".svg")


def check_plot(path: Path, inspected: Path) -> None:
    """Refuse a figure that cannot be written, before any work is done.

    Raises:
        InputError: the ending is neither .png nor .svg, the path is or lies in what is inspected,
            or no file can be written there.
    """
    if path.suffix.lower() not in FORMATS or path.is_dir():
        raise InputError(f"{path} is no {' or '.join(FORMATS)} file: name one for the plot")
    check_output_file(path, inputs=[inspected], overwrite=True)


def plot(health: Health, path: Path) -> None:
    """Write the figure of a pruned checkpoint; the same checkpoint gives the same bytes.

    Raises:
        InputError: there are no layers to draw, or the file cannot be written.
    """
    if not health.layers:
        raise InputError(f"{health.path} has no layers to draw: leave --plot out")
    drawing = Drawing(
        name="health",
        title=f"{Path(health.path).name}: {health.facts['method']}",
        caption="",
        described="Sparsity and share of lost output energy of every pruned layer, by block.",
        draw=lambda titled: _figure(health, titled),
    )
    write_bytes(path, files(drawing)[f"health{path.suffix.lower()}"])


def _figure(health: Health, titled: bool) -> Any:
    figure = new_figure(6.4, 4.8)
    top, bottom = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[tuple[int, LayerHealth]]] = {}
    for layer in health.layers:
        found = re.search(r"\.(\d+)\.", layer.name)
        block = int(found[1]) if found else 0
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append((block, layer))
    for number, (kind, members) in enumerate(kinds.items()):
        look = {
            "color": DIMENSION_COLOURS[number % len(DIMENSION_COLOURS)],
            "marker": DIMENSION_MARKERS[number % len(DIMENSION_MARKERS)],
            "markersize": 3.5,
            "linewidth": 1,
            "linestyle": "-" if number < len(DIMENSION_COLOURS) else ":",
        }
        blocks = [block for block, _ in members]
        top.plot(blocks, [100 * layer.sparsity for _, layer in members], label=kind, **look)
        lost = [None if la.error is None else 100 * la.error for _, la in members]
        bottom.plot(blocks, [float("nan") if x is None else x for x in lost], **look)
    top.set_ylabel("sparsity %")
    top.set_ylim(-2, 102)
    bottom.set_ylabel("lost output %")
    if any(layer.error is not None for layer in health.layers):
        bottom.set_ylim(bottom=0)
    else:
        bottom.text(0.5, 0.5, "not measured", transform=bottom.transAxes, ha="center", color=MUTED)
    bottom.set_xlabel("block")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(axis="y")
    figure.legend(loc="outside right upper", fontsize=8)
    if titled:
        top.set_title(f"{Path(health.path).name}: {health.facts['method']}")
    return figure
