"""The study on one page, to be passed on: plain words and at most five figures, then the claims."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.bootstrap import Estimate
from calmix.analysis.cells import TOTAL
from calmix.analysis.ranking import Ranked
from calmix.report import words
from calmix.report.drawing import INK, MUTED, STRATEGY_COLOURS, Drawing, new_figure
from calmix.report.figures import WIDTH, Tips, heat_map, legend, put_title, whisker
from calmix.report.page import certainty, claims_section
from calmix.report.parts import escape, figure, shell
from calmix.report.summary import Summary, main_condition
from calmix.study.results import StudyResults

MOST = 5  # figures
NEAR = 0.005  # of the most that is left, which text of any size keeps: half a point
WRITTEN = ("self-written", "igsp", "self-cal", "sgs")
MIXED, WROTE, BEST, MEAN, WORST = (
    "a mix of sources", "text the model wrote", "the best single source",
    "an average source", "the worst source",
)  # fmt: skip
LINES: dict[str, tuple[str, Any]] = {
    MIXED: (STRATEGY_COLOURS["mix"], "-"),
    WROTE: (STRATEGY_COLOURS["igsp"], "-"),
    BEST: (INK, "-"),
    MEAN: (STRATEGY_COLOURS["single"], (0, (5, 2))),
}
Points = dict[str, list[tuple[float, str, ConditionAnalysis]]]  # by model: place, label, condition


@dataclass(frozen=True)
class Bar:
    """What is left on one kind of text: the set that stands for it, and how it was made."""

    kind: str
    name: str
    strategy: str
    kept: Estimate


def bars(found: ConditionAnalysis, among: Collection[str] | None = None) -> list[Bar]:
    """Return what is left on each kind of text, the highest set standing for its kind.

    The best single source is told by its shrunken total, since it was picked of many.

    Args:
        among: single sources to look at; all if not given.
    """
    known = [one for one in found.ranking if one.total.value is not None]
    singles = _singles(found)
    if among is not None:
        singles = [one for one in singles if one.calibration in among]
    made = []
    for kind, how in ((MIXED, ("mix",)), (WROTE, WRITTEN)):
        some = [one for one in known if one.strategy in how]
        made += [Bar(kind, one.calibration, one.strategy, one.total) for one in some[:1]]
    made += [Bar(BEST, one.calibration, "single", one.shrunken) for one in singles[:1]]
    if len(singles) > 1:
        sets = [found.cells.sets.index(one.calibration) for one in singles]
        kept = found.joint.estimate(found.joint.mean(sets, 0))
        last = singles[-1]
        made.append(Bar(MEAN, words.counted(len(singles), "source"), "single", kept))
        made.append(Bar(WORST, last.calibration, "single", last.total))
    return made


def _singles(found: ConditionAnalysis) -> list[Ranked]:
    return [
        one for one in found.ranking if one.strategy == "single" and one.total.value is not None
    ]


def by_model(analysis: Analysis) -> dict[str, ConditionAnalysis]:
    """Return the condition to look at first of every model."""
    models = dict.fromkeys(found.condition.model for found in analysis.conditions)
    return {
        model: main_condition(
            replace(
                analysis,
                conditions=tuple(
                    found for found in analysis.conditions if found.condition.model == model
                ),
            )
        )
        for model in models
    }


def brief_figures(analysis: Analysis) -> list[Drawing]:
    """Return the page's figures; those that the study has nothing for are left out."""
    first = by_model(analysis)
    return [one for one in (
        _left(first), _abilities(analysis, first), _sparser(analysis, first),
        _better(analysis, first), _more(analysis, first), _distance(first),
    ) if one is not None][:MOST]  # fmt: skip


