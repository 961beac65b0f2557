"""The store of a study: a folder for each trial, named by the hash of its request.

    STORE/store.json            the study as last run, and its trials in order
    STORE/trials/ID/            request.json with result.json, scores.json and pruning.json, or
                                with error.json; checkpoint/ if the study keeps checkpoints
    STORE/calibration/ID/       a calibration set
    STORE/dense/ID.json         scores of a dense model
    STORE/pruned/               models that are being pruned or scored
    STORE/locks/                locks of running processes

A trial's folder is written under a temporary name and renamed, so it is never incomplete. `trials`,
`calibration` and `dense` may be copied from other stores: a study reuses whatever it needs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from filelock import SoftFileLease, Timeout
from pydantic import BaseModel, Field, ValidationError

from calmix.errors import DiskError, InputError, disk_errors
from calmix.evaluation.scores import CapabilityScores, load_scores
from calmix.files import (
    alone,
    atomic_folder,
    check_apart,
    check_links,
    check_readable,
    check_writable,
    hidden,
    read_object,
    write_json,
)
from calmix.study.declaration import Declared
from calmix.study.results import StudyResults, Trial
from calmix.study.trials import Planned
from calmix.yaml_files import first_problem

STORE_KIND, STORE_FORMAT = "study store", 2
STORE_INDEX, REQUEST, RESULT, ERROR = "store.json", "request.json", "result.json", "error.json"
TRIAL_SCORES = "scores.json"
STORE_PARTS = ("trials", "calibration", "dense", "pruned", "locks")
BEAT, SILENCE = 10.0, 120.0  # seconds between renewals of a lock, and until it expires

State = Literal["finished", "failed", "running", "pending"]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # names a file of the store


class Entry(BaseModel, frozen=True):
    """A trial of the study: its hash, its label, its key (which begins with the names of model and
    calibration set), and the hash of its set."""

    id: Id
    label: str
    key: Annotated[list[str | int | float | None], Field(min_length=2)]
    set: Id | None


class Index(BaseModel, frozen=True):
    """The study as last run: its name, the text of its file, its trials in order, the name,
    version, hash and dimensions of its suite, and what was declared, the last entry being valid."""

    kind: str = STORE_KIND
    format: int = STORE_FORMAT
    name: str
    text: str
    suite: dict[str, Any]
    trials: list[Entry]
    declarations: tuple[Declared, ...] = ()


class FinishedTrial(BaseModel, frozen=True):
    """A finished trial; `run` records when and where it ran, `dense` names its dense model's
    scores."""

    trial: Trial
    run: dict[str, Any]
    dense: Id


class Failure(BaseModel, frozen=True):
    """The record of a failed trial."""

    error: str


Record = TypeVar("Record", bound=BaseModel)


def _read(path: Path, kind: type[Record], remedy: str) -> Record:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path} is damaged ({first_problem(error)}): {remedy}") from error
    except OSError as error:
        check_readable(path)
        raise InputError(f"{path} is damaged: {remedy}") from error


@dataclass
class Store:
    """A study's folder on disk; `open_store` opens it. Finished trials that are not in the index
    stay there, for studies that need them again."""

    path: Path
    index: Index

    def trial(self, trial_id: str) -> Path:
        """Return a trial's folder."""
        return self.path / "trials" / trial_id

    def calibration(self, calibration_id: str) -> Path:
        """Return the folder of a calibration set."""
        return self.path / "calibration" / calibration_id

    def pruned(self, trial_id: str) -> Path:
        """Return the folder of a trial's pruned model, while it is needed."""
        return self.path / "pruned" / trial_id

    def dense(self, key: str) -> Path:
        """Return the file of a dense model's scores."""
        return self.path / "dense" / f"{key}.json"

    def lock(self, name: str) -> SoftFileLease:
        """Return the lock on a trial or a shared part; it holds across machines."""
        path = self.path / "locks" / f"{name}.lock"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > SILENCE:  # its holder is gone,
                    # unless this clock is ahead, or another runner has the trial by now.
                    with alone(path), hidden(path, Path.touch) as probe:
                        if probe.stat().st_mtime - path.stat().st_mtime > SILENCE:
                            path.unlink()
        return SoftFileLease(
            path, lease_duration=SILENCE, heartbeat_interval=BEAT, poll_interval=0.5
        )

    def runner(self, trial_id: str) -> str | None:
        """Return which process runs a trial, if any."""
        if not (self.path / "locks" / f"{trial_id}.lock").exists():
            return None
        try:
            lock = self.lock(trial_id)
        except DiskError:  # it has expired, in a store that cannot be written
            return None
        try:
            with lock.acquire(timeout=0):  # left by a process that died
                return None
        except (Timeout, OSError):
            owner = lock.owner
            return f"pid {owner.pid} on {owner.hostname}" if owner else "another process"

    def state(self, trial_id: str) -> State:
        """Return the state of a trial."""
        folder = self.trial(trial_id)
        if (folder / RESULT).is_file():
            return "finished"
        if self.runner(trial_id) is not None:
            return "running"
        return "failed" if (folder / ERROR).is_file() else "pending"

    def result(self, entry: Entry) -> FinishedTrial:
        """Return a finished trial, with its model and set named as in the study now."""
        path = self.trial(entry.id) / RESULT
        record = _read(path, FinishedTrial, "delete the trial's folder and run the study again")
        names = dict(zip(("model", "calibration"), map(str, entry.key), strict=False))
        return record.model_copy(update={"trial": record.trial.model_copy(update=names)})

    def scores(self, entry: Entry) -> CapabilityScores:
        """Return the item-level scores and the distance of a finished trial."""
        return load_scores(self.trial(entry.id) / TRIAL_SCORES)

    def error(self, entry: Entry) -> str:
        """Return the error of a failed trial."""
        return _read(
            self.trial(entry.id) / ERROR, Failure, "run the study with --retry-failed"
        ).error

    @contextmanager
    def writing(self, trial: Planned) -> Iterator[Path]:
        """Yield a folder to fill, which becomes the trial's folder if the body succeeds."""
        with atomic_folder(self.trial(trial.id)) as beside:
            write_json(beside / REQUEST, {"label": trial.label, **trial.definition})
            yield beside


