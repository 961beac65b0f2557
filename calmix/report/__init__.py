"""The report of a study: one HTML page, its figures as files, and a summary in plain words."""

from __future__ import annotations

from pathlib import Path

from calmix.analysis import Analysis
from calmix.analysis.analyse import series_of
from calmix.files import atomic_folder, write_text
from calmix.report.drawing import files
from calmix.report.figures import figures_of, sparsity_figures
from calmix.report.page import FIGURES, page
from calmix.report.summary import Summary, summarise
from calmix.study.results import StudyResults

__all__ = ["Summary", "summarise", "write_report"]


def write_report(results: StudyResults, analysis: Analysis, folder: Path) -> None:
    """Write `report.html`, `summary.txt` and `figures/*.svg|png` into a folder, all or nothing.

    The same results and analysis give the same bytes.
    """
    by_condition = [(found, figures_of(analysis, found)) for found in analysis.conditions]
    series = series_of([(found.cells, found.joint) for found in analysis.conditions])
    across = [drawing for each in series for drawing in sparsity_figures(analysis, each)]
    summary = summarise(analysis)
    text = page(results, analysis, summary, by_condition, across)
    with atomic_folder(folder) as beside:
        write_text(beside / "report.html", text)
        write_text(beside / "summary.txt", summary.text() + "\n")
        (beside / FIGURES).mkdir()
        for drawing in [*(one for _, drawings in by_condition for one in drawings), *across]:
            for name, content in files(drawing).items():
                (beside / FIGURES / name).write_bytes(content)
