"""The charts of a study, each drawn from the analysis alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import TOTAL
from calmix.analysis.correlations import Among, Correlation, counted
from calmix.analysis.ranking import Ranked
from calmix.analysis.statistics import LEAST
from calmix.report import charts, words
from calmix.report.charts import (
    COLOURS,
    DASHES,
    DOT,
    INK,
    MARKERS,
    STRATEGY_COLOURS,
    Cell,
    Chart,
    Key,
    Line,
    Mark,
    Panel,
    Row,
)
from calmix.report.findings import (
    AVERAGE,
    MIXED,
    TOP,
    WROTE,
    Kind,
    by_model,
    kinds,
    pruned_to,
)

NEAR = 0.005  # half a point: text of any size that keeps this near the most keeps enough
LINES: dict[str, tuple[str, Any]] = {
    MIXED: (STRATEGY_COLOURS["mix"], "-"),
    WROTE: (STRATEGY_COLOURS["igsp"], "-"),
    TOP: (INK, "-"),
    AVERAGE: (STRATEGY_COLOURS["single"], DASHES[1]),
}
Points = Mapping[str, Sequence[tuple[str, ConditionAnalysis]]]  # by model: label and condition


def slug(text: str) -> str:
    """Return a name fit for a file: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("%", "pct")).strip("-")


def _by_strategy(rows: Sequence[Ranked], label: str = "{}") -> list[Key]:
    made = {one.strategy for one in rows}
    return [(label.format(name), STRATEGY_COLOURS[key], DOT)
            for key, name in words.STRATEGIES.items() if key in made]  # fmt: skip


def _names(rows: Sequence[Ranked]) -> list[tuple[str, str | None]]:
    return [(one.calibration, STRATEGY_COLOURS[one.strategy]) for one in rows]


def condition_charts(analysis: Analysis, found: ConditionAnalysis) -> list[Chart]:
    """Return the charts of one condition, without those that nothing can be drawn in."""
    made = [_abilities(analysis, found), _ranking(analysis, found), _tasks(found)]
    for name in ("perplexity", "distortion"):
        if name in found.cells.metrics:
            x = found.cells.information[:, found.cells.metrics.index(name)]
            if len(np.unique(x[~np.isnan(x)])) > 1:
                made.append(_perplexity(analysis, found, name, x))
                break
    for among in words.AMONG:
        own = [one for one in found.correlations if one.among == among and not one.task]
        if any(one.rho is not None for one in own):
            made.append(_correlations(analysis, found, own))
    return made


def _abilities(analysis: Analysis, found: ConditionAnalysis) -> Chart:
    """Return the map of calibration sets by dimension."""
    kept = np.concatenate([each.cells.means[:, : len(each.cells.quantities)].ravel()
                           for each in analysis.conditions])  # fmt: skip
    kept = kept[~np.isnan(kept)]
    low = math.floor(10 * kept.min(initial=1)) / 10  # one colour range for the whole study
    high = max(low + 0.1, math.ceil(10 * kept.max(initial=0)) / 10)

    def cell(one: Ranked, name: str) -> Cell:
        kept = one.total if name == TOTAL else one.dimensions[name]
        worst = name == one.worst and len(one.dimensions) > 1
        tip = f"{one.calibration}, {name}: "
        if kept.value is None:
            return Cell(None, "", f"{tip}no value")
        tip += f"{words.with_span(kept)} %{' (its worst dimension)' if worst else ''}"
        return Cell(kept.value, words.percent(kept.value), tip, worst or name == TOTAL, worst)

    columns = (*analysis.dimensions, TOTAL)
    rows, best = found.ranking, found.ranking[0]
    return Chart(
        f"heat-map-{slug(found.condition.label)}",
        f"Retention by calibration set and dimension, {found.condition.label}",
        "Percent of the dense model, highest total first; corners mark each set's worst "
        "dimension. One colour scale for the whole study.",
        f"Heat map of {len(rows)} calibration sets by {len(columns)} columns. Highest total: "
        f"{best.calibration}, {words.with_span(best.total)} %. The ranking holds the numbers.",
        lambda: charts.heat(
            _names(rows), columns, [[cell(one, name) for name in columns] for one in rows],
            low=low, high=high, keys=_by_strategy(rows),
        ),
    )  # fmt: skip


