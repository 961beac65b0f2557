"""The records of a study; keys of other versions are left out as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SkipValidation

from calmix.evaluation.measures import TaskScores
from calmix.evaluation.retention import Estimate

Scores = Annotated[
    Mapping[str, tuple[TaskScores, ...]], SkipValidation, Field(exclude=True, repr=False)
]
Strategy = Literal["single", "mix", "self-cal", "sgs", "igsp", "self-written", "none"]


class Trial(BaseModel, frozen=True):
    """A finished trial: what was asked for, and what the pruned model retains.

    Attributes:
        id: hash of the resolved request, the trial's folder in the store.
        calibration: the calibration set's name in the study file; `strategy`, how it was made.
        mix: sources with their shares; empty for a saved set, and text the model wrote.
        method: with the options that differ from their defaults, allocation and recovery.
        pattern: as printed: `60%` or `2:4`; `sparsity`, the share of weights pruned.
        seed: of the calibration draw.
        information: metrics of the calibration set under the dense model.
        worst: the dimension with the lowest retention.
        tasks: what is kept of each by its primary score; no value without signal.
        seconds: wall time by stage.
        distance: to the dense model (`evaluation.distance.distance`), where it was measured.
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
    information: dict[str, float]
    total: Estimate
    worst: str | None
    dimensions: dict[str, Estimate]
    tasks: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    distance: dict[str, Any] | None = None

    @property
    def told(self) -> str:
        """Total and worst retention, and the time, in a few words."""
        found = "no retention"
        if self.total.value is not None:
            found = f"total {100 * self.total.value:.1f} %"
        if self.worst is not None:
            least = self.dimensions[self.worst].value or 0
            found += f", worst {self.worst} {100 * least:.1f} %"
        return f"{found}, {self.seconds.get('total', 0):.0f} s"


class FailedTrial(BaseModel, frozen=True):
    """A trial that ended in an error; its file names neither."""

    id: str = ""
    label: str = ""
    error: str


class StudyResults(BaseModel, frozen=True):
    """All that analysis and report need.

    Attributes:
        text: the study file as written.
        planned: number of trials the study asks for.
        suite: name, version, hash, and the dimensions' names in order.
        scores, dense: items of every trial by its id, and of the dense models by label; `paired`
            are of the dense model as each trial was compared with it.
    """

    name: str
    text: str
    planned: int
    trials: tuple[Trial, ...]
    failed: tuple[FailedTrial, ...] = ()
    suite: dict[str, Any] = {}
    scores: Scores = {}
    dense: Scores = {}
    paired: Scores = {}
