"""Answers kept against size on disk: the trials of studies, and quants of llama.cpp beside them.

    python benchmarks/frontier.py STORE... --model LABEL=MODEL [--anchors FOLDER] [-o FIGURE.svg]

A row a trial, the smallest first: bits a weight of the blocks' matrices, megabytes once packed (a
quantised trial's bits as its report has them; of a sparse one the mask, and what compression leaves
of kept weights), and kept of the answers that the dense model gets right. FOLDER is one that
`benchmarks/anchors.py` has filled. With -o they are drawn too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from calmix.deploy.pack import compressed_share
from calmix.evaluation.behaviour import behaviour, counted
from calmix.evaluation.retention import Estimate
from calmix.evaluation.scores import load_pair
from calmix.evaluation.suites import WRITTEN
from calmix.models import resolve_model
from calmix.models.shards import read_header, weight_bytes, weight_files
from calmix.pruning.solvers.grids import mask_bits
from calmix.report.charts import COLOURS, INK, MARKERS, SETTINGS
from calmix.report.words import with_span
from calmix.study import read_results

SAMPLE = 2**22  # words of a tensor that are compressed


class Point(NamedTuple):
    """A model: what it is drawn with, bits a weight, megabytes, and answers kept."""

    line: str
    name: str
    bits: float | None
    size: float
    kept: int
    of: int
    share: Estimate


class Sizes:
    """What a model's weights take once packed, by the bits of its blocks' matrices."""

    def __init__(self, model: str) -> None:
        folder = resolve_model(model)
        places = [(folder / file, name, one) for file in weight_files(folder)
                  for name, one in read_header(folder / file).items()]  # fmt: skip
        blocks = [one for _, name, one in places if ".layers." in name and len(one.shape) > 1]
        width = max(one.dtype.itemsize for _, _, one in places)
        self.matrices = sum(one.size for one in blocks) // width
        outside = weight_bytes(folder) - width * self.matrices

        def share(path: Path, place: Any) -> float:
            words = np.fromfile(path, f"u{width}", SAMPLE, offset=place.start)
            return compressed_share(words, place.dtype)

        path, _, head = max(places, key=lambda one: one[2].size)
        self._rest = outside * share(path, head)
        path, _, largest = max((one for one in places if one[2] in blocks),
                               key=lambda one: one[2].size)  # fmt: skip
        self.word = 8 * width * share(path, largest)

    def bits(self, sparsity: float) -> float:
        """Return the bits a weight of matrices that are sparse, and not quantised."""
        return mask_bits(sparsity) + (1 - sparsity) * self.word

    def megabytes(self, bits: float) -> float:
        """Return the size of the whole model."""
        return (self._rest + bits / 8 * self.matrices) / 1e6


def of_store(store: Path, sizes: dict[str, Sizes]) -> Iterator[Point]:
    """Yield the finished trials of a study's store."""
    results = read_results(store)
    for trial in results.trials:
        if trial.model not in sizes:
            continue
        told = json.loads((store / "trials" / trial.id / "pruning.json").read_text())
        bits = told.get("bits") or sizes[trial.model].bits(told["sparsity"])
        pairs = zip(results.paired[trial.id], results.scores[trial.id], strict=True)
        found = counted("all", [(a, b) for a, b in pairs if a.metric in WRITTEN])
        assert found is not None
        yield Point(
            f"{trial.method}, {trial.calibration}",
            f"{trial.method} {trial.pattern}, {trial.calibration}, seed {trial.seed}", bits,
            sizes[trial.model].megabytes(bits), found.kept, found.dense, found.share,
        )  # fmt: skip


def of_anchors(folder: Path) -> Iterator[Point]:
    """Yield llama.cpp's quants that were scored."""
    for path in sorted(folder.glob("Q*.json")):
        found = behaviour(load_pair(path)).answers
        size = path.with_suffix(".gguf").stat().st_size / 1e6
        yield Point("llama.cpp", f"llama.cpp {path.stem}", None, size, found.kept, found.dense,
                    found.share)  # fmt: skip


def draw(points: list[Point], path: Path) -> None:
    """Draw a line a method and text, with the intervals of the items."""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": "frontier"}):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.subplots()
        lines = list(dict.fromkeys(one.line for one in points))
        for number, line in enumerate(lines):
            own = sorted((one for one in points if one.line == line), key=lambda one: one.size)
            values = [100 * one.share.value for one in own]
            ends = [[100 * (one.share.value - one.share.low) for one in own],
                    [100 * (one.share.high - one.share.value) for one in own]]  # fmt: skip
            axes.errorbar(
                [one.size for one in own], values, yerr=ends, label=line, elinewidth=0.8,
                marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)],
                linestyle="--" if line == "llama.cpp" else "-",
            )  # fmt: skip
        axes.set(xlabel="size of the model's files, MB", ylabel="right answers kept, %",
                 ylim=(0, 100))  # fmt: skip
        axes.set_title("How many answers are left at which size", color=INK)
        axes.grid()
        figure.legend(loc="outside lower left", ncols=2)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print all points, and draw them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--model", action="append", required=True, metavar="LABEL=MODEL")
    parser.add_argument("--anchors", type=Path)
    parser.add_argument("--only", default="", help="lines to draw, separated by semicolons")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    sizes = {label: Sizes(model) for label, _, model in
             (text.partition("=") for text in asked.model)}  # fmt: skip
    points = [one for store in asked.stores for one in of_store(store, sizes)]
    points += of_anchors(asked.anchors) if asked.anchors else []
    points.sort(key=lambda one: one.size)
    print("| model | bits a weight | MB | answers kept, % |\n|---|---|---|---|")
    for one in points:
        bits, share = "" if one.bits is None else f"{one.bits:.2f}", one.share
        kept = f"{one.kept} of {one.of}: {with_span(share)}"
        print(f"| {one.name} | {bits} | {one.size:.1f} | {kept} |")
    if asked.output:
        only = asked.only.split(";") if asked.only else [one.line for one in points]
        draw([one for one in points if one.line in only], asked.output)


if __name__ == "__main__":
    main()
