"""The whole analysis of a study, and its files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from calmix.analysis.bootstrap import Joint, joints
from calmix.analysis.cells import Cells, Condition, dimensions_of, select, tables
from calmix.analysis.correlations import (
    Among,
    Correlation,
    Over,
    TradeOff,
    corrected,
    correlate,
    counted,
    strata_of,
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
from calmix.analysis.distances import Agreement, agreements
from calmix.analysis.gains import Gain, Shift, gains
from calmix.analysis.noise import Noise, noise_of
from calmix.analysis.ranking import Ranked, leaders, rank
from calmix.analysis.spread import Spread, spreads
from calmix.analysis.statistics import PERMUTATIONS, RESAMPLES, least_p
from calmix.errors import InputError, nearest
from calmix.evaluation.measures import Measure, check_measure
from calmix.files import atomic_folder, write_json, write_text
from calmix.study.results import StudyResults


@dataclass(frozen=True)
class Settings:
    """How the analysis was made.

    Attributes:
        measure: what retention is of (`capability.measures`).
        over: which calibration sets are points of a correlation.
        default: the set that margins are over; None is the mean of the single sources.
        permutations, resamples, seed: of the sampled p-values and the bootstrap.
    """

    measure: Measure = "primary"
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
        least_p: the smallest p that so many points can give, by what they are among; empty with
            fewer than four.
        missing: cells (calibration set, seed) without a finished trial, of the sets and seeds
            that the condition has; a study need not ask for all of them.
    """

    condition: Condition
    cells: Cells
    joint: Joint
    ranking: tuple[Ranked, ...]
    correlations: tuple[Correlation, ...]
    trade_offs: tuple[TradeOff, ...]
    differences: tuple[Difference, ...]
    spreads: tuple[Spread, ...]
    noise: tuple[Noise, ...]
    agreements: tuple[Agreement, ...]
    points: int
    least_p: dict[Among, float]
    missing: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Analysis:
    """What a study shows, and how sure it is.

    Attributes:
        planned, finished, failed: trials of the whole study.
        families: correlations tested together, over which p is corrected: by what they are among,
            and of tasks (`tasks of sources`).
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
    gains: tuple[Gain, ...]
    shifts: tuple[Shift, ...]
    families: dict[str, int]

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
            "families": self.families,
            "conditions": [
                {
                    **asdict(found.condition),
                    "seeds": list(found.cells.seeds),
                    "points": found.points,
                    "least_p": found.least_p,
                    "missing": [list(cell) for cell in found.missing],
                    "best": [one.calibration for one in leaders(found.ranking)],
                    "ranking": [asdict(one) for one in found.ranking],
                    "correlations": [asdict(one) for one in found.correlations],
                    "trade_offs": [asdict(one) for one in found.trade_offs],
                    "differences": [asdict(one) for one in found.differences],
                    "spreads": [asdict(one) for one in found.spreads],
                    "noise": [_noise(one) for one in found.noise],
                    "agreements": [asdict(one) for one in found.agreements],
                    "tasks": [asdict(one) for one in found.cells.tasks],
                }
                for found in self.conditions
            ],
            "margins": [asdict(one) for one in self.margins],
            "growths": [asdict(one) for one in self.growths],
            "gains": [asdict(one) for one in self.gains],
            "shifts": [asdict(one) for one in self.shifts],
        }

    def tables(self) -> dict[str, str]:
        """Return the CSV files by name."""

        def every(name: str) -> list[dict[str, Any]]:
            return [asdict(one) for found in self.conditions for one in getattr(found, name)]

        ranking = every("ranking")
        for row in ranking:
            row["accuracy"] = {f"{name}_accuracy": kept for name, kept in row["accuracy"].items()}
            row["distance"] = {f"{name}_{kind}": value for kind, told in row["distance"].items()
                               for name, value in told.items()}  # fmt: skip
            del row["tasks"]
            del row["without_own"]
        return {
            "ranking.csv": _table(ranking),
            "tasks.csv": _table(self._tasks()),
            "correlations.csv": _table(every("correlations"), Correlation),
            "trade_offs.csv": _table(every("trade_offs"), TradeOff),
            "differences.csv": _table(every("differences"), Difference),
            "spread.csv": _table(every("spreads")),
            "noise.csv": _table([_noise(one) for found in self.conditions for one in found.noise]),
            "margins.csv": _table([asdict(one) for one in self.margins], Margin),
            "margin_growth.csv": _table([asdict(one) for one in self.growths], Growth),
            "gains.csv": _table([asdict(one) for one in self.gains], Gain),
            "margin_shift.csv": _table([asdict(one) for one in self.shifts], Shift),
        }

    def _tasks(self) -> list[dict[str, Any]]:
        """Return a row a set and task, and a row a set and quantity without its own benchmark."""
        rows = []
        for found in self.conditions:
            for one in found.ranking:
                head = {"condition": one.condition, "calibration": one.calibration}
                rows += [
                    head | {"quantity": task.name, "dimension": task.dimension,
                            "score": task.score, "items": task.items, "dense": task.dense,
                            "signal": task.signal, "own_benchmark": task.name in one.halves,
                            "kept": asdict(one.tasks[task.name])}
                    for task in found.cells.tasks
                ]  # fmt: skip
                rows += [
                    head | {"quantity": f"{name} without its own benchmark", "kept": asdict(kept)}
                    for name, kept in one.without_own.items()
                ]
        return rows

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
    """Analyse the finished trials of a study (definitions: docs/studies.md).

    Args:
        method, sparsity: consider only these; p-values are corrected over what is considered.

    Raises:
        InputError: nothing has finished, or a method, sparsity or default it does not have.
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
    sampled = joints(results, made, asked.resamples, asked.seed)
    family = corrected([
        one
        for cells in made
        for one in correlate(cells, asked.over, permutations=asked.permutations,
                             resamples=asked.resamples, seed=asked.seed)
    ])  # fmt: skip
    pairs = list(zip(made, sampled, strict=True))
    gaps = corrected_differences([one for pair in pairs for one in compare(*pair)])
    dimensions = dimensions_of(results)
    conditions = []
    for cells, found in pairs:
        label = cells.condition.label
        own = tuple(one for one in family if one.condition == label)
        among = dict.fromkeys(one.among for one in own)
        conditions.append(
            ConditionAnalysis(
                cells.condition,
                cells,
                found,
                tuple(rank(cells, found)),
                own,
                tuple(trade_offs(own, dimensions)),
                tuple(one for one in gaps if one.condition == label),
                tuple(
                    one
                    for over in get_args(Over)
                    for one in spreads(cells, over, permutations=asked.resamples, seed=asked.seed)
                ),
                tuple(noise_of(cells, found)),
                tuple(agreements(cells, permutations=asked.permutations, seed=asked.seed)),
                len(counted(cells, asked.over)),
                {name: least_p(strata_of(cells, asked.over, name), asked.permutations)
                 for name in among},
                _missing(cells),
            )
        )  # fmt: skip
    leads, grown = [], []
    for series in series_of(pairs):
        own_margins, own_growths = margins(series, asked.default)
        leads += own_margins
        grown += own_growths
    kept, moved = gains(pairs, asked.default)
    families: dict[str, int] = {}
    for one in family:
        name = f"tasks of {one.among}" if one.task else one.among
        families[name] = families.get(name, 0) + (one.p is not None)
    return Analysis(
        results.name, results.planned, len(results.trials), len(results.failed), asked, dimensions,
        tuple(conditions), tuple(leads), tuple(grown), tuple(kept), tuple(moved), families,
    )  # fmt: skip


