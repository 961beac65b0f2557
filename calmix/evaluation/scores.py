"""Scores of one model on one suite: in memory, as a file, and compared with another model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from calmix.errors import InputError
from calmix.evaluation.measures import PRIMARY, TaskScores
from calmix.evaluation.retention import Retention, retention
from calmix.evaluation.suites import Suite
from calmix.files import read_object, write_text
from calmix.manifest import SEAL, check_seal, sealed
from calmix.options import Measure
from calmix.shown import Shown, rounded_percent
from calmix.yaml_files import first_problem

SCORED_BYTES = 160.0  # bytes of a scored item on disk, of the dense and the smaller model
KIND = "capability scores"
FORMAT = 2  # of the JSON file


@dataclass(frozen=True, repr=False)
class CapabilityScores(Shown):
    """Scores of one model on one suite, item by item.

    Attributes:
        suite: name, version and hash of the suite as run (including limits and selection).
        truncated: by task, how many requests were cut to fit the model's context.
        seconds: wall time of scoring, without opening the model; not saved, 0 if read.
        distance: to the dense model, if measured (`calmix.evaluation.distance`).
        not_run: tasks left out because they run code the model writes.
        form: how the model is prompted, with its `chat template` or `worked examples`.
        repeat: a dense model's generated answers once more, from other batches: what rounding alone
            changes. Empty if not measured.
    """

    model: str
    fingerprint: str
    dtype: str
    suite: dict[str, Any]
    tasks: tuple[TaskScores, ...]
    truncated: dict[str, int] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)
    versions: dict[str, str] = field(default_factory=dict)
    distance: dict[str, Any] | None = None
    not_run: tuple[str, ...] = ()
    form: str = ""
    repeat: tuple[TaskScores, ...] = ()

    def retention(
        self, dense: CapabilityScores, measure: Measure | None = None, **how: Any
    ) -> Retention:
        """Return this model's retention of a dense one; options are those of `retention.retention`.

        The measure is `right` by default if answers were generated, else `primary`.

        Raises:
            InputError: the two were scored with different suites, versions or selections, or
                lack what the measure needs.
        """
        check_same_suite(self.suite, dense.suite)
        if measure is None:
            measure = PRIMARY if any(task.written for task in self.tasks) else "primary"
        return retention(dense.tasks, self.tasks, measure=measure, **how)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable data."""
        values = asdict(self)
        del values["seconds"]  # equal runs give equal files
        return {"kind": KIND, "format": FORMAT, **values}

    def _line(self) -> str:
        items = sum(len(task.items) for task in self.tasks)
        return (
            f"{self.model} on suite {self.suite['name']} version {self.suite['version']}, "
            f"{len(self.tasks)} tasks, {items:,} items"
        )

    def _rows(self) -> list[dict[str, Any]]:
        retained = self.retention(self, "primary", resamples=1)
        return [
            {
                "dimension": one.dimension,
                "task": one.name,
                "items": one.items,
                "scored by": one.score,
                "score": one.dense,
                "accuracy %": rounded_percent(one.dense_accuracy),
            }
            for one in retained.tasks
        ]

    def save(self, path: Path | str) -> None:
        """Write the scores as JSON on one line, since they are long, or their table as CSV."""
        if Path(path).suffix.lower() == ".json":
            write_scores(Path(path), self.to_dict())
        else:
            super().save(path)


def write_scores(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content of a file of scores as JSON on one line, sealed by its hash."""
    write_text(path, json.dumps(sealed(content), ensure_ascii=False) + "\n")


def describe(suite: Suite) -> dict[str, Any]:
    """Return what identifies a suite in a file of scores."""
    return {"name": suite.name, "version": suite.version, "hash": suite.hash}


def check_same_suite(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise an `InputError` unless suite, version and selection are the same, whatever its name."""
    if ours["hash"] == theirs["hash"]:
        return
    what = (
        "selections (--quick, --limit, --dimension, --task, --allow-code-execution) of a suite, or "
        "answers judged by different versions of calmix,"
    )
    if (ours["name"], ours["version"]) != (theirs["name"], theirs["version"]):
        what = "suites or versions"
    named = " and ".join(
        f"{one['name']} version {one['version']} ({one['hash'][:8]})" for one in (ours, theirs)
    )
    raise InputError(f"scores of different {what} cannot be compared: {named}")


def check_same_form(*forms: str) -> None:
    """Raise an `InputError` unless all models are prompted in the same form; "" is unknown."""
    if len({*forms} - {""}) > 1:
        raise InputError(
            "one model is prompted in its chat template, the other with worked examples: give "
            "both the same tokenizer and template, and evaluate both"
        )


def load_scores(path: Path) -> CapabilityScores:
    """Read scores written by `CapabilityScores.save` or `calmix evaluate -o`."""
    return load_pair(path)[1]


def load_dense(path: Path) -> CapabilityScores:
    """Read such scores of a dense model, which must be sealed."""
    dense, scores = load_pair(path, unsealed=False)
    if dense is not None:
        raise InputError(
            f"{path} holds scores of {scores.model} beside those of {dense.model}: "
            "name a file of the dense model alone"
        )
    return scores


def load_pair(
    path: Path, *, unsealed: bool = True
) -> tuple[CapabilityScores | None, CapabilityScores]:
    """Read such scores, preceded by those of the dense model that `--against` added, if any. A
    file of an older calmix may be `unsealed`."""
    value = read_object(path, f"there is no file {path}")
    if SEAL in value or not unsealed:
        check_seal(path, value)
    dense, scores = value.get("dense"), value.get("scores")
    return (
        _parsed(dense, path) if isinstance(dense, dict) else None,
        _parsed(scores if isinstance(scores, dict) else value, path),
    )


def load_pairs(files: Sequence[Path]) -> list[tuple[CapabilityScores, CapabilityScores]]:
    """Read both models' scores from sealed files about the same two models."""
    pairs: list[tuple[CapabilityScores, CapabilityScores]] = []
    for path in files:
        dense, scores = load_pair(path, unsealed=False)
        if dense is None:
            raise InputError(
                f"{path} was scored without a dense model: evaluate again with --against DENSE"
            )
        pairs.append((dense, scores))
        if len({(one.fingerprint, other.fingerprint) for one, other in pairs}) > 1:
            raise InputError(
                f"{path} is about other models than {files[0]}: evaluate the same two models "
                "for both files"
            )
    return pairs


_SCORES = TypeAdapter(CapabilityScores)


def _parsed(value: dict[str, Any], path: Path) -> CapabilityScores:
    if value.pop("kind", None) != KIND:
        raise InputError(f"{path} is not a file of scores from 'calmix evaluate'")
    if (number := value.pop("format", None)) != FORMAT:
        raise InputError(f"{path} holds scores in format {number}, not {FORMAT}: evaluate again")
    if value.get("right_only"):  # an option that was removed
        raise InputError(
            f"{path} has only the answers that the dense model had right: score the model again"
        )
    try:
        scores = _SCORES.validate_python(value)
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {first_problem(error)}") from error
    kinds = ("name", str), ("version", int), ("hash", str)
    if not all(isinstance(scores.suite.get(key), kind) for key, kind in kinds):
        raise InputError(f"{path} is damaged: it does not name its suite")
    for task in (*scores.tasks, *scores.repeat):
        if not task.consistent:
            raise InputError(f"{path} is damaged: task {task.name} has parts of different lengths")
    return scores
