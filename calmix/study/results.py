"""What a study found: every finished trial with its retention, the same from a live store and
from a folder of exported results. Analysis and report start here and know nothing of the store.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Strategy = Literal["single", "mix", "self-cal", "sgs", "igsp", "none"]  # none: magnitude


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Record):
    """A retention (1.0 is all of it) with its 95 % interval over items; None where undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


class TaskOutcome(_Record):
    """One task of one trial. `retention` is corrected for chance; None without signal."""

    task: str
    dimension: str
    metric: str
    items: int
    chance: float
    dense: float
    pruned: float
    signal: bool
    raw: Interval
    retention: Interval


class Trial(_Record):
    """One finished trial: what was asked, and what of the dense model was left.

    Attributes:
        id: hash of the resolved request, the trial's folder in the store.
        calibration: the calibration set's name in the study file.
        strategy: how that set was made.
        method: `sparsegpt`, `wanda` or `magnitude`.
        pattern: as printed: `60%` or `2:4`.
        sparsity: share of weights pruned.
        seed: of the calibration draw.
        information: metrics of the calibration set under the dense model (`aggregation_4`,
            `perplexity`, ...), token budget included.
        total, dimensions: retention, corrected for chance; `worst` names the lowest dimension.
        seconds: wall time by stage.
    """

    id: str
    model: str
    calibration: str
    strategy: Strategy
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
    """

    name: str
    text: str
    planned: int
    trials: tuple[Trial, ...]
    failed: tuple[FailedTrial, ...] = ()
    environment: dict[str, Any] = {}
    suite: dict[str, Any] = {}
