"""Run the remaining trials of a study, in this process or by Ray workers that share a store.

The store is a folder that all workers can reach. Ray reserves the estimated memory of the largest
trial for each trial, so that no machine runs more than it can hold, and retries a trial whose
worker died.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout

from calmix import machine
from calmix.errors import CalmixError, DiskError, InputError, first_line, missing_extra, nearest
from calmix.evaluation.scores import describe
from calmix.evaluation.suites import runnable
from calmix.files import check_free, size_text, write_json
from calmix.memory import PROGRAM
from calmix.models.opening import check_models, device_of, resolve_model
from calmix.models.shards import weight_bytes
from calmix.options import TrialOptions
from calmix.study.bench import Bench
from calmix.study.declaration import declaration, declare
from calmix.study.estimate import check_trial_memory, largest
from calmix.study.spec import Study
from calmix.study.store import (
    BEAT,
    ERROR,
    RESULT,
    SILENCE,
    STORE_INDEX,
    Entry,
    Index,
    Store,
    check_folder,
)
from calmix.study.trials import Planned, checkpoint_bytes, planned_trials, resolve_all

OBJECT_STORE = 2**27  # bytes of Ray's object store; large data is passed in files

Note = Callable[[str], None]
TrialTick = Callable[[Planned, str, int, int], None]  # trial, name of the step, amount done, total
# `finished` with the trial, `failed` with the error, or `elsewhere` with the process that runs it.
Ended = tuple[str, Any]
Ends = Iterator[tuple[Planned, Ended]]
Execute = Callable[[Bench, Sequence[Planned], TrialTick, Note], Ends]


def ignored(*_: Any, **__: Any) -> None:
    """Do nothing."""


def run_study(
    study: Study,
    path: Path,
    *,
    note: Note = ignored,
    show: Callable[..., None] = ignored,
    options: TrialOptions | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    retry_failed: bool = False,
    execute: Execute | None = None,
) -> tuple[Store, dict[str, Ended]]:
    """Run the remaining trials of a study and keep the results in the store at `path`.

    `note` receives messages, `show` progress (as `Progress.show`). Returns the store, and by label
    the trials that failed or run in other processes.
    """
    options = options or TrialOptions()
    planned, models = planned_trials(study), [model.name for model in study.file.models.values()]
    files = {file for trial in planned if trial.parsed for file in trial.parsed.files}
    now, index = declaration(study, planned), check_folder(path, [study.path, *models, *files])
    finished = None if index is None or not [*path.glob(f"trials/*/{RESULT}")] else index.name
    declared = declare(study, now, () if index is None else index.declarations, finished)
    runnable(study.suite, options.allow_code_execution, whole=True)
    chosen = {trial.key for trial in chosen_trials(planned, only, skip)}
    if execute is None:  # the devices of a cluster are not known here
        device_of(options.device)
    check_models(*models, trust_remote_code=options.trust_remote_code)
    resolved = resolve_all(study, planned)
    names: dict[str, str] = {}
    for trial in resolved:
        if (first := names.setdefault(trial.id, trial.label)) != trial.label:
            raise InputError(f"'{first}' and '{trial.label}' are the same trial: remove one")
    suite = {**describe(study.suite), "dimensions": list(study.suite.dimensions)}
    entries = [
        Entry(id=t.id, label=t.label, key=list(t.key), set=t.calibration_id) for t in resolved
    ]
    if now.comparisons and index is None:
        note(f"study {study.file.name} {now}")
    store = Store(
        path,
        Index(
            name=study.file.name,
            text=study.text,
            suite=suite,
            trials=entries,
            declarations=declared,
        ),
    )
    before = [] if index is None else index.trials
    stale = [e.label for e in before if e.id not in names and store.state(e.id) == "finished"]
    if stale:
        note(
            f"the study has changed: {len(stale)} finished trials (first: '{stale[0]}') are no "
            f"longer part of it and stay in {path / 'trials'}"
        )
    done = {"finished"} if retry_failed else {"finished", "failed"}
    todo = [
        trial for trial in resolved if trial.key in chosen and store.state(trial.id) not in done
    ]
    check_free(path, checkpoint_bytes(study, todo), "checkpoints take")
    write_json(path / STORE_INDEX, store.index.model_dump())
    if len(todo) < len(resolved):
        note(f"{len(todo)} of {len(resolved)} trials to run")
    ends = dict[str, Ended]()

    def stage(trial: Planned, what: str, done: int, total: int) -> None:
        number = min(len(ends) + 1, len(todo))  # one that another process left may be run again
        text = f"trial {number} of {len(todo)}: {trial.label} {what}".rstrip()
        show(text, done / total if total else None)

    bench = Bench(study, store, options)
    try:
        for trial, ended in (execute or run_locally)(bench, todo, stage, note):
            ends[trial.label] = how, what = ended
            line = f"{how}: {what}"
            if how == "finished":
                line = what.summary
            if how in ("finished", "failed"):
                note(f"{len(ends)}/{len(todo)} {trial.label}: {line}")
    finally:
        bench.close()
    return store, {n: ended for n, ended in ends.items() if ended[0] in ("failed", "elsewhere")}


def chosen_trials(
    trials: Sequence[Planned], only: Sequence[str], skip: Sequence[str]
) -> list[Planned]:
    """Return the trials selected by the patterns of --only and --skip."""

    def matches(trial: Planned, patterns: Sequence[str]) -> bool:
        names = (trial.model, trial.calibration, trial.label)
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    for pattern in [*only, *skip]:
        if not any(matches(trial, [pattern]) for trial in trials):
            known = dict.fromkeys(n for trial in trials for n in (trial.model, trial.calibration))
            raise InputError(f"no trial matches '{pattern}': {nearest(pattern, known)}")
    chosen = [t for t in trials if (not only or matches(t, only)) and not matches(t, skip)]
    if not chosen:
        raise InputError("--only and --skip together leave no trial: relax one of them")
    return chosen


def run_locally(bench: Bench, todo: Sequence[Planned], stage: TrialTick, note: Note) -> Ends:
    """Run trials one after another in this process, except those that another process runs."""
    check_trial_memory(bench.study, todo, **bench.how)
    left, began = [], time.time()
    for trial in todo:
        yield trial, (ended := run_one(bench, trial, stage, note, began))
        left += [trial] if ended[0] == "elsewhere" else []
    for trial in left:  # the other process may have stopped since
        if bench.store.state(trial.id) == "pending":
            yield trial, run_one(bench, trial, stage, note)


def run_one(
    bench: Bench,
    trial: Planned,
    stage: TrialTick,
    note: Note,
    began: float = math.inf,
    wait: float = 0,
) -> Ended:
    """Run one trial under its lock, for which it waits so many seconds, and store its result or its
    error, unless another process has finished it, or has failed since a time."""
    store, progress = bench.store, partial(stage, trial)
    try:
        with store.lock(trial.id).acquire(timeout=wait):
            folder, failed = store.trial(trial.id), store.trial(trial.id) / ERROR
            if (folder / RESULT).is_file():  # finished by another process meanwhile
                return "", None
            if failed.is_file() and failed.stat().st_mtime > began:
                return "", None
            progress("", 0, 1)
            # Not caught: a model that cannot be opened or scored would fail every trial.
            bench.ready(trial.model, progress)
            try:
                return "finished", bench.run(trial, progress, note)
            except DiskError:
                raise
            except Exception as error:
                if (folder / RESULT).is_file():  # by another process, while this one was suspended
                    return "", None
                line = " ".join(str(error).split())
                if not isinstance(error, CalmixError):
                    line = f"{type(error).__name__}: {first_line(error)}"
                record = {"label": trial.label, "error": line, "traceback": traceback.format_exc()}
                with store.writing(trial) as folder:
                    write_json(folder / ERROR, record)
                return "failed", line
    except Timeout:
        return "elsewhere", store.runner(trial.id) or "another process"


def on_ray(
    address: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float | None = None,
    retries: int = 2,
) -> Execute:
    """Return an `execute` for `run_study` that runs trials on a Ray cluster."""
    try:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reads it on import
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
    except ImportError:
        raise missing_extra("running on Ray", "ray") from None
    start: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        cores = max(machine.cores(), round((workers or 0) * cpus))
        start |= {
            "num_cpus": cores,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    elif address != "auto":  # fail at once: Ray itself retries for a minute
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"no Ray cluster answers at '{address}' ({error}): use auto, HOST:PORT or "
                "ray://HOST:PORT, or omit it to run on this machine"
            ) from error

    def execute(bench: Bench, todo: Sequence[Planned], stage: TrialTick, note: Note) -> Ends:
        if not todo:
            return
        try:
            ray.init(address=address or "local", **start)
        except Exception as error:  # Ray raises many kinds
            raise InputError(f"cannot start Ray ({first_line(error)}): check --address") from error
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            on_cpu = bench.how["device"] == "cpu"
            any_gpu = not on_cpu and any(node.get("GPU", 0) >= 1 for node in nodes)
            per_trial = float(any_gpu) if gpus is None else gpus
            label, memory = largest(bench.study, todo, **bench.how | {"device": "cpu"})
            if per_trial and not on_cpu:  # weights only pass through host memory
                names = (model.name for model in bench.study.file.models.values())
                memory = PROGRAM + max(weight_bytes(resolve_model(name)) for name in names)
            check_room(nodes, {"CPU": cpus, "GPU": per_trial, "memory": memory}, label)
            note(f"each trial reserves {size_text(memory)} of memory")
            remote: Any = ray.remote(
                num_cpus=cpus, num_gpus=per_trial, memory=memory, max_retries=retries, max_calls=1
            )(_on_worker)
            bench.store.path = bench.store.path.absolute()
            left, running = list(todo), dict[Any, Planned]()
            while left or running:
                while left and len(running) < (workers or len(todo)):
                    trial = left.pop(0)
                    sent = replace(trial, parsed=None)  # it may hold a set too large for a call
                    running[remote.remote(Path.cwd(), bench, sent)] = trial
                ended = ray.wait(list(running))[0][0]
                trial = running.pop(ended)
                try:
                    yield trial, ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, CalmixError):
                        raise InputError(str(error.cause)) from None
                    raise
                except ray.exceptions.RayError as error:
                    line = f"its worker died {retries + 1} times, last: {first_line(error)}"
                    yield trial, ("failed", line)
        finally:
            ray.shutdown()

    return execute


def check_room(
    nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float], label: str
) -> None:
    """Raise an `InputError` if no machine of a cluster can hold a trial: Ray would wait forever."""
    if not any(all(node.get(key, 0) >= need for key, need in needs.items()) for node in nodes):
        raise InputError(
            f"no machine of the cluster has {needs['CPU']:g} CPUs, {needs['GPU']:g} GPUs and "
            f"{size_text(needs['memory'])} of memory, which {label} needs: use larger machines, "
            "or fewer or shorter rows"
        )


def _on_worker(folder: Path, bench: Bench, trial: Planned) -> Ended:
    """Run one trial in a Ray worker."""
    if folder.is_dir():  # the study's paths are relative to where it was started
        os.chdir(folder)
    check_trial_memory(bench.study, [trial], **bench.how)
    try:  # Ray tries again what ran on a lost machine, whose lock expires
        return run_one(bench, trial, ignored, ignored, wait=SILENCE + BEAT)
    finally:
        bench.close()
