"""The report of a study: one HTML page, its figures as files, and a summary in plain words."""

from __future__ import annotations

from pathlib import Path

from calmix.analysis import Analysis, ConditionAnalysis
from calmix.analysis.analyse import series_of
from calmix.files import atomic_folder, write_text
from calmix.report.brief import brief, brief_figures
from calmix.report.drawing import Drawing, files
from calmix.report.figures import figures_of, sparsity_figures
from calmix.report.page import FIGURES, page
from calmix.report.summary import Summary, summarise
from calmix.study.results import StudyResults

__all__ = ["Summary", "pages", "summarise", "write_report"]


def write_report(results: StudyResults, analysis: Analysis, folder: Path) -> None:
    """Write a study's report into a folder, all or nothing: `pages`, and figures as SVG and PNG.

    The same results and analysis give the same bytes.
    """
    texts = pages(results, analysis)
    by_condition, across = _drawings(analysis)
    with atomic_folder(folder) as beside:
        for name, text in texts.items():
            write_text(beside / name, text)
        (beside / FIGURES).mkdir()
        own = [one for _, drawings in by_condition for one in drawings]
        for drawing in [*brief_figures(analysis), *own, *across]:
            for name, content in files(drawing).items():
                (beside / FIGURES / name).write_bytes(content)


def pages(results: StudyResults, analysis: Analysis) -> dict[str, str]:
    """Return a report's texts by file name.

    `report.html` has everything and `brief.html` a page of it; `summary.txt` is the same in words.
    """
    summary = summarise(analysis)
    return {
        "report.html": page(results, analysis, summary, *_drawings(analysis)),
        "brief.html": brief(results, analysis, summary),
        "summary.txt": summary.text() + "\n",
    }


def _drawings(
    analysis: Analysis,
) -> tuple[list[tuple[ConditionAnalysis, list[Drawing]]], list[Drawing]]:
    """Return the figures of every condition, and those across them."""
    by_condition = [(found, figures_of(analysis, found)) for found in analysis.conditions]
    series = series_of([found.joint for found in analysis.conditions])
    pairs = [[(found.cells, found) for found in each] for each in series]
    return by_condition, [one for each in pairs for one in sparsity_figures(analysis, each)]
