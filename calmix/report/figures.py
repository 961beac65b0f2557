"""The figures of a report, each drawn from the analysis alone."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import Joint
from calmix.analysis.cells import TOTAL, WORST, Cells
from calmix.analysis.correlations import Among, Correlation, counted
from calmix.analysis.differences import SINGLES
from calmix.analysis.ranking import Ranked
from calmix.analysis.statistics import LEAST
from calmix.report import words
from calmix.report.drawing import (
    DIMENSION_COLOURS,
    DIMENSION_MARKERS,
    GRID,
    INK,
    MUTED,
    PAPER,
    STRATEGY_COLOURS,
    TIP,
    Drawing,
    matplotlib,
    new_figure,
)

WIDTH = 8.6  # inches of 72 units; drawn 1.25 times as large in a page, or more
PERPLEXITIES = ("perplexity", "distortion")
AMONG: tuple[Among, ...] = ("sources", "kinds")


def slug(text: str) -> str:
    """Return a name fit for a file: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("%", "pct")).strip("-")


def figures_of(analysis: Analysis, found: ConditionAnalysis) -> list[Drawing]:
    """Return the figures of one condition; those that nothing can be drawn in are left out."""
    drawings = [heat_map(analysis, found), _bars(analysis, found), _task_map(found)]
    if len(found.ranking) > 1:
        drawings.append(_spread(analysis, found))
    metric = perplexity_of(found)
    if metric is not None:
        drawings.append(_scatter(analysis, found, metric))
    for among in AMONG:
        if any(one.rho is not None and one.among == among for one in found.correlations):
            drawings.append(_map(analysis, found, among))
    return drawings


def perplexity_of(found: ConditionAnalysis) -> str | None:
    """Return the name of the perplexity among a condition's metrics."""
    for name in PERPLEXITIES:
        if name in found.cells.metrics:
            column = found.cells.information[:, found.cells.metrics.index(name)]
            if len(np.unique(column[~np.isnan(column)])) > 1:
                return name
    return None


def _colour(analysis: Analysis, dimension: str) -> str:
    at = analysis.dimensions.index(dimension)
    return DIMENSION_COLOURS[at % len(DIMENSION_COLOURS)]


def _marker(analysis: Analysis, dimension: str) -> str:
    at = analysis.dimensions.index(dimension)
    return DIMENSION_MARKERS[at % len(DIMENSION_MARKERS)]


class Tips(list[str]):
    """Collects what the mouse tells; gives each artist its group id."""

    def add(self, artist: Any, text: str) -> None:
        artist.set_gid(f"{TIP}{len(self)}")
        self.append(text)


def _limits(analysis: Analysis) -> tuple[float, float]:
    """Return one colour range for all heat maps of a study, in whole tens of percent."""
    values = np.concatenate([
        found.cells.means[:, : len(found.cells.quantities)].ravel() for found in analysis.conditions
    ])  # fmt: skip
    values = values[~np.isnan(values)]
    if not len(values):
        return 0.0, 1.0
    low = math.floor(float(values.min()) * 10) / 10
    high = math.ceil(float(values.max()) * 10) / 10
    return low, max(high, low + 0.1)


