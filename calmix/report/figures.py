"""The charts of a study, each drawn from the analysis alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import TOTAL
from calmix.analysis.correlations import Correlation
from calmix.analysis.ranking import Ranked
from calmix.report import charts, words
from calmix.report.charts import DOT, INK, Cell, Chart, Key, Mark, Named
from calmix.report.words import STRATEGIES


def slug(text: str) -> str:
    """Return a name fit for a file: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("%", "pct")).strip("-")


def _by_strategy(rows: Sequence[Ranked]) -> list[Key]:
    made = {one.strategy for one in rows}
    return [(*look, DOT) for key, look in STRATEGIES.items() if key in made]


def condition_charts(analysis: Analysis, found: ConditionAnalysis) -> list[Chart]:
    """Return the charts of one condition, without those that nothing can be drawn in."""
    made = [_abilities(analysis, found), _ranking(analysis, found), _tasks(found)]
    return [*made, *_correlations(analysis, found)]


def _names(rows: Sequence[Ranked]) -> list[Named]:
    return [(one.calibration, STRATEGIES[one.strategy][1]) for one in rows]


def _cell(one: Ranked, name: str, kept: Estimate, digits: int, note: str) -> Cell:
    """Return a cell of a map of retention."""
    tip = f"{one.calibration}, {name}: "
    if kept.value is None:
        return Cell(None, "", f"{tip}no value")
    return Cell(
        kept.value, words.percent(kept.value, digits), f"{tip}{words.with_span(kept)} %{note}"
    )


def _abilities(analysis: Analysis, found: ConditionAnalysis) -> Chart:
    """Return the map of calibration sets by dimension."""
    means = np.concatenate([each.cells.means[:, : len(each.cells.quantities)].ravel()
                            for each in analysis.conditions])  # fmt: skip
    means = means[~np.isnan(means)]
    low = math.floor(10 * means.min(initial=1)) / 10  # one colour range for the whole study
    high = max(low + 0.1, math.ceil(10 * means.max(initial=0)) / 10)
    columns = (*analysis.dimensions, TOTAL)
    rows, best = found.ranking, found.ranking[0]

    def cell(one: Ranked, name: str) -> Cell:
        kept = one.total if name == TOTAL else one.dimensions[name]
        worst = name == one.worst and len(one.dimensions) > 1
        made = _cell(one, name, kept, 1, " (its worst dimension)" if worst else "")
        return made._replace(bold=worst or name == TOTAL, corner=worst)

    return Chart(
        f"heat-map-{slug(found.condition.label)}",
        f"Retention by calibration set and dimension, {found.condition.label}",
        "Percent of the dense model, highest total first; corners mark each set's worst "
        "dimension. One colour scale for the whole study.",
        f"Heat map of {len(rows)} calibration sets by {len(columns)} columns. Highest total: "
        f"{best.calibration}, {words.with_span(best.total)} %. The ranking holds the numbers.",
        partial(charts.heat, rows=_names(rows), columns=columns, low=low, high=high,
                cells=[[cell(one, name) for name in columns] for one in rows],
                keys=_by_strategy(rows)),
    )  # fmt: skip


def _tasks(found: ConditionAnalysis) -> Chart:
    """Sets by tasks, each headed by the dense model's score."""
    rows, tasks = found.ranking, found.cells.tasks
    known = [one.value for row in rows for one in row.tasks.values() if one.value is not None]
    cells = [[_cell(row, name, kept, 0, "") for name, kept in row.tasks.items()] for row in rows]
    return Chart(
        f"tasks-{slug(found.condition.label)}",
        f"Retention by calibration set and task, {found.condition.label}",
        "In percent; tasks are headed by their dense score (bits per byte: lower is better).",
        f"Heat map of {len(rows)} calibration sets by {len(tasks)} tasks. The numbers are in "
        "tasks.csv of calmix study analyse.",
        partial(charts.heat, rows=_names(rows),
                columns=[f"{task.name} {task.dense:.2f}" for task in tasks], cells=cells,
                low=min([0.0, *known]), high=max([1.0, *known]), tilted=True),
    )  # fmt: skip


def _ranking(analysis: Analysis, found: ConditionAnalysis) -> Chart:
    ranked = [one for one in found.ranking if one.total.value is not None]
    looks = {name: charts.look(at) for at, name in enumerate(analysis.dimensions)}
    lanes = []
    for one in ranked:
        notch = Mark(100 * (one.shrunken.value or 0), "", INK, "|")
        colour = STRATEGIES[one.strategy][1]
        bar = charts.mark(one.total, f"{one.calibration}, total", colour, "bar")
        lanes.append([[bar, notch]])
        if one.worst is not None:
            tip = f"{one.calibration}, worst: {one.worst}"
            lanes[-1].append([charts.mark(one.lowest, tip, *looks[one.worst])])
    worst = [(f"worst: {name}", colour, {"marker": marker, "linestyle": "none"})
             for name, (colour, marker) in looks.items()
             if any(one.worst == name for one in ranked)]  # fmt: skip
    over = "test items and seeds" if found.joint.freedom else "test items alone (one seed each)"
    return Chart(
        f"ranking-{slug(found.condition.label)}",
        f"Ranking by total, with the worst dimension, {found.condition.label}",
        f"Bars: total retention; marks: each set's worst dimension; lines: 95 % intervals over "
        f"{over}; notches: the total to expect of a set picked for its rank (shrunken).",
        "Bar chart: " + "; ".join(
            f"{one.calibration} {words.with_span(one.total)}"
            + (f", worst {one.worst} {words.percent(one.lowest.value)}" if one.worst else "")
            for one in found.ranking
        ) + ".",
        partial(charts.bars, rows=_names(ranked), lanes=lanes, below="retention, %",
                keys=[*_by_strategy(ranked), *worst], rule=0),
    )  # fmt: skip


def _correlation(one: Correlation | None) -> str:
    if one is None or one.rho is None:
        return "too few sets for a correlation"
    ends = f" [{words.rho(one.low)}, {words.rho(one.high)}]" if one.low is not None else ""
    q = words.p_value(one.p_corrected) + " ●" * one.significant
    return f"ρ {words.rho(one.rho)}{ends}  p {words.p_value(one.p)}  q {q}"


def _correlations(analysis: Analysis, found: ConditionAnalysis) -> Iterator[Chart]:
    columns = (*analysis.dimensions, TOTAL)
    own = {(one.metric, one.quantity): one for one in found.correlations}
    if all(one.rho is None for one in own.values()):
        return
    metrics = list(dict.fromkeys(name for name, _ in own))
    cells = [
        [Cell(one.rho, words.rho(one.rho) + " ●" * one.significant,
              f"{metric} and {name}: {_correlation(one)}", one.significant)
         for name in columns for one in [own[metric, name]]]
        for metric in metrics
    ]  # fmt: skip
    rows = [(metric, None) for metric in metrics]
    strong = sum(one.significant for one in own.values())
    yield Chart(
        f"correlations-{slug(found.condition.label)}",
        f"Properties of the text and what is kept, {found.condition.label}",
        f"Spearman's ρ over {own[metrics[0], TOTAL].n} calibration sets; ● survives correction "
        f"over {analysis.tests} tests at 0.05.",
        f"Correlation map of {len(metrics)} metrics by {len(columns)} columns; "
        f"{words.counted(strong, 'correlation')} survive correction.",
        partial(charts.heat, rows=rows, columns=columns, cells=cells, ramp="RdBu", low=-1),
    )  # fmt: skip
