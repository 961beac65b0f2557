"""The pictures of a report card: what is kept, where output was lost, how recovery went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calmix.report import words
from calmix.report.card import Card
from calmix.report.drawing import (
    DIMENSION_COLOURS,
    DIMENSION_MARKERS,
    GRID,
    MUTED,
    Drawing,
    matplotlib,
    new_figure,
)
from calmix.report.figures import WIDTH, Tips

TOTAL = "total"


def kept(cards: Sequence[Card]) -> Drawing:
    """Return retention by dimension with its intervals; one mark a model in each line."""
    names = [one.name for one in cards[0].kept.dimensions]
    rows = [*names, TOTAL]
    tips = Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        figure = new_figure(WIDTH, 0.9 + (0.3 + 0.17 * len(cards)) * len(rows))
        axes = figure.subplots()
        edges = [0.0, 1.0]
        for number, card in enumerate(cards):
            look = {
                "color": DIMENSION_COLOURS[number % len(DIMENSION_COLOURS)],
                "marker": DIMENSION_MARKERS[number % len(DIMENSION_MARKERS)],
            }
            for y, name in enumerate(rows):
                found = card.kept.total if name == TOTAL else card.kept.of(name)
                if found.value is None or found.low is None or found.high is None:
                    continue
                at = y + 0.5 * ((number + 0.5) / len(cards) - 0.5)
                edges += [found.low, found.high]
                told = f"{card.name}, {name}: {words.percent(found.value)} "
                told += f"{words.span(found.low, found.high)} %"
                axes.plot([100 * found.low, 100 * found.high], [at, at], color=look["color"],
                          linewidth=2.2, solid_capstyle="round")  # fmt: skip
                (mark,) = axes.plot([100 * found.value], [at], markersize=8, linestyle="none",
                                    label=card.name if y == 0 else None, **look)  # fmt: skip
                tips.add(mark, told)
        axes.axvline(100, color=MUTED, linewidth=1, linestyle="--")
        axes.set_xlim(10 * math.floor(10 * min(edges)), max(104, 100 * max(edges) + 2))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)))
        axes.set_yticklabels(rows, fontsize=10.5)
        axes.set_xlabel("retention %: 100 is the dense model, 0 one without the knowledge")
        axes.grid(axis="x")
        axes.tick_params(length=0)
        if len(cards) > 1:
            figure.legend(loc="outside lower left", ncols=min(4, len(cards)), fontsize=9.5,
                          labelcolor=MUTED)  # fmt: skip
        return figure

    told = "; ".join(
        f"{card.name}: " + ", ".join(f"{one.name} {words.percent(one.kept.value)}"
                                     for one in card.kept.dimensions)
        for card in cards
    )  # fmt: skip
    return Drawing(
        "kept", "What is kept, by dimension",
        "Bars: 95 % intervals over items. The dashed line is the dense model.",
        f"Retention in per cent. {told}.", draw, tips,
    )  # fmt: skip


def lost(card: Card) -> Drawing | None:
    """Return the map of output error by layer and block; None if none was measured."""
    measured = [layer for layer in card.layers if layer.error is not None]
    if not measured:
        return None
    kinds = list(dict.fromkeys(layer.kind for layer in measured))
    blocks = sorted({layer.block for layer in measured})
    most = max(layer.error or 0.0 for layer in measured) or 1.0
    tips = Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        mpl = matplotlib()
        ramp = mpl.colormaps["YlOrBr"]
        figure = new_figure(WIDTH, 1.1 + 0.3 * len(kinds))
        axes = figure.subplots()
        for layer in measured:
            share = (layer.error or 0.0) / most
            box = mpl.patches.Rectangle(
                (blocks.index(layer.block) - 0.46, kinds.index(layer.kind) - 0.44), 0.92, 0.88,
                facecolor=mpl.colors.to_hex(ramp(0.08 + 0.82 * share)), linewidth=0,
            )  # fmt: skip
            told = (
                f"block {layer.block}, {layer.kind}: {words.percent(layer.error)} % of its output"
            )
            tips.add(axes.add_patch(box), told)
        axes.set_xlim(-0.6, len(blocks) - 0.4)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_yticks(range(len(kinds)))
        axes.set_yticklabels(kinds)
        step = max(1, len(blocks) // 10)
        axes.set_xticks(range(0, len(blocks), step))
        axes.set_xticklabels([str(blocks[at]) for at in range(0, len(blocks), step)])
        axes.set_xlabel("block")
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        marks = [
            mpl.patches.Patch(
                facecolor=mpl.colors.to_hex(ramp(0.08 + 0.82 * share)), edgecolor=GRID,
                label=f"{words.percent(share * most)} %",
            )
            for share in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]  # fmt: skip
        figure.legend(handles=marks, loc="outside lower left", ncols=len(marks), fontsize=9.5,
                      labelcolor=MUTED)  # fmt: skip
        return figure

    worst = max(measured, key=lambda layer: layer.error or 0.0)
    mean = sum(layer.error or 0.0 for layer in measured) / len(measured)
    return Drawing(
        "lost", "Where output was lost",
        "Share of each layer's output energy that the prune lost on the calibration set, before "
        f"recovery: {words.percent(mean)} % on average.",
        f"Map of {len(kinds)} kinds of layer by {len(blocks)} blocks. Most was lost in block "
        f"{worst.block}, {worst.kind}: {words.percent(worst.error)} %.", draw, tips,
    )  # fmt: skip


def recovery(card: Card) -> list[Drawing]:
    """Return the losses of each recovery, in the order they were run."""
    made = {"distill": _distilled, "blocks": _by_blocks}
    return [made[told["method"]](told) for told in card.recoveries if told["method"] in made]


def _distilled(told: Any) -> Drawing:
    curve = told["curve"]
    losses, readings = curve["losses"], curve["held_out"]
    lines = [
        Line("training rows, each step", MUTED, "", range(1, len(losses) + 1), losses),
        Line("held-out rows", DIMENSION_COLOURS[0], "o", *zip(*readings, strict=True)),
    ]
    return Drawing(
        "distill", "Recovery of the whole model",
        f"KL to the dense model's next-token distributions. Held-out rows: {told['before']:.3f} "
        f"before, {told['after']:.3f} after; the weights of step {curve['best']} were kept.",
        f"Losses of {len(losses)} steps and {len(readings)} readings of held-out rows, which fall "
        f"from {told['before']:.3f} to {told['after']:.3f}.",
        lambda titled: _curves(lines, "step", "KL, nats a token"),
    )  # fmt: skip


def _by_blocks(told: Any) -> Drawing:
    blocks = told["curve"]
    at = [one["block"] for one in blocks]
    lines = [
        Line(key, colour, mark, at, [one[key] for one in blocks])
        for key, colour, mark in (("before", MUTED, "o"), ("after", DIMENSION_COLOURS[2], "D"))
    ]
    return Drawing(
        "blocks", "Recovery block by block",
        f"Error of each block's output on held-out rows: {told['before']:.4f} before on average, "
        f"{told['after']:.4f} after.",
        f"Errors of {len(blocks)} blocks before and after training.",
        lambda titled: _curves(lines, "block", "relative error a token"),
    )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, colour and marker, and its points."""

    name: str
    colour: str
    mark: str
    x: Sequence[float]
    y: Sequence[float]


def _curves(lines: Sequence[Line], below: str, beside: str) -> Any:
    """Return a chart of lines over whole numbers, from zero up."""
    figure = new_figure(WIDTH, 2.9)
    axes = figure.subplots()
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, marker=line.mark, markersize=5,
                  linewidth=1.4, label=line.name)  # fmt: skip
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    highest = max((value for line in lines for value in line.y), default=0.0)
    axes.set_ylim(0, 1.05 * highest or None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    figure.legend(loc="outside lower left", ncols=len(lines), fontsize=9.5, labelcolor=MUTED)
    return figure