def heat_map(analysis: Analysis, found: ConditionAnalysis) -> Drawing:
    mpl = matplotlib()
    ramp = mpl.colormaps["YlGnBu"]
    low, high = _limits(analysis)
    columns = (*analysis.dimensions, TOTAL)
    tips = Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        rows = found.ranking
        figure = new_figure(_wide(columns), 1.15 + 0.3 * len(rows) + 0.3 * titled)
        axes = figure.subplots()
        for y, one in enumerate(rows):
            for x, name in enumerate(columns):
                estimate = one.total if name == TOTAL else one.dimensions[name]
                told = f"{one.calibration}, {name}: "
                left = x + _apart(name)
                if estimate.value is None:
                    _cell(axes, tips, (left, y), "", f"{told}no value")
                    continue
                fill = ramp(0.04 + 0.86 * (estimate.value - low) / (high - low))
                lowest = name == one.worst and len(one.dimensions) > 1
                told += f"{words.with_span(estimate)} %{' (its worst dimension)' if lowest else ''}"
                _cell(axes, tips, (left, y), words.percent(estimate.value), told, fill=fill,
                      bold=lowest or name == TOTAL)  # fmt: skip
                if lowest:
                    corner = [(left + 0.02, y - 0.45), (left + 0.1, y - 0.45),
                              (left + 0.02, y - 0.12)]  # fmt: skip
                    axes.add_patch(
                        mpl.patches.Polygon(
                            corner, closed=True, facecolor=_readable(fill), edgecolor="none"
                        )
                    )
        _frame(axes, columns, len(rows))
        _set_labels(axes, rows)
        _strategy_legend(figure, rows)
        put_title(figure, f"Retention (%) after {found.condition.label}", titled)
        return figure

    best = found.ranking[0]
    return Drawing(
        f"heat-map-{slug(found.condition.label)}",
        "Retention by calibration set and dimension",
        "Share of the dense model's ability that is left, in percent, highest total on top. The "
        "corner marks each set's worst dimension. One colour scale for the whole study.",
        f"Heat map of {len(found.ranking)} calibration sets by {len(columns)} columns. Highest "
        f"total: {best.calibration}, {words.with_span(best.total)} %. The table below holds the "
        "numbers.",
        draw,
        tips,
    )


def _task_map(found: ConditionAnalysis) -> Drawing:
    """Sets by tasks, below the dense score of each; tasks that share a benchmark are marked."""
    ramp = matplotlib().colormaps["YlGnBu"]
    tasks = found.cells.tasks
    known = [one.value for row in found.ranking for one in row.tasks.values()
             if one.value is not None]  # fmt: skip
    low, high = min([0.0, *known]), max([1.0, *known])
    tips = Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        rows = found.ranking
        width = max(WIDTH, 2.4 + 0.5 * len(tasks))
        figure = new_figure(width, 2.3 + 0.3 * len(rows) + 0.3 * titled)
        axes = figure.subplots()
        for x, task in enumerate(tasks):
            axes.text(x + 0.5, -1, f"{task.dense:.2f}", ha="center", va="center", color=MUTED,
                      fontsize=9.5)  # fmt: skip
            for y, row in enumerate(rows):
                one, own = row.tasks[task.name], task.name in row.halves
                told = f"{row.calibration}, {task.name}: "
                if one.value is None:
                    _cell(axes, tips, (x, y), "", f"{told}no signal")
                    continue
                told += f"{words.with_span(one)} %"
                told += " (made of its benchmark's other half)" if own else ""
                text = f"{words.whole_percent(one.value)}{'*' if own else ''}"
                fill = ramp(0.04 + 0.86 * (one.value - low) / (high - low))
                _cell(axes, tips, (x, y), text, told, fill=fill, bold=own)
        _frame(axes, [task.name for task in tasks], len(rows), -1.5)
        for label in axes.get_xticklabels():
            label.set(rotation=50, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(-1, len(rows)))
        axes.set_yticklabels(["dense score", *(words.short(row.calibration) for row in rows)])
        put_title(figure, f"Retention (%) of every task after {found.condition.label}", titled)
        return figure

    return Drawing(
        f"tasks-{slug(found.condition.label)}",
        "Retention by calibration set and task",
        "In percent, below each task's dense score (bits per byte: lower is better). * the set was "
        "made of the other half of that benchmark.",
        f"Heat map of {len(found.ranking)} calibration sets by {len(tasks)} tasks. The file "
        "tasks.csv of the analysis holds the numbers.",
        draw,
        tips,
    )


def _wide(columns: Sequence[str]) -> float:
    """Return a width that leaves room for each column's head."""
    return max(WIDTH, 2.4 + 1.15 * len(columns))