def _tasks(found: ConditionAnalysis) -> Chart:
    """Sets by tasks, each headed by the dense model's score."""
    rows, tasks = found.ranking, found.cells.tasks
    known = [one.value for row in rows for one in row.tasks.values() if one.value is not None]

    def cell(row: Ranked, name: str) -> Cell:
        kept, own = row.tasks[name], name in row.halves
        tip = f"{row.calibration}, {name}: "
        if kept.value is None:
            return Cell(None, "", f"{tip}no signal")
        tip += f"{words.with_span(kept)} %{' (made of its other half)' if own else ''}"
        return Cell(kept.value, words.percent(kept.value, 0) + "*" * own, tip, own)

    return Chart(
        f"tasks-{slug(found.condition.label)}",
        f"Retention by calibration set and task, {found.condition.label}",
        "In percent; tasks are headed by their dense score (bits per byte: lower is better). * the "
        "set was made of the other half of that benchmark.",
        f"Heat map of {len(rows)} calibration sets by {len(tasks)} tasks. The numbers are in "
        "tasks.csv of calmix study analyse.",
        lambda: charts.heat(
            _names(rows), [f"{task.name} {task.dense:.2f}" for task in tasks],
            [[cell(row, task.name) for task in tasks] for row in rows],
            low=min([0.0, *known]), high=max([1.0, *known]), tilted=True,
        ),
    )  # fmt: skip


def _mark(one: Estimate, tip: str, colour: str, marker: str = "o", unit: str = "%") -> Mark:
    """Return an estimate as a mark in percent."""
    low, high = (None if end is None else 100 * end for end in (one.low, one.high))
    tip = f"{tip}: {words.with_span(one)} {unit}"
    return Mark(100 * (one.value or 0), tip, colour, marker, low, high)


def _ranking(analysis: Analysis, found: ConditionAnalysis) -> Chart:
    ranked = [one for one in found.ranking if one.total.value is not None]
    look = {name: (COLOURS[at % 6], MARKERS[at % 6]) for at, name in enumerate(analysis.dimensions)}
    rows = []
    for one in ranked:
        colour = STRATEGY_COLOURS[one.strategy]
        notch = Mark(100 * (one.shrunken.value or 0), "", INK, "|")
        lanes = [[_mark(one.total, f"{one.calibration}, total", colour, "bar"), notch]]
        if one.worst is not None:
            lanes.append([_mark(one.lowest, f"{one.calibration}, worst: {one.worst}",
                                *look[one.worst])])  # fmt: skip
        rows.append(Row(one.calibration, lanes, colour))
    worst = [(f"worst: {name}", colour, {"marker": marker, "linestyle": "none"})
             for name, (colour, marker) in look.items()
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
        lambda: charts.bars({"": rows}, "retention, %", [*_by_strategy(ranked), *worst], rule=0),
    )  # fmt: skip


def _perplexity(analysis: Analysis, found: ConditionAnalysis, metric: str, x: Any) -> Chart:
    cells = found.cells
    inside = set(counted(cells, analysis.settings.over))
    told = {one.quantity: one for one in of_metric(found, metric)}
    panels = []
    for number, name in enumerate(analysis.dimensions):
        y = 100 * cells.means[:, cells.quantities.index(name)]
        known = [at for at in range(len(x)) if not np.isnan(x[at]) and not np.isnan(y[at])]
        ends = sorted(inside & set(known), key=lambda at: y[at])
        marks = [
            Mark(x[at], f"{cells.sets[at]}: perplexity {x[at]:.1f}, {name} {y[at]:.1f} %",
                 COLOURS[number % 6] if at in inside else STRATEGY_COLOURS[cells.strategies[at]],
                 y=y[at], hollow=at not in inside,
                 label=cells.sets[at] if at in (ends[:1] + ends[1:][-1:]) else "")
            for at in known
        ]  # fmt: skip
        panels.append(Panel(name, marks, "perplexity (log)", "retention, %",
                            note=_correlation(told.get(name))))  # fmt: skip
    outside = [one for one in found.ranking if cells.sets.index(one.calibration) not in inside]
    over = "single sources only" if analysis.settings.over == "single" else "all sets"
    how = f"Too few sets for a correlation (over {over}, at least {LEAST})."
    if told:
        how = (
            f"ρ is Spearman's, over {over}, with its 95 % bootstrap interval; q: p corrected over "
            f"{analysis.families['sources']} tests. Hollow dots do not count."
        )
    return Chart(
        f"perplexity-{slug(found.condition.label)}",
        f"Perplexity of the calibration text and retention, {found.condition.label}",
        f"Each dot is a calibration set, seeds averaged. {how}",
        "Scatter plots of retention against perplexity: "
        + "; ".join(f"{panel.title}: {panel.note}" for panel in panels) + ".",
        lambda: charts.scatter(panels, _by_strategy(outside, "{} (hollow)")),
    )  # fmt: skip