def brief(results: StudyResults, analysis: Analysis, summary: Summary) -> str:
    """Return the page as HTML."""
    first, drawn = by_model(analysis), brief_figures(analysis)
    lead = " ".join(_sentence(model, found) for model, found in first.items())
    waiting = analysis.planned - analysis.finished
    note = (
        f'<p class="warning">{analysis.finished} of {analysis.planned} planned runs are done: '
        "figures may change.</p>" if waiting > 0 else ""
    )  # fmt: skip
    header = (
        '<header><p class="kicker">calmix study</p>'
        f"<h1>What pruning leaves, by the text it is done on</h1>{note}"
        f'<p class="lead">{escape(words.held(lead))}</p></header>'
    )
    return shell(
        f"{results.name} · in short",
        header,
        [
            "".join(figure(drawing) for drawing in drawn),
            claims_section(summary),
            certainty(summary),
        ],
        'All figures and tables: <a href="report.html">report.html</a>. Written by calmix from the '
        "study's results; what each number means: docs/studies.md.",
    )


def _cut(found: ConditionAnalysis) -> str:
    at = found.condition
    share = f"{100 * at.sparsity:g} %" if at.unstructured else f"{at.pattern.replace(':', ' of ')}"
    return f"{share} of its weights"


def _sentence(model: str, found: ConditionAnalysis) -> str:
    made = {bar.kind: bar for bar in bars(found)}
    if not made:
        return f"{model}: nothing could be measured."
    told = [
        f"{words.percent(bar.kept.value)} % on {bar.kind}"
        for bar in made.values() if bar.kind != WORST
    ]  # fmt: skip
    return (
        f"With {_cut(found)} set to zero, {model} keeps this much of what it could: "
        f"{words.listed(told)}."
        + (f" {words.which_is_best(found.ranking)}." if len(found.ranking) > 1 else "")
    )


def _left(first: dict[str, ConditionAnalysis]) -> Drawing | None:
    made = {model: bars(found) for model, found in first.items()}
    rows = max(len(told) for told in made.values())
    if rows < 2:
        return None
    own = {one.calibration for found in first.values() for one in found.ranking if one.halves}
    starred = any(bar.name in own for told in made.values() for bar in told)
    tips = Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        picture = new_figure(WIDTH, 0.5 + len(made) * (0.75 + 0.36 * rows) + 0.3 * titled)
        panels = picture.subplots(len(made), 1, sharex=True, squeeze=False).ravel()
        for axes, (model, told) in zip(panels, made.items(), strict=True):
            for y, bar in enumerate(told):
                colour = STRATEGY_COLOURS[bar.strategy]
                [box] = axes.barh(y, 100 * (bar.kept.value or 0), height=0.6, color=colour)
                whisker(axes, bar.kept, y, INK, 1.4)
                tips.add(box, f"{model}, {bar.kind} ({bar.name}): {words.with_span(bar.kept)} %")
            axes.set_yticks(range(len(told)))
            names = [words.short(bar.name) + "*" * (bar.name in own) for bar in told]
            axes.set_yticklabels(
                [f"{bar.kind} ({name})" for bar, name in zip(told, names, strict=True)]
            )
            axes.invert_yaxis()
            axes.grid(axis="x")
            axes.tick_params(length=0)
            axes.set_title(f"{model}, {_cut(first[model])} removed")
        panels[-1].set_xlabel("abilities left, % of the whole model's")
        put_title(picture, "What is left, by kind of text", titled)
        return picture

    return Drawing(
        "brief-left", "What is left, by kind of text",
        "Mean over abilities, with 95 % intervals. The highest set stands for its kind; the best "
        "single source is given as what to expect of it."
        + (" * holds other items of benchmarks that are scored here." if starred else ""),
        "Bars: " + "; ".join(
            f"{model}, {bar.kind} {words.percent(bar.kept.value)} %"
            for model, told in made.items() for bar in told
        ), draw, tips,
    )  # fmt: skip