def _cell(
    axes: Any, tips: Tips, at: tuple[float, int], text: str, told: str, *,
    fill: Any = None, bold: bool = False,
) -> None:  # fmt: skip
    """Draw one cell of a map; hatched where it has no fill, that is no value."""
    x, y = at
    face = "none" if fill is None else matplotlib().colors.to_hex(fill)
    box = matplotlib().patches.Rectangle(
        (x + 0.02, y - 0.45), 0.96, 0.9, facecolor=face, linewidth=0,
        edgecolor=GRID if fill is None else PAPER, hatch="///" if fill is None else None,
    )  # fmt: skip
    tips.add(axes.add_patch(box), told)
    if fill is not None:
        axes.text(x + 0.5, y, text, ha="center", va="center", color=_readable(fill), fontsize=9.5,
                  fontweight="bold" if bold else "normal")  # fmt: skip


def _frame(axes: Any, columns: Sequence[str], rows: int, top: float = -0.5) -> None:
    """Set a map's limits and heads; the total stands a little apart."""
    axes.set_xlim(-0.02, len(columns) + 0.14 * (TOTAL in columns))
    axes.set_ylim(rows - 0.5, top)
    axes.set_xticks([x + 0.5 + _apart(name) for x, name in enumerate(columns)])
    axes.set_xticklabels([words.short(name, 16) for name in columns])
    axes.tick_params(length=0, pad=6, labeltop=True, labelbottom=False)
    axes.tick_params(axis="x", labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def _apart(name: str) -> float:
    return 0.12 if name == TOTAL else 0.0


def _readable(colour: Any) -> str:
    """Return black or white, whichever stands out more on a colour (WCAG's luminance)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _set_labels(axes: Any, rows: Sequence[Any]) -> None:
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([words.short(one.calibration) for one in rows])
    left = matplotlib().transforms.ScaledTranslation(-9 / 72, 0, axes.figure.dpi_scale_trans)
    for y, one in enumerate(rows):
        axes.plot(
            [0], [y], marker="o", markersize=6, color=STRATEGY_COLOURS[one.strategy],
            transform=axes.get_yaxis_transform() + left, clip_on=False, markeredgewidth=0,
        )  # fmt: skip
    axes.tick_params(axis="y", pad=16)


def legend(figure: Any, handles: Sequence[Any], below: Sequence[Any] = ()) -> None:
    """Put a legend under the axes: one line, and a second `below` it."""
    if below:
        blank = matplotlib().lines.Line2D([], [], linestyle="none", label=" ")
        pairs = itertools.zip_longest(handles, below, fillvalue=blank)
        handles = [handle for pair in pairs for handle in pair]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=max(1, len(handles) // (1 + bool(below))),
        fontsize=9.5, labelcolor=MUTED, handletextpad=0.3, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def _strategy_legend(figure: Any, rows: Sequence[Any], below: Sequence[Any] = ()) -> None:
    made = [name for name in words.STRATEGIES if any(one.strategy == name for one in rows)]
    line = matplotlib().lines.Line2D
    handles = [
        line([], [], marker="o", linestyle="none", markersize=6.5, markeredgewidth=0,
             color=STRATEGY_COLOURS[name], label=words.STRATEGIES[name])
        for name in made
    ]  # fmt: skip
    legend(figure, handles, below)


def put_title(figure: Any, text: str, titled: bool) -> None:
    if titled:
        figure.suptitle(text, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)


def _bars(analysis: Analysis, found: ConditionAnalysis) -> Drawing:
    tips = Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        rows = [one for one in found.ranking if one.total.value is not None]
        figure = new_figure(WIDTH, 1.5 + 0.36 * len(rows) + 0.3 * titled)
        axes = figure.subplots()
        axes.grid(axis="x")
        for y, one in enumerate(rows):
            total = 100 * (one.total.value or 0.0)
            upper, lower = y - 0.1, y + 0.28
            [bar] = axes.barh(upper, total, height=0.42, color=STRATEGY_COLOURS[one.strategy])
            tips.add(bar, f"{one.calibration}, total: {words.with_span(one.total)} %")
            whisker(axes, one.total, upper, INK, 1.4)
            axes.plot([100 * (one.shrunken.value or 0)], [upper], marker="|", color=INK,
                      markersize=11, linestyle="none")  # fmt: skip
            if one.worst is not None and one.lowest.value is not None:
                whisker(axes, one.lowest, lower, _colour(analysis, one.worst), 1.2)
                [mark] = axes.plot(
                    [100 * one.lowest.value], [lower], marker=_marker(analysis, one.worst),
                    color=_colour(analysis, one.worst), markersize=6, markeredgewidth=0,
                    linestyle="none",
                )  # fmt: skip
                tips.add(
                    mark, f"{one.calibration}, worst: {one.worst} {words.with_span(one.lowest)} %"
                )
        _set_labels(axes, rows)
        ends = [end for one in rows for end in (one.total.high, one.lowest.high, one.total.value)
                if end is not None]  # fmt: skip
        starts = [end for one in rows for end in (one.total.low, one.lowest.low) if end is not None]
        axes.set_xlim(103 * min([0.0, *starts]), 103 * max(ends, default=1.0))
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(length=0)
        axes.set_xlabel("retention, %")
        axes.spines["left"].set_visible(False)
        line = matplotlib().lines.Line2D
        worst = [name for name in analysis.dimensions if any(one.worst == name for one in rows)]
        _strategy_legend(
            figure, rows,
            [
                line([], [], marker=_marker(analysis, name), color=_colour(analysis, name),
                     linestyle="none", markersize=6.5, markeredgewidth=0, label=f"worst: {name}")
                for name in worst
            ],
        )  # fmt: skip
        put_title(figure, f"Total and worst dimension after {found.condition.label}", titled)
        return figure

    return Drawing(
        f"ranking-{slug(found.condition.label)}",
        "Ranking by total, with the worst dimension",
        "Bars are total retention, marks the dimension that suffers most. Lines are 95 % intervals "
        + ("over test items and calibration draws together" if found.joint.freedom
           else "over test items alone, every set being drawn once")
        + "; the notch is the total to expect of a set picked for its rank (shrunken).",
        "Bar chart: " + "; ".join(
            f"{one.calibration} {words.with_span(one.total)}"
            + (f", worst {one.worst} {words.percent(one.lowest.value)}" if one.worst else "")
            for one in found.ranking
        ) + ".",
        draw,
        tips,
    )  # fmt: skip


def whisker(axes: Any, one: Any, y: float, colour: str, width: float) -> None:
    if one.low is not None and one.high is not None:
        axes.plot([100 * one.low, 100 * one.high], [y, y], color=colour, linewidth=width,
                  solid_capstyle="butt")  # fmt: skip


def _spread(analysis: Analysis, found: ConditionAnalysis) -> Drawing:
    tips = Tips()
    columns = [
        name for name in (*analysis.dimensions, TOTAL)
        if not np.isnan(found.cells.means[:, found.cells.quantities.index(name)]).all()
    ]  # fmt: skip

    def draw(titled: bool) -> Any:
        tips.clear()
        figure = new_figure(WIDTH, 1.15 + 0.5 * len(columns) + 0.3 * titled)
        axes = figure.subplots()
        axes.grid(axis="x")
        for y, name in enumerate(columns):
            values = 100 * found.cells.means[:, found.cells.quantities.index(name)]
            known = values[~np.isnan(values)]
            axes.plot([known.min(), known.max()], [y, y], color=GRID, linewidth=9,
                      solid_capstyle="round", zorder=1)  # fmt: skip
            for at in np.argsort([made != "single" for made in found.cells.strategies]):
                made = found.cells.strategies[at]
                if np.isnan(values[at]):
                    continue
                [mark] = axes.plot(
                    [values[at]], [y], marker="o", markersize=8.5, linestyle="none", zorder=2,
                    color=STRATEGY_COLOURS[made], markeredgecolor=PAPER, markeredgewidth=1,
                )  # fmt: skip
                tips.add(mark, f"{found.cells.sets[at]}, {name}: {values[at]:.1f} %")
            axes.annotate(
                f"{known.max() - known.min():.1f} points", (known.max(), y), ha="left",
                va="center", xytext=(11, 0), textcoords="offset points",
                color=INK if name == TOTAL else MUTED, fontsize=9.5,
                fontweight="bold" if name == TOTAL else "normal",
            )  # fmt: skip
        low, high = axes.get_xlim()
        axes.set_xlim(low, high + 0.1 * (high - low))
        axes.set_yticks(range(len(columns)))
        axes.set_yticklabels([words.short(name, 16) for name in columns])
        axes.set_ylim(len(columns) - 0.4, -0.6)
        axes.tick_params(length=0)
        axes.set_xlabel("retention, %")
        axes.spines["left"].set_visible(False)
        _strategy_legend(figure, found.ranking)
        put_title(figure, f"What averaging hides, {found.condition.label}", titled)
        return figure

    return Drawing(
        f"spread-{slug(found.condition.label)}",
        "What averaging hides",
        "Each dot is a calibration set. How far apart they are in every dimension, and how far "
        "apart their averages are (total).",
        "Strip plot: " + "; ".join(
            f"{one.quantity} from {one.lowest} to {one.highest}, {100 * one.range:.1f} points"
            for one in found.spreads if one.over == "all"
        ) + ".",
        draw,
        tips,
    )  # fmt: skip


def _scatter(analysis: Analysis, found: ConditionAnalysis, metric: str) -> Drawing:
    tips = Tips()
    cells = found.cells
    x = cells.information[:, cells.metrics.index(metric)]
    inside = set(counted(cells, analysis.settings.over))
    told = {one.quantity: one for one in of_metric(found, metric)}

    def draw(titled: bool) -> Any:
        tips.clear()
        columns = 2 if len(analysis.dimensions) in (2, 4) else min(3, len(analysis.dimensions))
        lines = math.ceil(len(analysis.dimensions) / columns)
        figure = new_figure(WIDTH, 0.6 + 2.75 * lines + 0.3 * titled)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, name in itertools.zip_longest(grid.ravel(), analysis.dimensions):
            if name is None:
                axes.set_visible(False)
                continue
            y = 100 * cells.means[:, cells.quantities.index(name)]
            axes.grid()
            for at in np.argsort([made != "single" for made in cells.strategies]):
                if np.isnan(x[at]) or np.isnan(y[at]):
                    continue
                colour = STRATEGY_COLOURS[cells.strategies[at]]
                [mark] = axes.plot(
                    [x[at]], [y[at]], marker="o", markersize=7.5, linestyle="none",
                    color=_colour(analysis, name) if at in inside else PAPER,
                    markeredgecolor=PAPER if at in inside else colour,
                    markeredgewidth=0.9 if at in inside else 1.8,
                )  # fmt: skip
                label = f"{cells.sets[at]}: perplexity {x[at]:.1f}, {name} {y[at]:.1f} %"
                tips.add(mark, label)
            axes.set_xscale("log")
            _plain_log(axes, x)
            _name_ends(axes, cells, x, y, sorted(inside))
            axes.tick_params(length=0, labelcolor=MUTED)
            axes.set_title(words.short(name, 24), pad=20)
            axes.annotate(
                _correlation_line(told.get(name)), (0, 1), xycoords="axes fraction",
                xytext=(0, 6), textcoords="offset points", fontsize=9, color=MUTED,
            )  # fmt: skip
            axes.set_xlabel("perplexity (log)")
            axes.set_ylabel("retention, %")
        others = [one for one in found.ranking if cells.sets.index(one.calibration) not in inside]
        line = matplotlib().lines.Line2D
        legend(
            figure,
            [
                line([], [], marker="o", linestyle="none", markersize=7, markeredgewidth=0,
                     color=MUTED, label="counted in ρ")
            ] + [
                line([], [], marker="o", linestyle="none", markersize=7, color="none",
                     markeredgewidth=1.8, markeredgecolor=STRATEGY_COLOURS[made],
                     label=f"{words.STRATEGIES[made]} (not)")
                for made in words.STRATEGIES if any(one.strategy == made for one in others)
            ],
        )  # fmt: skip
        put_title(figure, f"Perplexity and retention, {found.condition.label}", titled)
        return figure

    counts = "single sources only" if analysis.settings.over == "single" else "all sets"
    told_how = (
        f" ρ is Spearman's, over {counts}, with its 95\u00a0% bootstrap interval; q is p "
        f"corrected over {analysis.families['sources']} tests."
        if told
        else f" Too few sets for a correlation (over {counts}, at least {LEAST})."
    )
    return Drawing(
        f"perplexity-{slug(found.condition.label)}",
        "Perplexity of the calibration text against what survives",
        f"One dot a calibration set, seeds averaged.{told_how}",
        "Scatter plots of retention against perplexity: " + "; ".join(
            f"{name}: {_correlation_line(told.get(name))}" for name in analysis.dimensions
        ) + ".",
        draw,
        tips,
    )  # fmt: skip


def _name_ends(axes: Any, cells: Cells, x: Any, y: Any, inside: Sequence[int]) -> None:
    """Write the names of the highest and the lowest counted dot beside them."""
    known = [at for at in inside if not np.isnan(x[at]) and not np.isnan(y[at])]
    if len(known) < 2:
        return
    middle = math.sqrt(min(x[at] for at in known) * max(x[at] for at in known))
    low, high = min(known, key=lambda at: y[at]), max(known, key=lambda at: y[at])
    axes.margins(y=0.12)
    for at, up in ((low, -8), (high, 8)):
        right = x[at] <= middle
        axes.annotate(
            words.short(cells.sets[at], 18), (x[at], y[at]), xytext=(6 if right else -6, up),
            textcoords="offset points", ha="left" if right else "right", va="center",
            fontsize=9, color=INK,
        )  # fmt: skip


def _correlation_line(one: Correlation | None) -> str:
    if one is None or one.rho is None:
        return "too few sets for a correlation"
    ends = "" if one.low is None or one.high is None else (
        f" [{words.rho(one.low)}, {words.rho(one.high)}]"
    )  # fmt: skip
    return f"ρ {words.rho(one.rho)}{ends}  p {words.p_value(one.p)}  q {_q(one)}"


def _q(one: Correlation) -> str:
    return words.p_value(one.p_corrected) + (" ●" if one.significant else "")


def _plain_log(axes: Any, values: Any) -> None:
    """Put a few round numbers on a logarithmic axis."""
    known = values[~np.isnan(values)]
    low, high = float(known.min()), float(known.max())
    round_numbers = [base * 10**power for power in range(-3, 9) for base in (1, 2, 3, 5)]
    shown = [value for value in round_numbers if low * 0.98 <= value <= high * 1.02]
    if len(shown) < 2:
        shown = [float(f"{low:.2g}"), float(f"{high:.2g}")]
    axes.set_xticks(shown)
    axes.set_xticklabels([f"{value:g}" for value in shown])
    axes.set_xticks([], minor=True)


def of_metric(found: ConditionAnalysis, metric: str) -> list[Correlation]:
    """Return the correlations of a metric over all sources, be it another's alias."""
    told = []
    for one in found.correlations:
        if one.among != "sources" or one.task:
            continue
        if metric in (one.metric, *one.aliases):
            told.append(one)
        elif f"-{metric}" in one.aliases and one.rho is not None:
            low = None if one.high is None else -one.high
            high = None if one.low is None else -one.low
            told.append(replace(one, rho=-one.rho, low=low, high=high))
    return told


def _map(analysis: Analysis, found: ConditionAnalysis, among: Among) -> Drawing:
    ramp = matplotlib().colormaps["RdBu"]
    tips = Tips()
    columns = (*analysis.dimensions, TOTAL)
    own = [one for one in found.correlations if one.among == among and not one.task]
    by_name = {(one.metric, one.quantity): one for one in own}
    metrics = list(dict.fromkeys(one.metric for one in own))
    within = "" if among == "sources" else " within kinds of text"

    def draw(titled: bool) -> Any:
        tips.clear()
        figure = new_figure(_wide(columns), 0.75 + 0.3 * len(metrics) + 0.3 * titled)
        axes = figure.subplots()
        for y, metric in enumerate(metrics):
            for x, name in enumerate(columns):
                one, left = by_name[metric, name], x + _apart(name)
                told = f"{words.metric_name(metric)} and {name}: "
                if one.rho is None:
                    _cell(axes, tips, (left, y), "", f"{told}no value")
                    continue
                text = words.rho(one.rho) + (" ●" if one.significant else "")
                _cell(axes, tips, (left, y), text, told + _correlation_line(one),
                      fill=ramp(0.5 + 0.44 * one.rho), bold=one.significant)  # fmt: skip
        _frame(axes, columns, len(metrics))
        axes.set_yticks(range(len(metrics)))
        axes.set_yticklabels([words.short(words.metric_name(metric)) for metric in metrics])
        put_title(
            figure, f"Metrics and retention{within} (Spearman), {found.condition.label}", titled
        )
        return figure  # fmt: skip

    strong = [one for one in own if one.significant]
    name = "correlations" if among == "sources" else "correlations-within"
    return Drawing(
        f"{name}-{slug(found.condition.label)}",
        f"Which property of the text goes with which ability{within}",
        f"Spearman's ρ over {own[0].n} calibration sets{', ranked' if within else ''}{within}; ● "
        f"survives correction over {analysis.families[among]} tests at 0.05.",
        f"Correlation map of {len(metrics)} metrics by {len(columns)} columns. "
        + (f"{words.counted(len(strong), 'correlation')} survive correction."
           if strong else "No correlation survives correction."),
        draw,
        tips,
    )  # fmt: skip


def sparsity_figures(analysis: Analysis, pairs: Sequence[tuple[Cells, Joint]]) -> list[Drawing]:
    """Return retention and margins against sparsity for conditions that differ in it alone."""
    series = [cells for cells, _ in pairs]
    if len({cells.condition.sparsity for cells in series}) < 2:
        return []
    ranking = next(one.ranking for one in analysis.conditions if one.cells is series[-1])
    lines = _lines(series, ranking)
    tips = Tips()
    quantities = (TOTAL, *analysis.dimensions)
    method = series[0].condition.series
    gains = [
        one for one in analysis.margins
        if one.condition in {cells.condition.label for cells in series}
        and one.quantity in (TOTAL, WORST)
    ]  # fmt: skip

    def draw(titled: bool) -> Any:
        tips.clear()
        panels = len(quantities) + bool(gains)
        columns = min(3, panels)
        figure = new_figure(WIDTH, 0.7 + 2.5 * math.ceil(panels / columns) + 0.3 * titled)
        grid = figure.subplots(math.ceil(panels / columns), columns, squeeze=False).ravel()
        shares = [100 * cells.condition.sparsity for cells in series]
        for axes, quantity in zip(grid, quantities, strict=False):
            _band(axes, series, quantity)
            for name, made in lines:
                told = [
                    (share, found.one(cells.sets.index(name), cells.quantities.index(quantity)))
                    for share, (cells, found) in zip(shares, pairs, strict=True)
                    if name in cells.sets
                ]
                known = [(share, one) for share, one in told if one.value is not None]
                [line] = axes.plot(
                    [share for share, _ in known], [100 * (one.value or 0) for _, one in known],
                    color=STRATEGY_COLOURS[made] if made != "single" else INK,
                    linestyle=_dash(lines, name), marker="o", markersize=4, linewidth=1.6,
                )  # fmt: skip
                tips.add(line, f"{name}, {quantity}: " + ", ".join(
                    f"{share:g} % sparse {words.with_span(one)}" for share, one in known
                ))  # fmt: skip
            axes.set_title(words.short(quantity, 24))
            axes.set_ylabel("retention, %")
        if gains:
            _gains(grid[len(quantities)], gains, lines, tips)
        for axes in grid[:panels]:
            axes.grid()
            axes.set_xticks(sorted(set(shares)))
            axes.set_xticklabels([f"{share:g}" for share in sorted(set(shares))])
            axes.set_xlabel("sparsity, %")
            axes.tick_params(length=0, labelcolor=MUTED)
        for axes in grid[panels:]:
            axes.set_visible(False)
        line = matplotlib().lines.Line2D
        patch = matplotlib().patches.Patch
        figure.legend(
            handles=[
                line([], [], linestyle=_dash(lines, name), linewidth=1.8,
                     color=STRATEGY_COLOURS[made] if made != "single" else INK,
                     label=words.short(name))
                for name, made in lines
            ] + [patch(facecolor=GRID, label="range of the single sources")],
            loc="outside lower left", ncols=5, fontsize=9.5, labelcolor=MUTED,
            columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip
        put_title(figure, f"Retention against sparsity, {method}", titled)
        return figure

    against = analysis.settings.default or SINGLES
    return [
        Drawing(
            f"sparsity-{slug(method)}",
            f"{method}: retention against sparsity",
            "Means over seeds. The line without a colour is the single source with the highest "
            f"total at the highest sparsity. Last panel: lead over the {against}.",
            "Line charts of retention at "
            + words.listed([cells.condition.pattern for cells in series]) + " sparsity; "
            + "; ".join(f"{one.calibration} leads by {words.points(one.gap.value)} points at "
                        f"{100 * one.sparsity:g} %" for one in gains if one.quantity == TOTAL)
            + ".",
            draw,
            tips,
        )
    ]  # fmt: skip


def _lines(series: Sequence[Cells], ranking: Sequence[Ranked]) -> list[tuple[str, str]]:
    """Return what gets a line: all that is no single source, and the first that is one."""
    found = [
        (name, made)
        for cells in series
        for name, made in zip(cells.sets, cells.strategies, strict=True)
        if made != "single"
    ]
    singles = [one for one in ranking if one.strategy == "single" and one.total.value is not None]
    found += [(one.calibration, "single") for one in singles[:1]]
    return list(dict.fromkeys(found))


def _dash(lines: Sequence[tuple[str, str]], name: str) -> Any:
    """Return a line style that tells sets made in the same way apart."""
    made = dict(lines)[name]
    place = [other for other, kind in lines if kind == made].index(name)
    return ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))][place % 4]