def _check(settings: Settings) -> None:
    check_measure(settings.measure)
    if settings.over not in get_args(Over):
        raise InputError(f"correlations are over single or all, not '{settings.over}'")
    if settings.permutations < 1 or settings.resamples < 1:
        raise InputError(
            "permutations and resamples must be at least 1, not "
            f"{settings.permutations} and {settings.resamples}"
        )
    if settings.seed < 0:
        raise InputError(f"the seed must not be negative, but is {settings.seed}")


def series_of(made: Sequence[tuple[Cells, Joint]]) -> list[list[tuple[Cells, Joint]]]:
    """Return the conditions that differ in sparsity alone together, lowest sparsity first; those of
    an N:M pattern, which are no part of such a line, one by one."""
    groups: dict[tuple[Any, ...], list[tuple[Cells, Joint]]] = {}
    for cells, found in made:
        at = cells.condition
        if at.rows:
            pattern = "" if at.unstructured else at.pattern
            key = at.model, at.method, at.propagation, at.rows, at.length, at.suite, pattern
            groups.setdefault(key, []).append((cells, found))
    return [sorted(group, key=lambda pair: pair[0].condition.sparsity) for group in groups.values()]


def _missing(cells: Cells) -> tuple[tuple[str, int], ...]:
    return tuple(
        (name, seed)
        for at, name in enumerate(cells.sets)
        for number, seed in enumerate(cells.seeds)
        if (at, number) not in cells.trials
    )


def _noise(one: Noise) -> dict[str, Any]:
    return asdict(one) | {"ratio": one.ratio}


def _flat(row: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Return nested mappings as one, names joined; `gap` and `kept` name no part of theirs."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        own = f"{name}_{key}" if name else key
        if isinstance(value, dict):
            bare = key in ("gap", "kept", "dimensions", "accuracy", "distance")
            found |= _flat(value, name if bare else own)
        else:
            found[own] = value
    return found


def _table(rows: Sequence[dict[str, Any]], kind: type | None = None) -> str:
    """Return rows as CSV; without any, the header that rows of a dataclass would have."""
    flat = [_flat(row) for row in rows]
    told = flat or ([] if kind is None else [_flat(_empty(kind))])
    header = list(dict.fromkeys(key for row in told for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in flat:
        writer.writerow([_cell(row.get(name)) for name in header])
    return text.getvalue()


def _empty(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass, and of those that they are, without values."""
    return {name: _empty(held) if isinstance(held, type) and is_dataclass(held) else None
            for name, held in get_type_hints(kind).items()}  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return " ".join(str(part) for part in value)
    return repr(value) if isinstance(value, float) else str(value)
