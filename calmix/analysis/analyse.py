"""The whole analysis of a study, and its files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from calmix.analysis.cells import Cells, Condition, Measure, dimensions_of, select, tables
from calmix.analysis.correlations import (
    Correlation,
    Over,
    TradeOff,
    corrected,
    correlate,
    counted,
    trade_offs,
)
from calmix.analysis.differences import (
    Difference,
    Growth,
    Margin,
    compare,
    corrected_differences,
    margins,
)
from calmix.analysis.estimates import Estimate
from calmix.analysis.ranking import Ranked, rank
from calmix.analysis.spread import Spread, spreads
from calmix.analysis.statistics import PERMUTATIONS, RESAMPLES, least_p
from calmix.errors import InputError, nearest
from calmix.files import atomic_folder, write_json, write_text
from calmix.study.results import StudyResults


@dataclass(frozen=True)
class Settings:
    """How the analysis was made.

    Attributes:
        measure: retention `corrected` for chance, or `raw`.
        over: which calibration sets are points of a correlation.
        default: the set that margins are over; None is the mean of the single sources.
        permutations, resamples, seed: of the sampled p-values and the bootstrap.
    """

    measure: Measure = "corrected"
    over: Over = "single"
    default: str | None = None
    permutations: int = PERMUTATIONS
    resamples: int = RESAMPLES
    seed: int = 0


@dataclass(frozen=True)
class ConditionAnalysis:
    """Everything found under one condition.

    Attributes:
        points: calibration sets that count as points of the correlations.
        least_p: the smallest p that many points can give; None with fewer than four.
        missing: cells (calibration set, seed) without a finished trial, of the sets and seeds
            that the condition has; a study need not ask for all of them.
    """

    condition: Condition
    cells: Cells
    ranking: tuple[Ranked, ...]
    correlations: tuple[Correlation, ...]
    trade_offs: tuple[TradeOff, ...]
    differences: tuple[Difference, ...]
    spreads: tuple[Spread, ...]
    points: int
    least_p: float | None
    missing: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Analysis:
    """What a study shows, and how sure it is.

    Attributes:
        planned, finished, failed: trials of the whole study.
        family: correlations tested together, over which p is corrected.
    """

    study: str
    planned: int
    finished: int
    failed: int
    settings: Settings
    dimensions: tuple[str, ...]
    conditions: tuple[ConditionAnalysis, ...]
    margins: tuple[Margin, ...]
    growths: tuple[Growth, ...]
    family: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-serialisable value."""
        return {
            "kind": "analysis",
            "study": self.study,
            "planned": self.planned,
            "finished": self.finished,
            "failed": self.failed,
            "settings": asdict(self.settings),
            "dimensions": list(self.dimensions),
            "family": self.family,
            "conditions": [
                {
                    **asdict(found.condition),
                    "seeds": list(found.cells.seeds),
                    "points": found.points,
                    "least_p": found.least_p,
                    "missing": [list(cell) for cell in found.missing],
                    "ranking": [asdict(one) for one in found.ranking],
                    "correlations": [asdict(one) for one in found.correlations],
                    "trade_offs": [asdict(one) for one in found.trade_offs],
                    "differences": [asdict(one) for one in found.differences],
                    "spreads": [asdict(one) for one in found.spreads],
                }
                for found in self.conditions
            ],
            "margins": [asdict(one) for one in self.margins],
            "growths": [asdict(one) for one in self.growths],
        }

    def tables(self) -> dict[str, str]:
        """Return the CSV files by name."""

        def every(name: str) -> list[Any]:
            return [one for found in self.conditions for one in getattr(found, name)]

        return {
            "ranking.csv": _ranking_csv(every("ranking"), self.dimensions),
            "correlations.csv": _csv(Correlation, every("correlations")),
            "trade_offs.csv": _csv(TradeOff, every("trade_offs")),
            "differences.csv": _csv(Difference, every("differences")),
            "spread.csv": _csv(Spread, every("spreads")),
            "margins.csv": _csv(Margin, self.margins),
            "margin_growth.csv": _csv(Growth, self.growths),
        }

    def save(self, folder: Path) -> None:
        """Write `analysis.json` and the CSV files into a folder, all or nothing."""
        with atomic_folder(folder) as beside:
            write_json(beside / "analysis.json", self.to_dict())
            for name, text in self.tables().items():
                write_text(beside / name, text)


