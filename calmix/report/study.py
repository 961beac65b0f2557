"""The report of a study: one page, the same in words, and figures."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from calmix.analysis import Analysis
from calmix.analysis.cells import TOTAL
from calmix.files import atomic_folder, write_text
from calmix.options import Settings
from calmix.report import figures, words
from calmix.report.findings import main_condition, summarise, tally
from calmix.report.pages import render
from calmix.study.results import StudyResults

FIGURES = "figures"
ROWS = 8  # of a ranking in the text


def write_report(results: StudyResults, analysis: Analysis, folder: Path) -> None:
    """Write a study's report into a folder, all or nothing: `pages`, and figures as SVG.

    The same results and analysis give the same bytes.
    """
    with atomic_folder(folder) as beside:
        for name, text in pages(results, analysis).items():
            write_text(beside / name, text)
        (beside / FIGURES).mkdir()
        for each in analysis.conditions:
            for chart in figures.condition_charts(analysis, each):
                write_text(beside / FIGURES / f"{chart.name}.svg", chart.file())


def pages(results: StudyResults, analysis: Analysis) -> dict[str, str]:
    """Return a report's texts by file name.

    `report.html` has everything; `summary.txt` is the same in words.
    """
    summary, found = summarise(analysis), analysis.conditions
    settings = analysis.settings.model_dump(include=set(Settings.model_fields))
    return {
        "report.html": render(
            "study.html", results=results, analysis=analysis, summary=summary,
            main=main_condition(found),
            conditions=[(each, told, figures.condition_charts(analysis, each))
                        for each, told in zip(found, summary["conditions"], strict=True)],
            made=yaml.safe_dump({"suite": results.suite, "analysis": settings}, sort_keys=False),
        ),
        "summary.txt": summary_text(analysis) + "\n",
    }  # fmt: skip


def summary_text(analysis: Analysis) -> str:
    """Return the findings as plain text of 80 columns."""
    summary, conditions = summarise(analysis), []
    for each, said in zip(analysis.conditions, summary["conditions"], strict=True):
        rows = [("", "total", "acc.", "shrunken", "best", "worst dimension")]
        rows += [(one.calibration, words.with_span(one.total), words.percent(one.accuracy[TOTAL]),
                  words.percent(one.shrunken.value), words.sure(one.best),
                  f"{words.percent(one.lowest.value)} {words.short(one.worst or '', 16)}".strip())
                 for one in each.ranking[:ROWS]]  # fmt: skip
        more = max(0, len(each.ranking) - ROWS)
        conditions.append((each.condition.label, said, rows, more))
    text = render("summary.txt", summary=summary, conditions=conditions, tally=tally)
    return re.sub(r"\n{3,}", "\n\n", text.strip())
