"""The charts of a study, each drawn from the analysis alone."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import TOTAL
from calmix.analysis.ranking import Ranked
from calmix.report import charts, words
from calmix.report.charts import LOOKS, Cell, Chart, Key, Mark, Named
from calmix.report.words import STRATEGIES


def condition_charts(analysis: Analysis, analysed: ConditionAnalysis) -> list[Chart]:
    """Return the charts of one condition, without empty ones."""
    charts = [
        _abilities(analysis, analysed),
        _ranking(analysis, analysed),
        _tasks(analysed),
    ]
    label = analysed.condition.label
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower().replace("%", "pct")).strip("-")
    return [
        replace(one, name=f"{one.name}-{slug}", title=f"{one.title}, {label}") for one in charts
    ]


def _rows(ranking: Sequence[Ranked]) -> tuple[list[Named], list[Key]]:
    """Return calibration sets as rows of a chart, and the legend of their strategies."""
    strategies = {one.strategy for one in ranking}
    keys = [(*look, "o") for key, look in STRATEGIES.items() if key in strategies]
    return [(one.calibration, STRATEGIES[one.strategy][1]) for one in ranking], keys


def _cells(
    ranking: Sequence[Ranked], parts: Iterable[Mapping[str, Estimate]], digits: int
) -> list[list[Cell]]:
    """Return the cells of a heat map: each calibration set's retention by part."""
    return [
        [
            (
                estimate.value,
                words.percent(estimate.value, digits),
                f"{one.calibration}, {name}: {words.with_span(estimate)} %",
            )
            for name, estimate in by_part.items()
        ]
        for one, by_part in zip(ranking, parts, strict=True)
    ]


def _abilities(analysis: Analysis, analysed: ConditionAnalysis) -> Chart:
    """Return the heat map of calibration sets by dimension."""
    means = [each.cells.means[:, : len(each.cells.quantities)] for each in analysis.conditions]
    # One colour range for the whole study.
    low = math.floor(10 * min(np.nanmin(one, initial=1) for one in means)) / 10
    high = math.ceil(10 * max(np.nanmax(one, initial=0) for one in means)) / 10
    (rows, keys), best = _rows(analysed.ranking), analysed.ranking[0]
    columns = (*best.dimensions, TOTAL)
    parts = ({**one.dimensions, TOTAL: one.total} for one in analysed.ranking)
    return Chart(
        "heat-map",
        "Retention by calibration set and dimension",
        "Percent of the dense model, highest total first. The whole study has one colour scale.",
        f"Heat map of {len(rows)} calibration sets by {len(columns)} columns. Highest total: "
        f"{best.calibration}, {words.with_span(best.total)} %. The ranking holds the numbers.",
        partial(
            charts.heat,
            rows=rows,
            columns=columns,
            low=low,
            high=max(low + 0.1, high),
            cells=_cells(analysed.ranking, parts, 1),
            keys=keys,
        ),
    )


def _tasks(analysed: ConditionAnalysis) -> Chart:
    """Return the heat map of calibration sets by task."""
    tasks = analysed.cells.tasks
    cells = _cells(analysed.ranking, (one.tasks for one in analysed.ranking), 0)
    known = [value for row in cells for value, _, _ in row if value is not None]
    return Chart(
        "tasks",
        "Retention by calibration set and task",
        "In percent; after each task its dense score (bits per byte: lower is better).",
        f"Heat map of {len(cells)} calibration sets by {len(tasks)} tasks. The numbers are in "
        "tasks.csv of calmix study analyse.",
        partial(
            charts.heat,
            rows=_rows(analysed.ranking)[0],
            columns=[f"{task.name} {task.dense:.2f}" for task in tasks],
            cells=cells,
            low=min([0.0, *known]),
            high=max([1.0, *known]),
        ),
    )


def _ranking(analysis: Analysis, analysed: ConditionAnalysis) -> Chart:
    ranked = [one for one in analysed.ranking if one.total.value is not None]
    rows, keys = _rows(ranked)
    looks = dict(zip(analysis.dimensions, itertools.cycle(LOOKS), strict=False))
    marks = list[list[Mark]]()
    for one in ranked:
        tip, colour = f"{one.calibration}, ", STRATEGIES[one.strategy][1]
        marks.append([(one.total, f"{tip}total", colour, "bar", one.shrunken.value)])
        if one.worst is not None:
            marks[-1].append((one.lowest, f"{tip}worst: {one.worst}", *looks[one.worst], None))
    worst = [
        (f"worst: {name}", *look)
        for name, look in looks.items()
        if any(one.worst == name for one in ranked)
    ]
    over = "test items and seeds" if analysed.joint.freedom else "test items alone (one seed each)"
    return Chart(
        "ranking",
        "Ranking by total, with the worst dimension",
        f"Bars: total retention; marks: each set's worst dimension; lines: 95 % intervals over "
        f"{over}; notches: expected total of a set chosen for its rank (shrunken).",
        "Bar chart: "
        + "; ".join(
            f"{one.calibration} {words.with_span(one.total)}"
            + (f", worst {one.worst} {words.percent(one.lowest.value)}" if one.worst else "")
            for one in analysed.ranking
        )
        + ".",
        partial(
            charts.bars, rows=rows, marks=marks, below="retention, %", keys=[*keys, *worst], rule=0
        ),
    )
