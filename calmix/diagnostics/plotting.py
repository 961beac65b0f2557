"""The health of a pruned checkpoint as a small figure: sparsity and lost output, by block."""

from __future__ import annotations

import math
import re
from pathlib import Path

from calmix.diagnostics.inspecting import Health
from calmix.errors import InputError
from calmix.files import check_output_file, write_bytes
from calmix.pruning.report import LayerReport
from calmix.report import charts
from calmix.report.charts import COLOURS, DASHES, MARKERS, Chart, Line, Panel

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
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    for layer in health.layers:
        found = re.search(r"\.(\d+)\.", layer.name)
        block = int(found[1]) if found else 0
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append((block, layer))
    sparsity, lost = [], []
    for number, (kind, members) in enumerate(kinds.items()):
        look = COLOURS[number % 6], DASHES[number // 6 % 4], MARKERS[number % 6]
        blocks = [block for block, _ in members]
        sparsity.append(Line(kind, blocks, [100 * one.sparsity for _, one in members], *look))
        errors = [math.nan if one.error is None else 100 * one.error for _, one in members]
        lost.append(Line(kind, blocks, errors, *look))
    measured = any(layer.error is not None for layer in health.layers)
    panels = [
        Panel("", sparsity, "block", "sparsity %"),
        Panel("", lost, "block", "lost output %", note="" if measured else "not measured"),
    ]
    chart = Chart(
        "health", f"{Path(health.path).name}: {health.facts['method']}", "",
        "Sparsity and share of lost output energy of every pruned layer, by block.",
        lambda: charts.lines(panels, columns=1, least=0),
    )  # fmt: skip
    write_bytes(path, chart.files()[path.suffix.lower().removeprefix(".")])
