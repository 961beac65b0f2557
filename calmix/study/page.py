"""The report of a study: an HTML page, a summary in plain text, and the analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from calmix import words
from calmix.files import atomic_folder, write_json, write_text
from calmix.options import Settings
from calmix.pages import Bar, Figure, render
from calmix.study.analyse import Analysis, ConditionAnalysis
from calmix.study.cells import TOTAL, WORST
from calmix.study.findings import main_condition, summarise
from calmix.study.results import StudyResults

RANKED_ROWS = 8  # of a ranking in the summary
STRATEGIES = {  # of making a calibration set; `--s-` before a key is a colour of the pages
    "single": "single source",
    "mix": "mix",
    "self-cal": "Self-Cal",
    "sgs": "SGS",
    "igsp": "IGSP",
    "self-written": "self-written",
    "none": "no calibration",
}


def write_report(results: StudyResults, analysis: Analysis, folder: Path) -> None:
    """Write a study's report to a folder, all or nothing: `pages`, and the analysis as tables.

    The same results and analysis give the same bytes.
    """
    with atomic_folder(folder) as beside:
        for name, text in pages(results, analysis).items():
            write_text(beside / name, text)
        write_json(beside / "analysis.json", analysis.to_dict())
        for name, table in analysis.tables().items():
            if len(table):
                write_text(beside / f"{name}.csv", table.to_csv(index=False))


def pages(results: StudyResults, analysis: Analysis) -> dict[str, str]:
    """Return the report's texts by file name: the page, and a summary in plain text."""
    summary, conditions = summarise(analysis), analysis.conditions
    settings = analysis.settings.model_dump(include=set(Settings.model_fields))
    return {
        "report.html": render(
            "study.html",
            results=results,
            analysis=analysis,
            summary=summary,
            main=main_condition(conditions),
            conditions=[
                (each, sentences, ranking_figure(each), _tables(analysis, each))
                for each, sentences in zip(conditions, summary["conditions"], strict=True)
            ],
            made=yaml.safe_dump({"suite": results.suite, "analysis": settings}, sort_keys=False),
        ),
        "summary.txt": summary_text(analysis) + "\n",
    }


def ranking_figure(analysed: ConditionAnalysis) -> Figure:
    """Return the figure of one condition: the total of every calibration set."""
    ranked = [one for one in analysed.ranking if one.total.value is not None]
    strategies = {one.strategy for one in ranked}
    over = "test items and seeds" if analysed.joint.freedom else "test items alone (one seed each)"
    return Figure(
        f"Ranking by total, {analysed.condition.label}",
        f"Total retention, with 95 % intervals over {over}; notches: expected total of a set "
        "chosen for its rank (shrunken).",
        [
            Bar(one.calibration, one.total, f"s-{one.strategy}", one.shrunken.value)
            for one in ranked
        ],
        {name: f"s-{key}" for key, name in STRATEGIES.items() if key in strategies},
    )


def _tables(analysis: Analysis, analysed: ConditionAnalysis) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of one condition: ranking, distance to the dense model, differences."""
    w, names = words, analysis.dimensions
    ranking = [
        {
            "calibration set": one.calibration,
            "made": STRATEGIES[one.strategy],
            "#seeds": one.total.draws,
            "#total %": w.with_span(one.total),
            "#accuracy %": w.percent(one.accuracy[TOTAL]),
            "#shrunken %": w.percent(one.shrunken.value),
            "#best": w.sure(one.best),
            "#behind the first": w.with_span(one.behind, sign=True),
            "worst": one.worst or "–",
            "#worst %": w.with_span(one.lowest),
        }
        | {f"#{name} %": w.with_span(one.dimensions[name]) for name in names}
        | {f"#{name}, accuracy %": w.percent(one.accuracy[name]) for name in names}
        for one in analysed.ranking
    ]
    distance = [
        {
            "calibration set": one.calibration,
            "#total %": w.percent(one.total.value),
            "#KL": w.number(one.distance["kl"][TOTAL]),
            "#top-1 %": w.percent(one.distance["top1"][TOTAL]),
            "#flips %": w.percent(one.distance["flips"][TOTAL]),
        }
        | {f"#KL, {name}": w.number(one.distance["kl"][name]) for name in names}
        for one in analysed.ranking
        if any(each.distance["kl"][TOTAL] is not None for each in analysed.ranking)
    ]
    differences = [
        {
            "set": one.left,
            "over": one.right,
            "in": one.quantity,
            "#points": w.with_span(one.gap, sign=True),
            "#p": w.p_value(one.gap.p),
            "#corrected p": w.p_value(one.p_corrected) + " ●" * one.significant,
            "over seeds alone": w.span(one.gap.draw_low, one.gap.draw_high),
        }
        for one in analysed.differences
        if one.quantity in (TOTAL, WORST)
    ]
    return {"ranking": ranking, "distance": distance, "differences": differences}


def summary_text(analysis: Analysis) -> str:
    """Return the findings as plain text of 80 columns."""
    summary = summarise(analysis)
    text = "\n".join(map(words.wrapped, summary["opening"]))
    text += _block("Declared comparisons", summary["declared"])
    text += f"\n\n{words.wrapped(summary['exploratory'])}\n\n{words.wrapped(summary['headline'])}"
    for each, sentences in zip(analysis.conditions, summary["conditions"], strict=True):
        rows = [("", "total", "acc.", "shrunken", "best", "worst dimension")]
        rows += [
            (
                one.calibration,
                words.with_span(one.total),
                words.percent(one.accuracy[TOTAL]),
                words.percent(one.shrunken.value),
                words.sure(one.best),
                f"{words.percent(one.lowest.value)} {words.short(one.worst or '', 16)}".strip(),
            )
            for one in each.ranking[:RANKED_ROWS]
        ]
        label = each.condition.label
        text += f"\n\n{label}: retention in % (acc.: of accuracy)\n{words.columns(rows)}"
        if more := each.ranking[RANKED_ROWS:]:
            text += f"\n  and {len(more)} more"
        text += _block(f"{label}: findings", sentences)
    text += _block("Method by method", summary["methods"])
    return text + _block("How certain this is", summary["certainty"])


def _block(head: str, lines: Sequence[str]) -> str:
    shown = [words.wrapped(line, "  - ", "    ") for line in lines]
    return "\n".join([f"\n\n{head}", *shown]) if shown else ""