def analyse(
    results: StudyResults,
    settings: Settings | None = None,
    *,
    method: str | None = None,
    sparsity: str | None = None,
) -> Analysis:
    """Analyse the finished trials of a study (definitions: docs/analysis.md).

    Args:
        method, sparsity: consider only these; p-values are corrected over what is considered.

    Raises:
        InputError: nothing has finished, or a method, sparsity or default it does not have.
        MissingExtraError: scipy is not installed.
    """
    asked = settings or Settings()
    _check(asked)
    trials = select(results, method=method, sparsity=sparsity)
    if asked.default is not None:
        known = {trial.calibration for trial in trials}
        if asked.default not in known:
            raise InputError(
                f"no finished trial has the calibration set '{asked.default}': "
                f"{nearest(asked.default, known)}"
            )
    made = tables(results, trials, asked.measure)
    raw = [
        correlate(cells, asked.over, permutations=asked.permutations,
                  resamples=asked.resamples, seed=asked.seed)
        for cells in made
    ]  # fmt: skip
    family = corrected([one for found in raw for one in found])
    gaps = corrected_differences([one for cells in made for one in compare(cells)])
    dimensions = dimensions_of(results)
    conditions = []
    for cells in made:
        label = cells.condition.label
        own = [one for one in family if one.condition == label]
        points = len(counted(cells, asked.over))
        conditions.append(
            ConditionAnalysis(
                cells.condition,
                cells,
                tuple(rank(cells)),
                tuple(own),
                tuple(trade_offs(own, dimensions)),
                tuple(one for one in gaps if one.condition == label),
                tuple(
                    one
                    for over in get_args(Over)
                    for one in spreads(cells, over, permutations=asked.resamples, seed=asked.seed)
                ),
                points,
                least_p(points, asked.permutations) if own else None,
                _missing(cells),
            )
        )
    found, grown = [], []
    for series in series_of(made):
        own_margins, own_growths = margins(series, asked.default)
        found += own_margins
        grown += own_growths
    return Analysis(
        results.name, results.planned, len(results.trials), len(results.failed), asked, dimensions,
        tuple(conditions), tuple(found), tuple(grown),
        sum(one.p is not None for one in family),
    )  # fmt: skip


def _check(settings: Settings) -> None:
    if settings.measure not in get_args(Measure):
        raise InputError(f"the measure is corrected or raw, not '{settings.measure}'")
    if settings.over not in get_args(Over):
        raise InputError(f"correlations are over single or all, not '{settings.over}'")
    if settings.permutations < 1 or settings.resamples < 1:
        raise InputError(
            "permutations and resamples must be at least 1, not "
            f"{settings.permutations} and {settings.resamples}"
        )
    if settings.seed < 0:
        raise InputError(f"the seed must not be negative, but is {settings.seed}")


def series_of(made: Sequence[Cells]) -> list[list[Cells]]:
    """Return the conditions that differ in sparsity alone together, lowest sparsity first."""
    groups: dict[tuple[Any, ...], list[Cells]] = {}
    for cells in made:
        at = cells.condition
        if at.unstructured and at.method != "magnitude":
            key = at.model, at.method, at.propagation, at.rows, at.length, at.suite
            groups.setdefault(key, []).append(cells)
    return [sorted(group, key=lambda cells: cells.condition.sparsity) for group in groups.values()]


def _missing(cells: Cells) -> tuple[tuple[str, int], ...]:
    return tuple(
        (name, seed)
        for at, name in enumerate(cells.sets)
        for number, seed in enumerate(cells.seeds)
        if (cells.values[at, number] != cells.values[at, number]).all()
    )


def _csv(kind: type, rows: Sequence[Any]) -> str:
    return _table([field.name for field in fields(kind)], [asdict(row) for row in rows])


def _table(header: list[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_cell(row[name]) for name in header])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return " ".join(str(part) for part in value)
    return repr(value) if isinstance(value, float) else str(value)


def _ranking_csv(ranking: Sequence[Ranked], dimensions: Sequence[str]) -> str:
    ends = [field.name for field in fields(Estimate)]
    parts = ["total", "lowest", *dimensions]
    rows = []
    for one in ranking:
        row: dict[str, Any] = {
            "condition": one.condition,
            "calibration": one.calibration,
            "strategy": one.strategy,
            "rank": one.rank,
            "rank_worst": one.rank_worst,
            "worst": one.worst,
        }
        estimates = {"total": one.total, "lowest": one.lowest, **one.dimensions}
        for part in parts:
            for end in ends:
                row[f"{part}_{end}"] = getattr(estimates[part], end)
        rows.append(row)
    header = ["condition", "calibration", "strategy", "rank", "rank_worst", "worst"]
    return _table(header + [f"{part}_{end}" for part in parts for end in ends], rows)