def _correlation(one: Correlation | None) -> str:
    if one is None or one.rho is None:
        return "too few sets for a correlation"
    ends = f" [{words.rho(one.low)}, {words.rho(one.high)}]" if one.low is not None else ""
    q = words.p_value(one.p_corrected) + " ●" * one.significant
    return f"ρ {words.rho(one.rho)}{ends}  p {words.p_value(one.p)}  q {q}"


def of_metric(found: ConditionAnalysis, metric: str) -> list[Correlation]:
    """Return the correlations of a metric over all sources, be it another's alias."""
    told = []
    for one in found.correlations:
        if one.among != "sources" or one.task:
            continue
        if metric in (one.metric, *one.aliases):
            told.append(one)
        elif f"-{metric}" in one.aliases and one.rho is not None:
            low, high = (None if end is None else -end for end in (one.high, one.low))
            told.append(replace(one, rho=-one.rho, low=low, high=high))
    return told


def _correlations(
    analysis: Analysis, found: ConditionAnalysis, own: Sequence[Correlation]
) -> Chart:
    among: Among = own[0].among
    by_name = {(one.metric, one.quantity): one for one in own}
    metrics = list(dict.fromkeys(one.metric for one in own))
    columns = (*analysis.dimensions, TOTAL)
    within = "" if among == "sources" else f" {words.AMONG[among]}"
    strong = sum(one.significant for one in own)

    def cell(metric: str, name: str) -> Cell:
        one = by_name[metric, name]
        text = words.rho(one.rho) + " ●" * one.significant
        return Cell(one.rho, text, f"{words.metric_name(metric)} and {name}: {_correlation(one)}",
                    one.significant)  # fmt: skip

    return Chart(
        f"correlations{'-within' if within else ''}-{slug(found.condition.label)}",
        f"Properties of the text and what is kept{within}, {found.condition.label}",
        f"Spearman's ρ over {own[0].n} calibration sets{within}; ● survives correction over "
        f"{analysis.families[among]} tests at 0.05.",
        f"Correlation map of {len(metrics)} metrics by {len(columns)} columns; "
        f"{words.counted(strong, 'correlation')} survive correction.",
        lambda: charts.heat(
            [(words.metric_name(metric), None) for metric in metrics], columns,
            [[cell(metric, name) for name in columns] for metric in metrics],
            ramp="RdBu", low=-1, high=1,
        ),
    )  # fmt: skip


def _line(
    name: str, known: Sequence[tuple[float, Estimate]], look: tuple[str, Any], tip: str
) -> Line:
    return Line(name, [x for x, _ in known], [100 * (one.value or 0) for _, one in known], *look,
                tip=tip)  # fmt: skip


# The brief page's


def brief_charts(analysis: Analysis) -> list[Chart]:
    """Return the brief page's charts, without those that the study has nothing for."""
    first = by_model(analysis)

    def alike(found: ConditionAnalysis, *free: str) -> list[ConditionAnalysis]:
        """Return the conditions that differ from one in these alone."""
        fields = {"method", "pattern", "propagation", "rows", "length", "suite", "model"} - {*free}
        return [each for each in analysis.conditions if each.condition.rows
                and all(getattr(each.condition, name) == getattr(found.condition, name)
                        for name in fields)]  # fmt: skip

    sparser = {
        model: [
            (f"{100 * each.condition.sparsity:g}", each)
            for each in alike(found, "pattern")
            if each.condition.unstructured
        ]
        for model, found in first.items()
    }
    better = {
        model: [
            (each.condition.series.replace(f", {model}", ""), each)
            for each in alike(found, "method", "propagation")
        ]
        for model, found in first.items()
    }
    more = {model: [(str(each.condition.rows), each) for each in alike(found, "rows")]
            for model, found in first.items()}  # fmt: skip
    made = [
        _kept(first),
        _some_abilities(analysis, first),
        _curves("brief-sparser", "What is kept as more is pruned", "weights pruned, %", sparser,
                float),
        _curves("brief-better", "What is kept by each method", "", better, _order(better).index),
        _curves("brief-more", "What is kept by how much text", "rows of text", more,
                lambda rows: math.log2(int(rows)), _enough),
    ]  # fmt: skip
    return [one for one in made if one is not None]