def _band(axes: Any, series: Sequence[Cells], quantity: str) -> None:
    shares, lows, highs = [], [], []
    for cells in series:
        values = cells.means[cells.of("single"), cells.quantities.index(quantity)]
        values = values[~np.isnan(values)]
        if len(values):
            shares.append(100 * cells.condition.sparsity)
            lows.append(100 * values.min())
            highs.append(100 * values.max())
    axes.fill_between(shares, lows, highs, color=GRID, linewidth=0)


def _gains(axes: Any, gains: Sequence[Any], lines: Sequence[tuple[str, str]], tips: Tips) -> None:
    axes.axhline(0, color=MUTED, linewidth=0.9)
    made_by = dict(lines)
    names = list(dict.fromkeys(one.calibration for one in gains))
    for number, name in enumerate(names):
        told = [one for one in gains if one.calibration == name and one.quantity == TOTAL]
        shift = 0.35 * (number - (len(names) - 1) / 2)
        colour = STRATEGY_COLOURS[made_by.get(name, "mix")]
        for one in told:
            if one.gap.low is not None and one.gap.high is not None:
                at = 100 * one.sparsity + shift
                ends = [100 * one.gap.low, 100 * one.gap.high]
                axes.plot([at, at], ends, color=colour, linewidth=1)
        [line] = axes.plot(
            [100 * one.sparsity + shift for one in told],
            [100 * (one.gap.value or 0) for one in told],
            color=colour, linestyle=_dash(lines, name) if name in made_by else "-", marker="o",
            markersize=4, linewidth=1.6,
        )  # fmt: skip
        tips.add(line, f"{name} over the default, total: " + ", ".join(
            f"{100 * one.sparsity:g} % sparse {words.points(one.gap.value)} points" for one in told
        ))  # fmt: skip
    axes.set_title("total: lead over default")
    axes.set_ylabel("points")
