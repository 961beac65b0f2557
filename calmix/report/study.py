"""The report of a study: one page, the same in words, and figures."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from calmix.analysis import Analysis
from calmix.analysis.cells import TOTAL
from calmix.analysis.ranking import Ranked, leaders
from calmix.files import atomic_folder, write_text
from calmix.options import Settings
from calmix.report import figures, words
from calmix.report.findings import MARKS, main_condition, summarise, tally
from calmix.report.pages import render
from calmix.study.results import StudyResults

FIGURES = "figures"
ROWS = 8  # of a ranking in the text
MANY = 4  # conditions: of more, a terminal shows each one's best set and the claims' tallies


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
    main, seeds = main_condition(found), max(len(each.cells.seeds) for each in found)
    facts = [
        *dict.fromkeys(each.condition.model for each in found),
        words.counted(len({one.calibration for one in results.trials}), "calibration set"),
        words.counted(len(found), "condition"),
        ("up to " if seeds > 1 else "") + words.counted(seeds, "seed"),
        " version ".join(str(results.suite[key]) for key in ("name", "version")
                         if key in results.suite),
        words.MEASURES[analysis.settings.measure],
        f"{analysis.finished} of {words.counted(analysis.planned, 'trial')} finished",
    ]  # fmt: skip
    settings = analysis.settings.model_dump(include=set(Settings.model_fields))
    environment = results.environment | {"suite": results.suite, "analysis": settings}
    return {
        "report.html": render(
            "study.html", results=results, analysis=analysis, summary=summary, marks=MARKS,
            waiting=max(0, analysis.planned - analysis.finished - analysis.failed),
            main=main, best=leaders(main.ranking), facts=facts,
            conditions=[(each, told, figures.condition_charts(analysis, each))
                        for each, told in zip(found, summary["conditions"], strict=True)],
            slug=figures.slug, figures=FIGURES,
            environment=yaml.safe_dump(environment, sort_keys=False, allow_unicode=True),
        ),
        "summary.txt": summary_text(analysis) + "\n",
    }  # fmt: skip


def summary_text(analysis: Analysis, *, short: bool = False) -> str:
    """Return the findings as plain text of 80 columns; of many conditions `short` says of each its
    best set alone."""
    summary, conditions = summarise(analysis), []
    best: list[tuple[str, ...]] = [("", "set", "total", "tied with", "worst dimension")]
    for each, told in zip(analysis.conditions, summary["conditions"], strict=True):
        rows = [("", "total", "acc.", "shrunken", "best", "worst dimension")]
        rows += [(one.calibration, words.with_span(one.total), words.percent(one.accuracy[TOTAL]),
                  words.percent(one.shrunken.value), words.sure(one.best), _worst(one, 16))
                 for one in each.ranking[:ROWS]]  # fmt: skip
        conditions.append((told, rows, max(0, len(each.ranking) - ROWS)))
        first, *ties = leaders(each.ranking) or each.ranking[:1]
        tied = words.short(ties[0].calibration, 12) if len(ties) == 1 else f"{len(ties)} sets"
        best.append((each.condition.label, words.short(first.calibration, 18),
                     words.with_span(first.total), tied if ties else "",
                     _worst(first, 12)))  # fmt: skip
    text = render("summary.txt", summary=summary, brief=short and len(conditions) > MANY,
                  best=best, conditions=conditions, tally=tally)  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text.strip())


def _worst(one: Ranked, width: int) -> str:
    return f"{words.percent(one.lowest.value)} {words.short(one.worst or '', width)}".strip()
