"""The scores of one model on one suite: as a value, as a file, and against another model's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from calmix.capability.measures import Measure
from calmix.capability.records import TaskScores, from_mapping, from_old_mapping
from calmix.capability.retention import RESAMPLES, Retention, retention
from calmix.capability.suites import Suite
from calmix.errors import InputError
from calmix.files import parse_json, write_text
from calmix.yaml_files import first_problem

KIND = "capability scores"
_TASK = TypeAdapter(TaskScores)
FORMAT = 2  # of the JSON file; 1 held no log-likelihoods


@dataclass(frozen=True)
class CapabilityScores:
    """The scores of one model on one suite, with every item.

    Attributes:
        model: the model's name as given, and `fingerprint` of its files.
        dtype: what it was computed in.
        suite: name, version and hash of the suite as run (limits and selection included).
        tasks: the scores, in the order of the suite.
        truncated: for each task how many requests were cut to fit the model's context.
        seconds: wall time of scoring, without opening the model.
        versions: of the packages that decide the numbers.
        distance: how far the model is from a dense one, by dimension, where that was measured
            (`calmix.capability.distance`).
    """

    model: str
    fingerprint: str
    dtype: str
    suite: dict[str, Any]
    tasks: tuple[TaskScores, ...]
    truncated: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    distance: dict[str, Any] | None = None

    def retention(
        self,
        dense: CapabilityScores,
        *,
        measure: Measure = "primary",
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Retention:
        """Return what this model has kept of a dense one.

        Raises:
            InputError: the two were scored with different suites, versions or selections, or
                hold too little for the measure.
        """
        check_same_suite(self.suite, dense.suite)
        return retention(dense.tasks, self.tasks, measure=measure, resamples=resamples, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        return {"kind": KIND, "format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the scores as JSON, all on one line: they are long."""
        write_text(path, json.dumps(self.to_dict(), ensure_ascii=False) + "\n")


_SCORES = TypeAdapter(CapabilityScores)


def describe(suite: Suite) -> dict[str, Any]:
    """Return what scores remember of the suite they were made with."""
    return {"name": suite.name, "version": suite.version, "hash": suite.hash}


def check_suite(scores: CapabilityScores, suite: Suite) -> None:
    """Refuse scores that cannot be compared with a run of `suite`.

    Raises:
        InputError: they are of another suite, version or selection.
    """
    check_same_suite(describe(suite), scores.suite)


def check_same_suite(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse two runs that cannot be compared.

    Raises:
        InputError: suite, version or selection differ.
    """
    if (ours["name"], ours["hash"]) == (theirs["name"], theirs["hash"]):
        return
    if (ours["name"], ours["version"]) != (theirs["name"], theirs["version"]):
        what = "different suites or versions"
    else:
        what = "different selections (--quick, --limit, --dimension, --task) or texts of a suite"
    raise InputError(
        f"scores of {what} cannot be compared: {_suite_line(ours)} and {_suite_line(theirs)}"
    )


def _suite_line(suite: dict[str, Any]) -> str:
    return f"{suite['name']} version {suite['version']} ({suite['hash'][:8]})"


def load_scores(path: Path) -> CapabilityScores:
    """Read scores written by `CapabilityScores.save` or `calmix evaluate -o`.

    A file of format 1 is read as far as it goes: without log-likelihoods of the choices.

    Raises:
        InputError: no such file, or it holds no capability scores of a known format.
    """
    value = _read(path)
    if isinstance(value.get("scores"), dict):
        value = value["scores"]  # a file of `calmix evaluate -o`, scores beside the retention
    return _parsed(value, path)


def load_dense(path: Path) -> CapabilityScores | None:
    """Read the dense model's scores out of a file of `calmix evaluate --against -o`, if any.

    Raises:
        InputError: no such file, or it is damaged.
    """
    value = _read(path).get("dense")
    return _parsed(value, path) if isinstance(value, dict) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON file of scores: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no scores of 'calmix evaluate'")
    return value


def _parsed(value: dict[str, Any], path: Path) -> CapabilityScores:
    if value.pop("kind", None) != KIND:
        raise InputError(f"{path} holds no scores of 'calmix evaluate'")
    found = value.pop("format", None)
    readers = {1: from_old_mapping, FORMAT: from_mapping}
    read = readers.get(found) if isinstance(found, int) else None
    if read is None:
        raise InputError(f"{path} holds scores in format {found}, not {FORMAT}: evaluate again")
    try:
        tasks = tuple(_TASK.validate_python(vars(read(task))) for task in value.pop("tasks"))
        scores = _SCORES.validate_python(vars(CapabilityScores(tasks=tasks, **value)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = first_problem(error) if isinstance(error, ValidationError) else error
        raise InputError(f"{path} is damaged: {what}") from error
    if not all(isinstance(scores.suite.get(key), str) for key in ("name", "hash")):
        raise InputError(f"{path} is damaged: it does not say of which suite it is")
    for task in tasks:
        _check_lengths(task, path)
    return scores


def _check_lengths(task: TaskScores, path: Path) -> None:
    """Refuse a task whose parts are not of one length, or whose right choice is none of them."""
    parts = (task.values, task.gold, task.loglikelihoods, task.bytes, task.floors, task.unigram)
    choices = task.loglikelihoods or task.bytes
    needed: list[tuple[Any, ...]] = [task.gold] if task.loglikelihoods else []
    needed += [task.bytes] if task.loglikelihoods and task.primary == "bits" else []
    if (
        any(len(part) != len(task.items) for part in needed)
        or any(part and len(part) != len(task.items) for part in parts)
        or any(not 0 <= right < len(row) for right, row in zip(task.gold, choices, strict=False))
        or any(list(map(len, other)) != list(map(len, choices))
               for other in (task.bytes, task.floors) if other and choices)
    ):  # fmt: skip
        raise InputError(f"{path} is damaged: the parts of task {task.name} do not fit together")
