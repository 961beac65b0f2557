"""The records of a study; unknown keys of other versions are ignored when read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, SkipValidation

from calmix.evaluation.measures import TaskScores
from calmix.evaluation.retention import Estimate
from calmix.options import Strategy
from calmix.study.declaration import Declaration, Declared

Scores = Annotated[
    Mapping[str, tuple[TaskScores, ...]], SkipValidation, Field(exclude=True, repr=False)
]


class Trial(BaseModel, frozen=True):
    """A finished trial: its settings, and the retention of the pruned model.

    Attributes:
        id: hash of the resolved request; names the trial's folder in the store.
        calibration: name of the calibration set in the study file; `strategy` is how it was made.
        mix: sources with their weights; empty for saved and self-written sets.
        method: including non-default options and recovery.
        pattern: as printed, `60%` or `2:4`; `sparsity` is the fraction of weights pruned.
        seed: of the calibration set.
        worst: the dimension with the lowest retention.
        tasks: retention of each task by its primary score; no value without signal.
        seconds: wall time by stage.
        distance: to the dense model (`evaluation.distance.distance`), if measured.
    """

    id: str
    model: str
    calibration: str
    strategy: Strategy
    mix: dict[str, float] = {}
    method: str
    pattern: str
    sparsity: float
    propagation: str | None
    rows: int
    length: int
    seed: int
    suite: str
    total: Estimate
    worst: str | None
    dimensions: dict[str, Estimate]
    tasks: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    distance: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the trial within its study (`Planned.key`)."""
        sizes = self.rows, self.length, self.seed, self.propagation
        return self.model, self.calibration, self.method, self.pattern, *sizes

    @property
    def summary(self) -> str:
        """Summary: total and worst retention, and time."""
        summary = "no retention"
        if self.total.value is not None:
            summary = f"total {100 * self.total.value:.1f} %"
        if self.worst is not None:
            least = self.dimensions[self.worst].value or 0
            summary += f", worst {self.worst} {100 * least:.1f} %"
        return f"{summary}, {self.seconds.get('total', 0):.0f} s"


class StudyResults(BaseModel, frozen=True):
    """Everything that analysis and report need.

    Attributes:
        text: the study file as written.
        planned: number of trials in the study; `failed` of them ended in an error.
        suite: name, version, hash, and the names of the dimensions in order.
        scores: item-level scores of every trial, by id.
        dense: those of the dense models, by label.
        repeat: their answers generated again in other batches, by label; empty if they were not.
        paired: those of the dense model that each trial was compared with, by the trial's id.
        dates: when each trial finished (UTC, ISO 8601), by the trial's id.
        declarations: what was declared before the trials, oldest first; the last one is valid.
    """

    name: str
    text: str
    planned: int
    trials: tuple[Trial, ...]
    failed: int = 0
    suite: dict[str, Any] = {}
    scores: Scores = {}
    dense: Scores = {}
    repeat: Scores = {}
    paired: Scores = {}
    dates: Mapping[str, str] = {}
    declarations: tuple[Declared, ...] = ()

    @property
    def declaration(self) -> Declaration:
        """What the study declares: nothing if its store is of an older version."""
        return self.declarations[-1].declaration if self.declarations else Declaration()
