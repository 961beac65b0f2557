"""What a report card tells, read from a folder of `calmix compress`: data, no words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet, is_saved_set
from calmix.compress.plan import MANIFEST as RECORD
from calmix.compress.running import Record, read_record, stage_seconds
from calmix.errors import InputError
from calmix.evaluation.distance import Flips, flips
from calmix.evaluation.generations import Answered, load_answers
from calmix.evaluation.retention import Retention
from calmix.evaluation.scores import CapabilityScores, load_dense, load_scores
from calmix.evaluation.suites import load_suite, provenance
from calmix.files import parse_json, user_path
from calmix.manifest import file_hashes
from calmix.models import builtin_models
from calmix.pruning.checkpoint import MANIFEST
from calmix.sources import builtin_sources

WEIGHTS = (".safetensors",)


@dataclass(frozen=True)
class Source:
    """A part of the calibration set: rows and tokens of it, and whose text it is."""

    name: str
    dimension: str
    rows: int
    tokens: int
    licence: str
    version: str


@dataclass(frozen=True)
class Layer:
    """A pruned layer: the block it is in, its kind, and the share of output energy it lost."""

    block: int
    kind: str
    sparsity: float
    error: float | None


@dataclass(frozen=True)
class Card:
    """Everything a report card tells of one model.

    Attributes:
        name: of the folder.
        record: request, commands and versions.
        seconds: by stage.
        licence, origin: of the dense model.
        weights, pruned: in the pruned layers, and how many of them the masks remove.
        size: bytes of the weight files.
        layers: with what the prune itself lost, before recovery.
        sources: of the calibration set, `calibration` its manifest.
        recoveries: what each recovery did, in order.
        kept, by_accuracy: retention by each task's own score, and by accuracy.
        flipped: items that changed sides.
        distance: to the dense model, as `evaluate` keeps it; None where it was not measured.
        answers: None where there are none.
        tasks: licence and origin of each scored task.
        hashes: SHA-256 by what it is of.
    """

    name: str
    record: Record
    seconds: Mapping[str, float]
    licence: str
    origin: str
    weights: int
    pruned: int
    size: int
    layers: tuple[Layer, ...]
    sources: tuple[Source, ...]
    calibration: Mapping[str, Any]
    recoveries: tuple[Mapping[str, Any], ...]
    scores: CapabilityScores
    dense: CapabilityScores
    kept: Retention
    by_accuracy: Retention
    flipped: Flips
    distance: Mapping[str, Any] | None
    answers: Answered | None
    tasks: Mapping[str, Mapping[str, str]]
    hashes: Mapping[str, str]

    @property
    def target(self) -> str:
        """The sparsity or pattern, as it is printed."""
        asked = self.record.request
        return str(asked["pattern"] or f"{100 * asked['sparsity']:g} %")

    @property
    def model(self) -> str:
        """The dense model, as the user named it."""
        return str(self.record.request["model"])


def read_card(out: Path) -> Card:
    """Return what the card of a folder tells.

    Raises:
        InputError: it is no folder of `calmix compress`, it is not finished, or a file in it is
            damaged.
    """
    record = read_record(out)
    for needed in ("model", "scores.json"):
        if not (out / needed).exists():
            raise InputError(
                f"{out} is not finished: it lacks {needed}; go on with the calmix compress that "
                f"{out / RECORD} tells"
            )
    scores, dense = load_scores(out / "scores.json"), load_dense(out / "scores.json")
    if dense is None:
        raise InputError(f"{out / 'scores.json'} was scored without a dense model: evaluate again")
    path = out / "model" / MANIFEST
    recoveries: list[Mapping[str, Any]] = []
    try:
        recovered = manifest = parse_json(path.read_text(encoding="utf-8"))
        while manifest["kind"] == "recovered checkpoint":
            recoveries.insert(0, manifest["recovery"])
            manifest = manifest["pruned"]
        layers = tuple(_layer(layer) for layer in manifest["pruning"]["layers"])
        calibration = manifest["calibration"]
        sources = _sources(out, record, calibration)
        done = manifest["pruning"]
        weights, pruned = int(done["weights"]), int(done["pruned"])
        hashes = {
            f"dense model {record.request['model']}": str(manifest["model"]["sha256"]),
            "calibration set": str(calibration["sha256"]),
            "pruned model, before recovery": str(recovered["model"]["sha256"]),
        }
    except FileNotFoundError:
        raise InputError(f"{path} is missing: make {out / 'model'} again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error
    made = file_hashes(out / "model", without=("README.md",))
    hashes |= {f"model/{name}": value for name, value in made.items()
               if name.endswith(WEIGHTS) or name == "config.json"}  # fmt: skip
    licence, origin = _whose(record.request["model"])
    answers = out / "answers.json"
    return Card(
        name=out.resolve().name,
        record=record,
        seconds=stage_seconds(out),
        licence=licence,
        origin=origin,
        weights=weights,
        pruned=pruned,
        size=sum(p.stat().st_size for p in (out / "model").iterdir() if p.suffix in WEIGHTS),
        layers=layers,
        sources=sources,
        calibration=calibration,
        recoveries=tuple(recoveries),
        scores=scores,
        dense=dense,
        kept=scores.retention(dense),
        by_accuracy=scores.retention(dense, measure="accuracy"),
        flipped=flips(dense.tasks, scores.tasks),
        distance=scores.distance,
        answers=load_answers(answers) if answers.exists() else None,
        tasks=_tasks(record.request["suite"]),
        hashes=hashes,
    )


def _layer(told: Mapping[str, Any]) -> Layer:
    parts = str(told["name"]).split(".")
    block = next((int(part) for part in parts if part.isdigit()), 0)
    error = told["error"]
    return Layer(block, parts[-1], float(told["sparsity"]), None if error is None else float(error))


def _sources(out: Path, record: Record, manifest: Mapping[str, Any]) -> tuple[Source, ...]:
    """Return the parts of the set; of text the model wrote, one a dimension."""
    told: Mapping[str, Any] = manifest.get("sources") or {}
    counts = {name: int(one["rows"]) for name, one in told.items()}
    if not counts:
        places = out / "calibration", user_path(str(record.request["calibration"]))
        held = next((place for place in places if is_saved_set(place)), None)
        counts = {} if held is None else CalibrationSet.open(held).counts
    known = builtin_sources()
    own = manifest.get("own") or {}
    length = int(manifest["length"])
    written = "generated" in manifest
    return tuple(
        Source(
            name,
            name if written else known[name].dimension if name in known
            else str(own.get(name, {}).get("dimension", "-")),
            rows,
            rows * length,
            "written by the model" if written else str(told[name].get("licence", "unstated")),
            "" if written else str(told[name].get("version", "")),
        )
        for name, rows in counts.items()
    )  # fmt: skip


def _whose(name: str) -> tuple[str, str]:
    """Return licence and origin of the dense model, as far as they are known here."""
    known = builtin_models().get(name.removeprefix("builtin:"))
    if name.startswith("builtin:") and known is not None:
        return known.licence, known.origin
    return "see the model's own card", name


def _tasks(suite: str) -> dict[str, dict[str, str]]:
    try:
        return {name: provenance(spec) for name, spec in load_suite(suite).tasks.items()}
    except InputError:  # the user's own file, which has moved
        return {}
