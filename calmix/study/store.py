"""The store: one folder a trial, named by the hash of its request, and what trials share.

    STORE/store.json            the study as last run, and its trials in order
    STORE/trials/ID/            request.json with result.json, scores.json and pruning.json, or
                                with error.json; checkpoint/ if the study keeps them
    STORE/calibration/ID/       a calibration set, and information.json
    STORE/dense/ID.json         scores of a dense model
    STORE/locks/                who is at work on what

A trial's folder appears whole: it is written beside and renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from calmix.capability.scores import CapabilityScores, load_scores
from calmix.errors import InputError, disk_errors
from calmix.files import (
    atomic_folder,
    check_apart,
    check_writable,
    parse_json,
    sync,
    write_json,
)
from calmix.locks import Lock, holder_of
from calmix.study.results import FailedTrial, Trial
from calmix.study.spec import Study
from calmix.study.trials import Resolved, differences
from calmix.yaml_files import first_problem

KIND, FORMAT = "study store", 2  # 1 held no log-likelihoods
INDEX, REQUEST, RESULT, ERROR = "store.json", "request.json", "result.json", "error.json"
REMEDY = "run the study again after deleting it"  # of a record that is damaged
SCORES = "scores.json"

State = Literal["finished", "failed", "running", "pending"]


_Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # names a file of the store
_Scalar = str | int | float | None


def _named(key: list[_Scalar]) -> list[_Scalar]:
    if len(key) < 2 or not all(isinstance(name, str) for name in key[:2]):
        raise ValueError("names no model and calibration set")
    return key


class _Kept(BaseModel):
    """What is read back from a file of the store, checked: another may have written it."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Entry(_Kept):
    id: _Id
    label: str
    key: Annotated[list[_Scalar], AfterValidator(_named)]  # model, calibration set, and the rest
    set: _Id | None


class _SuiteRecord(_Kept):
    name: str
    version: int
    dimensions: list[str]


class _Index(_Kept):
    name: str
    text: str
    suite: _SuiteRecord
    trials: list[_Entry]


class _Run(_Kept):
    finished: str
    machine: str
    system: str
    threads: int
    device: str
    dtype: str
    seconds: dict[str, float]
    versions: dict[str, str]


class _Result(_Kept):
    trial: dict[str, Any]
    run: _Run
    dense: _Id


class _Failure(_Kept):
    label: str
    error: str


