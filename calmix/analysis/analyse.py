"""The whole analysis of a study, and its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmix.analysis.bootstrap import Joint, joints
from calmix.analysis.cells import Cells, Condition, dimensions_of, select
from calmix.analysis.correlations import Correlation, Spread, agreements, correlate, spreads
from calmix.analysis.differences import Difference, Gain, compare, gains
from calmix.analysis.power import Noise, noise_of
from calmix.analysis.ranking import Ranked, leaders, rank
from calmix.errors import InputError, nearest
from calmix.files import atomic_folder, write_json, write_text
from calmix.options import Settings
from calmix.study.results import StudyResults

if TYPE_CHECKING:
    from pandas import DataFrame

FOUND = ("ranking", "correlations", "agreements", "differences", "spread", "noise")


@dataclass(frozen=True)
class ConditionAnalysis:
    """Everything found under one condition."""

    joint: Joint
    ranking: tuple[Ranked, ...]
    correlations: tuple[Correlation, ...]
    agreements: tuple[Correlation, ...]  # of KL to the dense model
    differences: tuple[Difference, ...]
    spread: tuple[Spread, ...]
    noise: tuple[Noise, ...]

    @property
    def cells(self) -> Cells:
        """The trials."""
        return self.joint.cells

    @property
    def condition(self) -> Condition:
        """What the trials share."""
        return self.joint.cells.condition

    @property
    def points(self) -> int:
        """Calibration sets that count in correlations."""
        return len(self.cells.of("single"))

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Sets and seeds of the condition without a trial."""
        every = product(self.cells.sets, self.cells.seeds)
        return [one for one in every if one not in self.cells.trials]


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
    gains: tuple[Gain, ...]

    @property
    def tests(self) -> int:
        """Correlations corrected together."""
        return sum(one.p is not None for found in self.conditions for one in found.correlations)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-serialisable value."""
        heads = ("study", "planned", "finished", "failed", "dimensions", "tests")
        return {
            "kind": "analysis",
            **{name: getattr(self, name) for name in heads},
            "settings": self.settings.model_dump(include=set(Settings.model_fields)),
            "conditions": [
                asdict(found.condition)
                | {"seeds": found.cells.seeds, "points": found.points, "missing": found.missing,
                   "best": [one.calibration for one in leaders(found.ranking)],
                   "tasks": [asdict(task) for task in found.cells.tasks]}
                | {name: [asdict(one) for one in getattr(found, name)] for name in FOUND}
                for found in self.conditions
            ],
            "gains": [asdict(one) for one in self.gains],
        }  # fmt: skip

    def tables(self) -> dict[str, DataFrame]:
        """Return the tables by name, one row for each result; parts are columns with joined
        names."""
        from pandas import json_normalize

        told = self.to_dict()
        made = {"gains": told["gains"], **{name: [] for name in FOUND if name != "agreements"}}
        made["tasks"] = []
        for found in told["conditions"]:
            for one in found["ranking"]:
                kept = one.pop("tasks")  # in a table of their own
                head = {name: one[name] for name in ("condition", "calibration")}
                made["tasks"] += [{**head, **task, "kept": kept[task["name"]]}
                                  for task in found["tasks"]]  # fmt: skip
            for name in made.keys() & set(FOUND):
                made[name] += found[name]
        return {name: json_normalize(rows, sep="_").astype(object) for name, rows in made.items()}

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
    made = joints(results, trials, asked)
    correlations = correlate([found.cells for found in made], asked)
    differences = compare(made, asked.default)
    conditions = [
        ConditionAnalysis(
            found, tuple(rank(found)),
            tuple(one for one in correlations if one.condition == found.cells.condition.label),
            tuple(agreements(found.cells, asked)),
            tuple(one for one in differences if one.condition == found.cells.condition.label),
            tuple(spreads(found.cells, asked)), tuple(noise_of(found)),
        )
        for found in made
    ]  # fmt: skip
    return Analysis(
        results.name, results.planned, len(results.trials), len(results.failed), asked,
        dimensions_of(results), tuple(conditions), tuple(gains(made, asked.default)),
    )  # fmt: skip