def open_store(path: Path) -> Store:
    """Open an existing store."""
    if not path.exists():
        raise InputError(f"there is no study store at {path}: calmix study run makes one")
    index = read_object(path / STORE_INDEX, f"{path} is not a study store: it has no {STORE_INDEX}")
    if index.get("kind") != STORE_KIND:
        raise InputError(f"{path} is not a study store: its {STORE_INDEX} is of another kind")
    if index.get("format") != STORE_FORMAT:
        raise InputError(
            f"store {path} has format {index.get('format')}, but this calmix reads format "
            f"{STORE_FORMAT}: use another folder, or the version of calmix that made it"
        )
    check_links(path)
    return Store(path, _read(path / STORE_INDEX, Index, "run the study in another folder"))


def check_folder(path: Path, inputs: Iterable[object]) -> Index | None:
    """Return the index of the store at `path`, if there is one; raise an `InputError` if the folder
    cannot become a store."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: name a folder for the store")
    if (path / STORE_INDEX).is_file():
        return open_store(path).index
    check_apart(path, inputs)
    check_writable(path / STORE_INDEX)
    left = {f.name for f in path.iterdir()} - set(STORE_PARTS) if path.is_dir() else set()
    if any(not name.startswith(f".{STORE_INDEX}.") for name in left):
        raise InputError(f"{path} is not empty and is not a study store: name another folder")
    return None


def read_results(path: Path | str) -> StudyResults:
    """Read the results of a study so far from its store."""
    store = open_store(Path(path))
    entries = store.index.trials
    states = {entry.id: store.state(entry.id) for entry in entries}
    done = [entry for entry in entries if states[entry.id] == "finished"]
    records = {entry.id: store.result(entry) for entry in done}
    scored = {entry.id: store.scores(entry) for entry in done}
    for model in {records[entry.id].trial.model for entry in done}:
        forms = {scored[e.id].form for e in done if records[e.id].trial.model == model} - {""}
        if len(forms) > 1:
            raise InputError(
                f"{path} has trials of {model} asked in its chat template and others with worked "
                "examples, so the template has changed: run the study in another folder"
            )
    trials = [
        records[one.id].trial.model_copy(update={"distance": scored[one.id].distance})
        for one in done
    ]
    # Each kind of processor scores the dense model itself: take the scores most trials refer to.
    named = Counter((record.trial.model, record.dense) for record in records.values())
    dense = {model: key for (model, key), _ in reversed(named.most_common())}
    dense_scores = {key: load_scores(store.dense(key)) for _, key in named}
    return StudyResults(
        name=store.index.name,
        text=store.index.text,
        planned=len(entries),
        trials=tuple(trials),
        failed=[*states.values()].count("failed"),
        suite=store.index.suite,
        scores={name: one.tasks for name, one in scored.items()},
        dense={label: dense_scores[key].tasks for label, key in dense.items()},
        repeat={label: dense_scores[key].repeat for label, key in dense.items()},
        paired={name: dense_scores[record.dense].tasks for name, record in records.items()},
        dates={name: one.run.get("finished", "") for name, one in records.items()},
        declarations=store.index.declarations,
    )