def _abilities(analysis: Analysis, first: dict[str, ConditionAnalysis]) -> Drawing | None:
    """A few sets of the first model by dimension: the best of each way and kind."""
    found = next(iter(first.values()))
    seen: dict[tuple[str, str], Any] = {}
    for one in found.ranking:
        seen.setdefault((one.strategy, one.kind if one.strategy == "single" else ""), one)
    if len(seen) < 2 or len(analysis.dimensions) < 2:
        return None
    made = heat_map(analysis, replace(found, ranking=tuple(seen.values())))
    return replace(
        made, name="brief-abilities", title="Which abilities each text keeps",
        caption="Percent of the whole model's, the best text of each kind; the corner marks what "
        f"it keeps least of. {found.condition.model}, {_cut(found)} removed.",
    )  # fmt: skip


def _sparser(analysis: Analysis, first: dict[str, ConditionAnalysis]) -> Drawing | None:
    points: Points = {}
    for model, found in first.items():
        points[model] = [
            (100 * each.condition.sparsity, f"{100 * each.condition.sparsity:g}", each)
            for each in analysis.conditions  # lowest sparsity first
            if each.condition.series == found.condition.series and each.condition.unstructured
        ]
    return _curves("brief-sparser", "What is left as more is removed", points, "weights removed, %")


def _better(analysis: Analysis, first: dict[str, ConditionAnalysis]) -> Drawing | None:
    """Ways stand in one order for all models: by what sets that were run in all of them keep."""
    ways: dict[str, dict[str, ConditionAnalysis]] = {}
    kept: dict[str, list[float]] = {}
    for model, found in first.items():
        ways[model] = {
            each.condition.series.replace(f", {model}", ""): each
            for each in analysis.conditions
            if _alike(each, found, "model", "pattern", "rows", "length")
        }
        names = [{one.calibration for one in each.ranking} for each in ways[model].values()]
        common = set.intersection(*names)
        for way, each in ways[model].items():
            kept.setdefault(way, []).extend(
                one.total.value or 0.0 for one in each.ranking if one.calibration in common
            )
    order = sorted(kept, key=lambda way: sum(kept[way]) / max(1, len(kept[way])))
    points: Points = {
        model: [(float(at), way, some[way]) for at, way in enumerate(order) if way in some]
        for model, some in ways.items()
    }
    return _curves("brief-better", "What is left by method", points, "")


def _more(analysis: Analysis, first: dict[str, ConditionAnalysis]) -> Drawing | None:
    points: Points = {}
    for model, found in first.items():
        sizes = [
            each for each in analysis.conditions
            if each.condition.rows
            and _alike(each, found, "model", "method", "pattern", "propagation", "length")
        ]  # fmt: skip
        sizes.sort(key=lambda each: each.condition.rows)
        points[model] = [
            (math.log2(each.condition.rows), str(each.condition.rows), each) for each in sizes
        ]
    made = _curves("brief-more", "What is left by how much text", points, "rows of text")
    if made is None:
        return None
    enough = [
        f"{model}, {kind}, {rows} rows" for model, some in points.items()
        for kind, rows in _enough(some).items()
    ]  # fmt: skip
    return replace(
        made,
        caption=f"{made.caption} Fewest within half a point of the most: {words.listed(enough)}.",
    )


def _enough(sizes: Sequence[tuple[float, str, ConditionAnalysis]]) -> dict[str, str]:
    """Return the fewest rows, of each kind of text, that keep nearly the most of any."""
    found: dict[str, list[tuple[float, str]]] = {}
    for _, rows, made in _along(sizes):
        for bar in made.values():
            if bar.kind in LINES:
                found.setdefault(bar.kind, []).append((bar.kept.value or 0, rows))
    return {
        kind: next(rows for value, rows in kept if value >= max(kept)[0] - NEAR)
        for kind, kept in found.items() if len(kept) > 1
    }  # fmt: skip


def _alike(one: ConditionAnalysis, other: ConditionAnalysis, *names: str) -> bool:
    """Return whether two conditions have these in common."""
    return all(getattr(one.condition, of) == getattr(other.condition, of) for of in names)