class Store:
    """A study's folder on disk. Open one with `open_store` or `claim_store`."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self.index = index

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The trials of the study as last run, in order: `id`, `label`, `calibration`, `set`."""
        return self.index["trials"]

    def trial(self, trial_id: str) -> Path:
        """Return a trial's folder."""
        return self.path / "trials" / trial_id

    def calibration(self, calibration_id: str) -> Path:
        """Return the folder of a calibration set."""
        return self.path / "calibration" / calibration_id

    def dense(self, key: str) -> Path:
        """Return the file of a dense model's scores."""
        return self.path / "dense" / f"{key}.json"

    def lock(self, name: str) -> Lock:
        """Return the lock on a trial or a shared part."""
        return Lock(self.path / "locks" / f"{name}.lock")

    def set_lock(self, calibration_id: str) -> Lock:
        """Return the lock on a calibration set that is not there yet."""
        return self.lock(f"set-{calibration_id[:32]}")

    def sweep(self) -> None:
        """Remove locks of processes that died once their work was done, or whose work is."""
        for path in (self.path / "locks").glob("*.lock"):
            lock = Lock(path)
            if holder_of(path) is None and lock.acquire():
                lock.release()

    def state(self, trial_id: str) -> State:
        """Return how far a trial is."""
        folder = self.trial(trial_id)
        if (folder / RESULT).is_file():
            return "finished"
        if self.runner(trial_id) is not None:
            return "running"
        return "failed" if (folder / ERROR).is_file() else "pending"

    def runner(self, trial_id: str) -> str | None:
        """Return who is at work on a trial, if anyone."""
        return holder_of(self.path / "locks" / f"{trial_id}.lock")

    def result(self, trial_id: str) -> dict[str, Any]:
        """Return a finished trial's record: `trial`, `run` (versions, machine, date).

        Its model and set have the names that the study has for them now.

        Raises:
            InputError: the record is damaged.
        """
        record = _read(self.trial(trial_id) / RESULT, REMEDY, _Result)
        if (entry := self._entry(trial_id)) is not None:
            model, calibration, *_ = entry["key"]
            record["trial"] |= {"model": model, "calibration": calibration}
        return record

    def scores(self, trial_id: str) -> CapabilityScores:
        """Return what a finished trial's model did on every item, and its distance.

        Raises:
            InputError: the file is damaged, or of a version without log-likelihoods.
        """
        return load_scores(self.trial(trial_id) / SCORES)

    def read_trial(self, trial_id: str) -> Trial:
        """Return a finished trial."""
        record = self.result(trial_id)["trial"]
        if "mix" not in record:  # finished before records had it
            asked = _read(self.trial(trial_id) / REQUEST, REMEDY).get("calibration")
            record = record | {"mix": asked.get("mix", {}) if isinstance(asked, dict) else {}}
        try:
            return Trial.model_validate(record)
        except ValidationError as error:
            path = self.trial(trial_id) / RESULT
            raise InputError(f"{path} is damaged: {first_problem(error)}") from error

    def read_failure(self, trial_id: str) -> FailedTrial:
        """Return what a failed trial ended with."""
        kept = _read(self.trial(trial_id) / ERROR, "run the study with --retry-failed", _Failure)
        label = (self._entry(trial_id) or kept)["label"]
        return FailedTrial(id=trial_id, label=label, error=kept["error"])

    def _entry(self, trial_id: str) -> dict[str, Any] | None:
        return next((entry for entry in self.entries if entry["id"] == trial_id), None)

    @contextmanager
    def writing(self, trial: Resolved) -> Iterator[Path]:
        """Yield a folder to fill; it becomes the trial's if the body succeeds."""
        with atomic_folder(self.trial(trial.id)) as beside:
            write_json(beside / REQUEST, {"label": trial.planned.label, **trial.request})
            yield beside

    def fail(self, trial: Resolved, error: str, trace: str) -> None:
        """Keep the error a trial ended with."""
        content = {"label": trial.planned.label, "error": error, "traceback": trace}
        with self.writing(trial) as folder:
            write_json(folder / ERROR, content)

    def update(self, study: Study, resolved: Sequence[Resolved]) -> None:
        """Make the store one of this study.

        Trials may be added, models and sets named anew, and trials that have not finished may
        change or go.

        Raises:
            InputError: a finished trial is no longer asked for, or is now defined otherwise.
        """
        new = {trial.planned.key: trial for trial in resolved}
        asked = {trial.id for trial in resolved}
        for entry in self.entries:
            if entry["id"] in asked or self.state(entry["id"]) != "finished":
                continue
            trial = new.get(tuple(entry["key"]))
            if trial is None:
                raise InputError(
                    f"the study no longer asks for '{entry['label']}', which has finished in "
                    f"{self.path}: put it back, or name another store"
                )
            before = _read(self.trial(entry["id"]) / REQUEST, "name another store")
            what = next(differences(_request(before), trial.request), "its definition")
            raise InputError(
                f"the study has changed since '{entry['label']}' finished in {self.path} "
                f"({what}): undo the change, give it another name, or name another store"
            )
        self.index = _index(study, resolved)
        write_json(self.path / INDEX, self.index)

    def take(self, other: Store) -> int:
        """Copy what another store has of this study, and return how many trials that were.

        Copied are finished trials with the dense scores they are read beside, and calibration
        sets. What is here, or what another runner is at work on, stays.

        Raises:
            InputError: it is this store, or has nothing of this study, or a record is damaged.
        """
        if other.path.resolve() == self.path.resolve():
            raise InputError(f"--reuse {other.path} is the store itself: name another, or none")
        sets = {entry["set"] for entry in self.entries if entry["set"] is not None}
        sets = {one for one in sets if other.calibration(one).is_dir()}
        trials = [e["id"] for e in self.entries if other.state(e["id"]) == "finished"]
        if not sets and not trials:
            raise InputError(
                f"{other.path} has no finished trial and no calibration set of this study: "
                "leave it out of --reuse"
            )
        for one in sets:
            self._take_set(other, one)
        return sum(self._take(other, one) for one in trials if self.state(one) != "finished")

    def _take_set(self, other: Store, calibration_id: str) -> None:
        target = self.calibration(calibration_id)
        lock = self.set_lock(calibration_id)
        if target.is_dir() or not lock.acquire():
            return
        try:
            if not target.is_dir():
                _copy(other.calibration(calibration_id), target)
        finally:
            lock.release()

    def _take(self, other: Store, trial_id: str) -> bool:
        lock = self.lock(trial_id)
        if not lock.acquire():
            return False
        try:
            if self.state(trial_id) == "finished":  # by another runner, a moment ago
                return False
            other.scores(trial_id)  # damaged files stay where they are
            dense = other.result(trial_id)["dense"]
            if not self.dense(dense).exists():
                load_scores(other.dense(dense)).save(self.dense(dense))
            _copy(other.trial(trial_id), self.trial(trial_id))
            return True
        finally:
            lock.release()


