"""The whole analysis of a study, and its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix.analysis.bootstrap import Joint, joints
from calmix.analysis.cells import (
    Cells,
    Condition,
    dimensions_of,
    select,
    tables,
)
from calmix.analysis.correlations import (
    Among,
    Correlation,
    Spread,
    TradeOff,
    agreements,
    correlate,
    points,
    spreads,
    trade_offs,
)
from calmix.analysis.differences import Difference, Growth, Margin, compare, correct, margins
from calmix.analysis.gains import Gain, Shift, gains
from calmix.analysis.power import Noise, noise_of
from calmix.analysis.ranking import Ranked, leaders, rank
from calmix.analysis.statistics import corrected, least_p
from calmix.errors import InputError, nearest
from calmix.files import atomic_folder, write_json, write_text
from calmix.options import Settings
from calmix.study.results import StudyResults

if TYPE_CHECKING:
    from pandas import DataFrame

# The rows of a condition and those across conditions, with the tables they are written as.
OF_CONDITION = {name: name for name in ("correlations", "trade_offs", "differences", "noise")}
OF_CONDITION |= {"spreads": "spread"}
ACROSS = {"margins": "margins", "growths": "margin_growth", "gains": "gains",
          "shifts": "margin_shift"}  # fmt: skip


@dataclass(frozen=True)
class ConditionAnalysis:
    """Everything found under one condition."""

    joint: Joint
    ranking: tuple[Ranked, ...]
    correlations: tuple[Correlation, ...]
    trade_offs: tuple[TradeOff, ...]
    differences: tuple[Difference, ...]
    spreads: tuple[Spread, ...]
    noise: tuple[Noise, ...]
    agreements: tuple[Correlation, ...]  # of KL to the dense model
    points: int  # calibration sets that count in correlations
    least_p: dict[Among, float]  # that so many points can give; empty with fewer than four
    missing: tuple[tuple[str, int], ...]  # sets and seeds of the condition without a trial

    @property
    def cells(self) -> Cells:
        """The trials."""
        return self.joint.cells

    @property
    def condition(self) -> Condition:
        """What the trials share."""
        return self.joint.cells.condition


@dataclass(frozen=True)
class Analysis:
    """What a study shows, and how sure it is."""

    study: str
    planned: int  # trials of the whole study
    finished: int
    failed: int
    settings: Settings
    dimensions: tuple[str, ...]
    conditions: tuple[ConditionAnalysis, ...]
    margins: tuple[Margin, ...]
    growths: tuple[Growth, ...]
    gains: tuple[Gain, ...]
    shifts: tuple[Shift, ...]
    families: dict[str, int]  # correlations corrected together, by `among`

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-serialisable value."""
        heads = ("study", "planned", "finished", "failed", "dimensions", "families")
        return {
            "kind": "analysis",
            **{name: getattr(self, name) for name in heads},
            "settings": {name: getattr(self.settings, name) for name in Settings.model_fields},
            "conditions": [
                {
                    **asdict(found.condition),
                    "seeds": found.cells.seeds,
                    **{name: getattr(found, name) for name in ("points", "least_p", "missing")},
                    "best": [one.calibration for one in leaders(found.ranking)],
                    **{name: _rows(getattr(found, name))
                       for name in ("ranking", *OF_CONDITION, "agreements")},
                    "tasks": _rows(found.cells.tasks),
                }
                for found in self.conditions
            ],
            **{name: _rows(getattr(self, name)) for name in ACROSS},
        }  # fmt: skip

    def tables(self) -> dict[str, DataFrame]:
        """Return the tables by name, one row for each result."""
        every = [(found, one) for found in self.conditions for one in found.ranking]
        apart = ("tasks", "without_own")  # in a table of their own
        ranking = [{k: v for k, v in asdict(one).items() if k not in apart} for _, one in every]
        return {
            "ranking": _frame(ranking),
            "tasks": _frame([row for found, one in every for row in _of_tasks(found, one)]),
            **{
                table: _frame(
                    [row for found in self.conditions for row in _rows(getattr(found, name))]
                )
                for name, table in OF_CONDITION.items()
            },
            **{table: _frame(_rows(getattr(self, name))) for name, table in ACROSS.items()},
        }

    def save(self, folder: Path) -> None:
        """Write `analysis.json` and the tables as CSV into a folder, all or nothing."""
        with atomic_folder(folder) as beside:
            write_json(beside / "analysis.json", self.to_dict())
            for name, table in self.tables().items():
                if len(table):
                    write_text(beside / f"{name}.csv", table.to_csv(index=False))