def _along(
    some: Sequence[tuple[float, str, ConditionAnalysis]],
) -> list[tuple[float, str, dict[str, Bar]]]:
    """Return places, labels and bars by kind, single sources being those that every point has."""
    names = [{one.calibration for one in _singles(each)} for _, _, each in some]
    common = set.intersection(*(each for each in names if each)) if any(names) else set()
    return [(x, label, {bar.kind: bar for bar in bars(each, common)}) for x, label, each in some]


def _curves(name: str, title: str, points: Points, below: str) -> Drawing | None:
    """Draw what is left on kinds of text along an axis, a panel a model."""
    told = {model: _along(some) for model, some in points.items() if len(some) > 1}
    if not told:
        return None
    tips = Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        picture, panels = _side_by_side(list(told), 3.4, below, title, titled)
        handles: dict[str, Any] = {}
        for axes, (model, some) in zip(panels, told.items(), strict=True):
            for kind, (colour, dash) in LINES.items():
                known = [(x, label, made[kind]) for x, label, made in some if kind in made]
                [line] = axes.plot(
                    [x for x, _, _ in known], [100 * (bar.kept.value or 0) for _, _, bar in known],
                    color=colour, linestyle=dash, marker="o", markersize=4, linewidth=1.8,
                    label=kind,
                )  # fmt: skip
                if known:
                    handles.setdefault(kind, line)
                tips.add(line, f"{model}, {kind}: " + ", ".join(
                    f"{label} {words.with_span(bar.kept)} %" for _, label, bar in known
                ))  # fmt: skip
            axes.set_xticks([x for x, _, _ in some])
            axes.set_xticklabels([label.replace(" + ", " +\n") for _, label, _ in some])
        legend(picture, list(handles.values()))
        return picture

    return Drawing(
        name, title,
        "Mean over abilities, in percent of the whole model's; single sources are the same ones "
        "along a line.",
        f"Lines of {words.listed(list(LINES))} for {words.listed(list(told))}.", draw, tips,
    )  # fmt: skip


def _side_by_side(
    models: Sequence[str], height: float, below: str, title: str, titled: bool
) -> tuple[Any, Any]:
    """Return a figure of what is left, and its empty panels, one a model."""
    picture = new_figure(WIDTH, height + 0.3 * titled)
    panels = picture.subplots(1, len(models), sharey=True, squeeze=False).ravel()
    for axes, model in zip(panels, models, strict=True):
        axes.set_title(model)
        axes.grid()
        axes.tick_params(length=0, labelcolor=MUTED)
        axes.set_xlabel(below)
    panels[0].set_ylabel("abilities left, %")
    put_title(picture, title, titled)
    return picture, panels


def _distance(first: dict[str, ConditionAnalysis]) -> Drawing | None:
    points = {
        model: [
            (one, far) for one in found.ranking
            if one.total.value is not None and (far := one.distance.get("kl", {}).get(TOTAL))
        ]
        for model, found in first.items()
    }  # fmt: skip
    points = {model: told for model, told in points.items() if len(told) > 2}
    if not points:
        return None
    title, tips = "What is left, and how far predictions moved", Tips()

    def draw(titled: bool) -> Any:
        tips.clear()
        picture, panels = _side_by_side(
            list(points), 3.2, "how far its predictions moved", title, titled
        )
        for axes, (model, told) in zip(panels, points.items(), strict=True):
            for one, far in told:
                [dot] = axes.plot([far], [100 * (one.total.value or 0)], marker="o", markersize=6,
                                  color=STRATEGY_COLOURS[one.strategy], linestyle="none",
                                  markeredgewidth=0)  # fmt: skip
                tips.add(dot, f"{model}, {one.calibration}: {words.with_span(one.total)} %")
        return picture

    return Drawing(
        "brief-distance", title,
        "Each dot is a calibration text: how far the pruned model's predictions on held-out text "
        "moved from the whole model's (KL divergence in nats a token), and what is left.",
        f"Dots of calibration sets for {words.listed(list(points))}.", draw, tips,
    )  # fmt: skip
