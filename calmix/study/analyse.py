"""The whole analysis of a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from calmix.evaluation.retention import retention
from calmix.options import Measure, Settings
from calmix.study.bootstrap import Joint, corrected, joints
from calmix.study.cells import Cells, Condition, dimensions_of, left_out, measure_of
from calmix.study.declaration import Declared
from calmix.study.differences import Difference, Gain, compare, gains
from calmix.study.hypotheses import TestedComparison, judge_comparisons
from calmix.study.ranking import Ranked, leaders, rank
from calmix.study.results import StudyResults
from calmix.study.trials import Key

if TYPE_CHECKING:
    from pandas import DataFrame

PER_CONDITION = ("ranking", "differences")


@dataclass(frozen=True)
class ConditionAnalysis:
    """Results for one condition."""

    joint: Joint
    ranking: tuple[Ranked, ...]
    differences: tuple[Difference, ...]

    @property
    def cells(self) -> Cells:
        """The condition's trials as tables."""
        return self.joint.cells

    @property
    def condition(self) -> Condition:
        """The settings that the trials share."""
        return self.joint.cells.condition

    @property
    def missing(self) -> list[tuple[str, int]]:
        """(set, seed) pairs of the condition that have no trial."""
        every = product(self.cells.sets, self.cells.seeds)
        return [pair for pair in every if pair not in self.cells.trials]


@dataclass(frozen=True)
class Analysis:
    """The analysis of a study: what it declared, then all else, which is exploratory.

    Attributes:
        planned, finished, failed: trials of the whole study.
        measure: of all that is exploratory.
        declarations: as in the store, oldest first; the last one is valid.
        comparisons: those declared, by the primary measure.
        afterwards: the same without the tasks that are left out now (`Settings.without`).
        ceilings: what the dense models reach against themselves, in other batches, by label.
        older: compared trials that finished before the declaration.
        missing: compared trials that have not finished, by key.
    """

    study: str
    planned: int
    finished: int
    failed: int
    settings: Settings
    measure: Measure
    declarations: tuple[Declared, ...]
    comparisons: tuple[TestedComparison, ...]
    afterwards: tuple[TestedComparison, ...]
    ceilings: dict[str, float | None]
    older: int
    missing: tuple[Key, ...]
    dimensions: tuple[str, ...]
    conditions: tuple[ConditionAnalysis, ...]
    gains: tuple[Gain, ...]

    @property
    def tests(self) -> int:
        """Number of exploratory tests, which are corrected together."""
        tested: list[Any] = [*self.gains]
        for each in self.conditions:
            tested += each.differences
        return sum(one.p is not None for one in tested)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-serialisable value."""
        heads = (
            "study",
            "planned",
            "finished",
            "failed",
            "measure",
            "ceilings",
            "older",
            "missing",
            "dimensions",
            "tests",
        )
        return {
            "kind": "analysis",
            **{name: getattr(self, name) for name in heads},
            "declarations": [
                one.model_dump(mode="json") | {"intact": one.intact} for one in self.declarations
            ],
            **{
                name: [asdict(one) | {"verdict": one.verdict} for one in getattr(self, name)]
                for name in ("comparisons", "afterwards")
            },
            "settings": self.settings.model_dump(include=set(Settings.model_fields)),
            "conditions": [
                asdict(analysed.condition)
                | {
                    "seeds": analysed.cells.seeds,
                    "missing": analysed.missing,
                    "best": [one.calibration for one in leaders(analysed.ranking)],
                    "tasks": [asdict(task) for task in analysed.cells.tasks],
                }
                | {name: [asdict(one) for one in getattr(analysed, name)] for name in PER_CONDITION}
                for analysed in self.conditions
            ],
            "gains": [asdict(one) for one in self.gains],
        }

    def tables(self) -> dict[str, DataFrame]:
        """Return tables by name with one row per result; nested fields become columns with joined
        names."""
        from pandas import json_normalize

        data, tasks = self.to_dict(), list[dict[str, Any]]()
        for condition in data["conditions"]:
            for one in condition["ranking"]:
                retained = one.pop("tasks")  # they have their own table
                head = {name: one[name] for name in ("condition", "calibration")}
                tasks += [
                    {**head, **task, "kept": retained[task["name"]]} for task in condition["tasks"]
                ]
        each = {
            name: [one for condition in data["conditions"] for one in condition[name]]
            for name in PER_CONDITION
        }
        rows_of = {
            "comparisons": data["comparisons"],
            "gains": data["gains"],
            **each,
            "tasks": tasks,
        }
        return {
            name: json_normalize(rows, sep="_").astype(object) for name, rows in rows_of.items()
        }


def analyse(results: StudyResults, settings: Settings | None = None) -> Analysis:
    """Analyse the finished trials of a study (definitions: docs/studies.md)."""
    settings = settings or Settings()
    every = list(joints(results, settings))
    *differences, between = corrected(
        *(compare(joint, settings.default) for joint in every), gains(every)
    )
    conditions = [
        ConditionAnalysis(joint, tuple(rank(joint)), tuple(pairs))
        for joint, pairs in zip(every, differences, strict=True)
    ]
    known = {trial.key: trial.id for trial in results.trials}
    since = results.declarations[-1].since if results.declarations else ""
    compared = results.declaration.keys
    return Analysis(
        results.name,
        results.planned,
        len(results.trials),
        results.failed,
        settings,
        measure_of(results, settings.measure),
        results.declarations,
        tuple(judge_comparisons(results, settings)),
        tuple(judge_comparisons(results, settings, settings.without) if settings.without else ()),
        dict(_ceilings(results, settings)),
        sum(results.dates.get(known.get(key, ""), since) < since for key in compared),
        tuple(key for key in compared if key not in known),
        dimensions_of(results),
        tuple(conditions),
        tuple(between),
    )


def _ceilings(results: StudyResults, settings: Settings) -> Iterator[tuple[str, float | None]]:
    """Yield label and total of each dense model whose answers were generated twice."""
    out, measure = left_out(results, settings), measure_of(results, settings.measure)
    for label, again in results.repeat.items():
        names = {task.name for task in again} - out
        if names:
            twice = (
                [task for task in tasks if task.name in names]
                for tasks in (results.dense[label], again)
            )
            yield label, retention(*twice, measure=measure, resamples=1).total.value