def is_store(path: Path) -> bool:
    """Tell whether a folder looks like a store."""
    return (path / INDEX).is_file()


def open_store(path: Path) -> Store:
    """Open an existing store.

    Raises:
        InputError: there is none, or it is of another version or damaged.
    """
    if not path.exists():
        raise InputError(f"there is no study store at {path}: calmix study run makes one")
    if not is_store(path):
        raise InputError(f"{path} is no study store (it holds no {INDEX})")
    index = _read(path / INDEX, "run the study into another folder")
    if index.get("kind") != KIND:
        raise InputError(f"{path} is no study store (its {INDEX} is of another kind)")
    if index.get("format") != FORMAT:
        raise InputError(
            f"store {path} has format {index.get('format')}, but this calmix reads format "
            f"{FORMAT}: name another folder, or use the calmix that made it"
        )
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        raise InputError(f"{path / INDEX} is damaged: {first_problem(error)}") from error
    for part in ("trials", "calibration", "dense", "locks"):
        for place in (path / part, *(path / part).glob("*")):
            if place.is_symlink() and not place.resolve().is_relative_to(path.resolve()):
                raise InputError(f"{place} is a link out of the store: put there what it leads to")
    return Store(path, index)


def check_folder(path: Path, inputs: Iterable[object] = ()) -> None:
    """Refuse a folder that can become no store, before any work is done.

    Raises:
        InputError: it is a file, or holds something else, or is a store that cannot be read; a new
            one is, holds or lies in one of the inputs, or cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: name a folder for the store")
    if is_store(path):
        open_store(path)
        return
    check_apart(path, inputs)
    check_writable(path / INDEX)
    if path.is_dir() and any(not f.name.startswith(f".{INDEX}.") for f in path.iterdir()):
        raise InputError(f"{path} is not empty and is no study store: name another folder")


def claim_store(path: Path, study: Study, resolved: Sequence[Resolved]) -> Store:
    """Open the store at `path` for a study, or make one there.

    Raises:
        InputError: the folder holds something else, or finished trials of a changed study.
    """
    check_folder(path)
    if not is_store(path):
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        write_json(path / INDEX, _index(study, resolved))
        return open_store(path)
    store = open_store(path)
    store.update(study, resolved)
    return store


def _copy(folder: Path, target: Path) -> None:
    with atomic_folder(target) as beside:
        shutil.copytree(folder, beside, dirs_exist_ok=True)


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder onto its place; if another runner was faster, its work stays."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(folder)
        sync(target.parent)


def _index(study: Study, resolved: Sequence[Resolved]) -> dict[str, Any]:
    return {
        "kind": KIND,
        "format": FORMAT,
        "name": study.name,
        "text": study.text,
        "suite": {
            "name": study.suite.name,
            "version": study.suite.version,
            "hash": study.suite.hash,
            "dimensions": list(study.suite.dimensions),
        },
        "trials": [
            {
                "id": trial.id,
                "label": trial.planned.label,
                "key": list(trial.planned.key),
                "set": trial.calibration_id,
            }
            for trial in resolved
        ],
    }


def _request(kept: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kept.items() if key != "label"}


def _read(path: Path, remedy: str, kind: type[_Kept] = _Kept) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: {remedy}")
    try:
        kind.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{path} is damaged ({first_problem(error)}): {remedy}") from error
    return value
