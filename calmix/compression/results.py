"""The results in a folder of `calmix compress`, and whether they were made from one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix.calibration.dataset import CalibrationSet, saved_set
from calmix.compression.folder import COMPRESSED, SEARCH
from calmix.errors import InputError
from calmix.evaluation.scores import CapabilityScores
from calmix.files import cached_sha256, user_path
from calmix.manifest import (
    GGUF,
    MANIFEST,
    Input,
    changed,
    check_inputs,
    file_hashes,
    read_record,
    read_sealed,
    record_file,
)
from calmix.models.folder import combined, model_files
from calmix.models.opening import resolve_model


@dataclass(frozen=True)
class StageResult:
    """A result and what it was made from.

    `reads` are its inputs by role, with an empty hash for results of other stages; `request` is
    what its own record says of the request; `spent` is the result from which on this one is gone.
    """

    stage: str
    path: Path
    reads: Mapping[str, Input]
    request: Mapping[str, Any]
    spent: Path | None = None

    @property
    def done(self) -> bool:
        """Whether it is there, or no longer needed."""
        return ready(self.path) or ready(self.spent)

    def entry(self, out: Path) -> dict[str, Any]:
        """Return what OUT's record says of it: results are relative to OUT."""
        reads = {
            role: (name if sha256 else str(Path(name).relative_to(out)), sha256)
            for role, (name, sha256) in self.reads.items()
        }
        places = {"leaves": self.path, "spent": self.spent}
        named = {key: path and str(path.relative_to(out)) for key, path in places.items()}
        return {"name": self.stage, **named, "reads": reads, "request": self.request}


def ready(path: Path | None) -> bool:
    """Whether a result is there; a GGUF file with its record, which is written last."""
    if path is None or not path.exists():
        return False
    return path.suffix != GGUF or record_file(path) is not None


class Results:
    """Compares results with what they were made from, and hashes every model once.

    Args:
        hashed: returns the SHA-256 of a file; by default from the cache, if the file has the size
            and times that it had when it was read.
    """

    def __init__(self, hashed: Callable[[Path], str] = cached_sha256) -> None:
        self._hashed, self._known = hashed, dict[Path, dict[str, str]]()

    def check(self, result: StageResult) -> None:
        """Refuse a result, unless its stage made it from what lies there now.

        An input that is gone, such as a pruned model after its recovery, is not compared.
        """
        path = result.path
        remedy = f"put back what was there, or delete {path} and run its calmix compress again"
        inputs = {
            role: one if one.sha256 else Input(one.name, self.sha256(Path(one.name)))
            for role, one in result.reads.items()
            if one.sha256 or Path(one.name).exists()
        }
        check_inputs(path, read_record(path), inputs, result.request, remedy)
        if path.suffix == GGUF or (path / MANIFEST).exists():
            self.hashes(path)

    def check_all(self, results: Iterable[StageResult]) -> None:
        """Check the results that exist."""
        for result in results:
            if ready(result.path):
                self.check(result)

    def check_scores(self, file: Path, scores: CapabilityScores) -> bool:
        """Refuse a file of scores if another model lies in the place of its own now; return
        whether there is a model."""
        place = user_path(scores.model)
        if not (place if place.suffix == GGUF else place / "config.json").is_file():
            return False
        record = {"model": {"name": scores.model, "sha256": scores.fingerprint}}
        now = {"model": Input(scores.model, self.sha256(place))}
        check_inputs(file, record, now, {}, f"put back what was there, or make {file} again")
        return True

    def sha256(self, path: Path) -> str:
        """Return the hash that identifies a calibration set or a model."""
        if saved_set(path) is not None:
            return CalibrationSet.open(path).sha256
        if path.suffix == GGUF and ready(path):
            self.hashes(path)
            return str(read_record(path)["opened"])
        if path.suffix == GGUF:
            self._hashed(path)  # by which its dequantised copy is found
        record = read_record(path) if (path / MANIFEST).exists() else None
        if record is not None and "opened" in record:
            self.hashes(path)
            return str(record["opened"])
        path = resolve_model(str(path))  # a quantised checkpoint opens as another folder
        names = model_files(path)
        if record is not None:
            return combined({name: self.hashes(path)[name] for name in names})
        return combined({name: self._hashed(path / name) for name in names})

    def hashes(self, model: Path) -> dict[str, str]:
        """Return the SHA-256 of each file of a checkpoint or pack, or of a GGUF file; refuse one
        that differs from its record's."""
        if model not in self._known:
            record, folder = read_record(model), model
            if model.suffix == GGUF:
                folder, hashes = model.parent, {model.name: self._hashed(model)}
            else:
                hashes = file_hashes(model, hashed=self._hashed)
            weights = record.get("weights", {}).items()
            packed = {one.get("file", name): one["packed"] for name, one in weights}
            if wrong := changed(folder, record["files"] | packed, hashes):
                raise InputError(f"{wrong[0]}: put it back, or make {model} again")
            self._known[model] = hashes
        return self._known[model]


def read_compressed(out: Path) -> dict[str, Any]:
    """Return the record in OUT: the `request`, the `commands` of all stages by name, the `stages`
    (`recorded`), `dense_bytes` of the dense weights; InputError if there is none or it is damaged.
    """
    missing = f"{out} was not made by calmix compress: it has no {COMPRESSED}"
    if (out / SEARCH).exists():
        missing = f"{out} has no model yet: run its calmix compress again to resume or see why"
    record = read_sealed(out / COMPRESSED, missing)
    if "stages" not in record:
        raise InputError(
            f"{out} was made by an older calmix, which did not record what its "
            "results were made from: make it again in another folder"
        )
    return record


def recorded(out: Path, record: Mapping[str, Any]) -> list[StageResult]:
    """Return the results that a record lists, wherever OUT is now."""
    return [
        StageResult(
            one["name"],
            out / one["leaves"],
            {
                role: Input(name if sha256 else str(out / name), sha256)
                for role, (name, sha256) in one["reads"].items()
            },
            one["request"],
            out / one["spent"] if one.get("spent") else None,
        )
        for one in record["stages"]
    ]


def verified(out: Path, *needed: str) -> tuple[dict[str, Any], Results]:
    """Return the record in OUT and the hashes of its models, once it has the results `needed` and
    none of another run."""
    record, results = read_compressed(out), Results()
    for name in needed:
        result_in(out, name)
    results.check_all(recorded(out, record))
    return record, results


def result_in(out: Path, name: str) -> Path:
    """Return the path of a result in OUT; InputError if it is missing."""
    if not ready(path := out / name):
        raise InputError(
            f"{out} is not finished: it lacks {name}; run its calmix compress again to resume"
        )
    return path