def analyse(
    results: StudyResults,
    settings: Settings | None = None,
    *,
    method: str | None = None,
    sparsity: str | None = None,
) -> Analysis:
    """Analyse the finished trials of a study (definitions: docs/studies.md)."""
    asked = settings or Settings()
    trials = select(results, method=method, sparsity=sparsity)
    known = {trial.calibration for trial in trials}
    if asked.default is not None and asked.default not in known:
        raise InputError(
            f"no finished trial has the calibration set '{asked.default}': "
            f"{nearest(asked.default, known)}"
        )
    made = joints(results, tables(results, trials, asked.measure), asked.resamples, asked.seed)
    correlations = corrected(
        [one for found in made for one in correlate(found.cells, asked)],
        lambda one: one.among,
        p_corrected=lambda one: one.p,
    )
    differences = correct([one for found in made for one in compare(found)])
    dimensions = dimensions_of(results)
    conditions = []
    for found in made:
        cells, label = found.cells, found.cells.condition.label
        own = tuple(one for one in correlations if one.condition == label)
        groups = points(cells)
        conditions.append(
            ConditionAnalysis(
                found,
                tuple(rank(found)),
                own,
                tuple(trade_offs(own, dimensions)),
                tuple(one for one in differences if one.condition == label),
                tuple(spreads(cells, asked)),
                tuple(noise_of(found)),
                tuple(agreements(cells, asked)),
                len(cells.of("single")),
                {among: least_p([len(group) for group in groups[among]], asked.permutations)
                 for among in dict.fromkeys(one.among for one in own)},
                tuple((name, seed) for at, name in enumerate(cells.sets)
                      for number, seed in enumerate(cells.seeds)
                      if (at, number) not in cells.trials),
            )
        )  # fmt: skip
    series = [margins(group, asked.default) for group in series_of(made)]
    kept, moved = gains(made, asked.default)
    families: dict[str, int] = {}
    for one in correlations:
        families[one.among] = families.get(one.among, 0) + (one.p is not None)
    return Analysis(
        results.name, results.planned, len(results.trials), len(results.failed), asked, dimensions,
        tuple(conditions), tuple(one for leads, _ in series for one in leads),
        tuple(one for _, grown in series for one in grown), tuple(kept), tuple(moved), families,
    )  # fmt: skip


def series_of(made: Sequence[Joint]) -> list[list[Joint]]:
    """Group conditions that differ in sparsity alone, lowest first; N:M patterns, which are no
    points on that axis, stand one by one."""
    groups: dict[tuple[str, str], list[Joint]] = {}
    for found in made:
        at = found.cells.condition
        if at.rows:
            key = at.series, "" if at.unstructured else at.pattern
            groups.setdefault(key, []).append(found)
    return list(groups.values())


def _of_tasks(found: ConditionAnalysis, one: Ranked) -> Iterator[dict[str, Any]]:
    """Yield a row for each task of a set, and for the total and dimensions without its own
    benchmark."""
    head = {"condition": one.condition, "calibration": one.calibration}
    for task in found.cells.tasks:
        own = {"own_benchmark": task.name in one.halves, "kept": asdict(one.tasks[task.name])}
        yield head | asdict(task) | own
    for name, kept in one.without_own.items():
        yield head | {"name": f"{name} without its own benchmark", "kept": asdict(kept)}


def _rows(found: Sequence[Any]) -> list[dict[str, Any]]:
    """Return rows as mappings, with the ratio of signal to noise."""
    return [asdict(one) | ({"ratio": one.ratio} if isinstance(one, Noise) else {}) for one in found]


def _frame(rows: Sequence[dict[str, Any]]) -> DataFrame:
    """Return rows as a table, their parts as columns with joined names."""
    from pandas import json_normalize

    return json_normalize(list(rows), sep="_").astype(object)
