"""What a study found: every finished trial with its retention, the same from a live store and
from a folder of exported results. Analysis and report start here and know nothing of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from calmix.capability.records import TaskScores

Scores = tuple[TaskScores, ...]
Strategy = Literal["single", "mix", "self-cal", "sgs", "igsp", "self-written", "none"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Record):
    """A retention (1.0 is all of it) with its 95 % interval over items; None where undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


class TaskOutcome(_Record):
    """One task of one trial, by its primary score (`capability.retention.TaskRetention`).

    `retention` has no value without signal.
    """

    task: str
    dimension: str
    score: str
    items: int
    floor: float | None
    dense: float
    pruned: float
    dense_accuracy: float | None
    pruned_accuracy: float | None
    signal: bool
    retention: Interval


class Trial(_Record):
    """One finished trial: what was asked, and what of the dense model was left.

    Attributes:
        id: hash of the resolved request, the trial's folder in the store.
        calibration: the calibration set's name in the study file.
        strategy: how that set was made.
        mix: its sources with their shares; empty where it was saved, or the model wrote it.
        method: its text, with the options that differ from their defaults.
        pattern: as printed: `60%` or `2:4`.
        sparsity: share of weights pruned.
        seed: of the calibration draw.
        information: metrics of the calibration set under the dense model (`aggregation_4`,
            `perplexity`, ...), token budget included.
        kind: of a single source, what it leans to: `prose`, `code`, `math` or as its entry says.
        halves: tasks that are the other half of a benchmark this set's sources read.
        total, dimensions: retention by the tasks' primary scores; `worst` names the lowest.
        distance: to the dense model (`capability.distance.Distances`), where it was measured.
        seconds: wall time by stage.
    """

    id: str
    model: str
    calibration: str
    strategy: Strategy
    kind: str = ""
    halves: tuple[str, ...] = ()
    mix: dict[str, float] = {}
    method: str
    pattern: str
    sparsity: float
    propagation: str | None
    rows: int
    length: int
    seed: int
    suite: str
    information: dict[str, float]
    total: Interval
    worst: str | None
    dimensions: dict[str, Interval]
    tasks: tuple[TaskOutcome, ...]
    seconds: dict[str, float]
    distance: dict[str, Any] | None = None


class FailedTrial(_Record):
    """A trial that ended in an error, with its line."""

    id: str
    label: str
    error: str


class StudyResults(_Record):
    """All a report needs.

    Attributes:
        name: of the study.
        text: the study file as written.
        planned: number of trials the study asks for.
        environment: machine, versions and dates of the run.
        suite: name, version, hash, and the dimensions' names in order.
        scores, dense: what every trial's model, and the dense models, did on every item: by the
            trial's id, and by the model's label.
    """

    name: str
    text: str
    planned: int
    trials: tuple[Trial, ...]
    failed: tuple[FailedTrial, ...] = ()
    environment: dict[str, Any] = {}
    suite: dict[str, Any] = {}
    scores: Annotated[Mapping[str, Scores], SkipValidation, Field(exclude=True, repr=False)] = {}
    dense: Annotated[Mapping[str, Scores], SkipValidation, Field(exclude=True, repr=False)] = {}