def _kept(first: Mapping[str, ConditionAnalysis]) -> Chart | None:
    made = {model: kinds(found) for model, found in first.items()}
    if max(map(len, made.values())) < 2:
        return None
    own = {one.calibration for found in first.values() for one in found.ranking if one.halves}
    starred = any(one.name in own for told in made.values() for one in told.values())
    panels = {
        f"{model}, {pruned_to(first[model])}": [
            Row(f"{one.kind} ({words.short(one.name)}{'*' * (one.name in own)})",
                [[_mark(one.kept, f"{model}, {one.kind} ({one.name})",
                        STRATEGY_COLOURS[one.strategy], "bar")]])
            for one in told.values()
        ]
        for model, told in made.items()
    }  # fmt: skip
    return Chart(
        "brief-left", "What is kept, by kind of text",
        "Mean over dimensions, with 95 % intervals. The highest set stands for its kind; the best "
        "single source counts by what to expect of it."
        + (" * holds other items of benchmarks that are scored here." if starred else ""),
        "Bars: " + "; ".join(f"{model}, {one.kind} {words.percent(one.kept.value)} %"
                             for model, told in made.items() for one in told.values()),
        lambda: charts.bars(panels, "kept, % of the dense model's"),
    )  # fmt: skip


def _some_abilities(analysis: Analysis, first: Mapping[str, ConditionAnalysis]) -> Chart | None:
    """The best set of each way and kind under the first model, by dimension."""
    found = next(iter(first.values()))
    seen: dict[tuple[str, str], Ranked] = {}
    for one in found.ranking:
        seen.setdefault((one.strategy, one.kind if one.strategy == "single" else ""), one)
    if len(seen) < 2 or len(analysis.dimensions) < 2:
        return None
    made = _abilities(analysis, replace(found, ranking=tuple(seen.values())))
    return replace(
        made, name="brief-abilities", title="What each text keeps, by dimension",
        caption="In percent of the dense model's, the best text of each kind; a corner marks what "
        f"it keeps least of. {found.condition.model}, {pruned_to(found)}.",
    )  # fmt: skip


def _order(points: Points) -> list[str]:
    """Return methods in one order for all models: by what sets that were run with all of them keep,
    the least first."""
    kept: dict[str, list[float]] = {}
    for some in points.values():
        names = [{one.calibration for one in each.ranking} for _, each in some]
        common = set.intersection(*names)
        for way, each in some:
            kept.setdefault(way, []).extend(one.total.value or 0.0 for one in each.ranking
                                            if one.calibration in common)  # fmt: skip
    return sorted(kept, key=lambda way: sum(kept[way]) / max(1, len(kept[way])))


Along = dict[str, list[tuple[str, dict[str, Kind]]]]  # by model: label and kinds of text


def _enough(along: Along) -> str:
    """Say how few rows keep nearly the most of any."""
    enough = []
    for model, some in along.items():
        for kind in LINES:
            kept = [(made[kind].kept.value or 0, rows) for rows, made in some if kind in made]
            if len(kept) > 1:
                rows = next(rows for value, rows in kept if value >= max(kept)[0] - NEAR)
                enough.append(f"{model}, {kind}, {rows} rows")
    return f" Fewest rows within half a point of the most: {words.listed(enough)}."


def _curves(
    name: str, title: str, below: str, points: Points, place: Callable[[str], float],
    more: Callable[[Along], str] = lambda along: "",
) -> Chart | None:  # fmt: skip
    """Draw what is kept with each kind of text along an axis, a panel a model; single sources are
    those that every condition has."""
    panels: list[Panel] = []
    along: Along = {}
    for model, some in points.items():
        if len(some) < 2:
            continue
        names = [{one.calibration for one in each.ranking if one.strategy == "single"}
                 for _, each in some]  # fmt: skip
        common = set.intersection(*filter(None, names)) if any(names) else set()
        along[model] = [(label, kinds(each, common))
                        for label, each in sorted(some, key=lambda one: place(one[0]))]  # fmt: skip
        lines = []
        for kind, look in LINES.items():
            known = [(label, made[kind].kept) for label, made in along[model] if kind in made]
            tip = ", ".join(f"{label} {words.with_span(kept)} %" for label, kept in known)
            if known:
                at = [(place(label), kept) for label, kept in known]
                lines.append(_line(kind, at, look, f"{model}, {kind}: {tip}"))
        ticks = [(place(label), label.replace(" + ", " +\n")) for label, _ in along[model]]
        panels.append(Panel(model, lines, below, "" if panels else "kept, %", ticks))
    single = any(TOP in made for some in along.values() for _, made in some)
    return None if not panels else Chart(
        name, title,
        "Mean over dimensions, in percent of the dense model's."
        + (" The same single sources all along." if single else "") + more(along),
        f"Lines of {words.listed(LINES)} for {words.listed(along)}.",
        lambda: charts.lines(panels, columns=len(panels), height=3.2, sharey=True),
    )  # fmt: skip
