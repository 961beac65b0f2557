"""The health of a pruned checkpoint as a small figure: sparsity and lost output, by block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from calmix.diagnostics.inspecting import Health
from calmix.errors import InputError
from calmix.files import check_output_file, write_bytes
from calmix.pruning.report import LayerReport
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
    """Refuse a figure that cannot be written, before any work is done."""
    if path.suffix.lower() not in FORMATS or path.is_dir():
        raise InputError(f"{path} is not a {' or '.join(FORMATS)} file: name one for the plot")
    check_output_file(path, inputs=[inspected], overwrite=True)


def plot(health: Health, path: Path) -> None:
    """Write the figure of a pruned checkpoint; the same checkpoint gives the same bytes."""
    if not health.layers:
        raise InputError(f"{health.path} has no layers to draw: leave --plot out")
    title = f"{Path(health.path).name}: {health.facts['method']}"
    described = "Sparsity and share of lost output energy of every pruned layer, by block."
    drawing = Drawing("health", title, "", described, lambda titled: _figure(health, title))
    write_bytes(path, files(drawing)[f"health{path.suffix.lower()}"])


def _figure(health: Health, title: str) -> Any:
    figure = new_figure(6.4, 4.8)
    top, bottom = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
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
        lost = [float("nan") if one.error is None else 100 * one.error for _, one in members]
        top.plot(blocks, [100 * one.sparsity for _, one in members], label=kind, **look)
        bottom.plot(blocks, lost, **look)
    if any(layer.error is not None for layer in health.layers):
        bottom.set_ylim(bottom=0)
    else:
        bottom.text(0.5, 0.5, "not measured", transform=bottom.transAxes, ha="center", color=MUTED)
    top.set(title=title, ylabel="sparsity %", ylim=(-2, 102))
    bottom.set(xlabel="block", ylabel="lost output %")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(axis="y")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
