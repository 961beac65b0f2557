"""Run a study: what is left of its trials, in this process or by Ray workers on one store.

A store is a folder that all workers reach. Each trial gets the memory the largest takes by
formula, so that no machine runs more of them than it can hold. Ray runs a trial whose worker died
again.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout

from calmix import machine
from calmix.errors import CalmixError, DiskError, InputError, MissingExtraError, first_line, nearest
from calmix.evaluation.evaluate import runnable
from calmix.files import check_free, write_json
from calmix.models import resolve_model
from calmix.models.opening import check_models, device_of
from calmix.models.shards import weight_bytes
from calmix.options import TrialOptions
from calmix.study.bench import Bench
from calmix.study.estimate import PROGRAM, check_memory, largest
from calmix.study.export import read_results, write_table
from calmix.study.spec import Study
from calmix.study.store import ERROR, INDEX, RESULT, Store, check_folder, store_of
from calmix.study.trials import Planned, checkpoint_bytes, plan, resolve_all

PASSED = 2**27  # bytes Ray may pass in calls: what is too large for a call is in files

Note = Callable[[str], None]
Stage = Callable[[Planned, str, int, int], None]  # what of a trial is done; how much, of how much
# `finished` with the trial, `failed` with the error, or left to what runs it `elsewhere`.
Ended = tuple[str, Any]
Ends = Iterator[tuple[Planned, Ended]]
Execute = Callable[[Bench, Sequence[Planned], Stage, Note], Ends]


def ignored(*_: Any, **__: Any) -> None:
    """Say nothing of a run."""


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
    """Run what is left of a study and keep it in the store at `path`.

    Lines about it go to `note`, and what is done now to `show`, as to `Progress.show`. Returned are
    the store, and by label the trials that failed or are left to other processes.
    """
    options = options or TrialOptions()
    planned, models = plan(study), [model.name for model in study.file.models.values()]
    files = {file for trial in planned if trial.asked for file in trial.asked.files}
    before = check_folder(path, [study.path, *models, *files])
    runnable(study.suite, options.allow_code_execution, whole=True)
    chosen = {trial.key for trial in chosen_trials(planned, only, skip)}
    if execute is None:  # a cluster has devices of its own
        device_of(options.device)
    check_models(*models, trust_remote_code=options.trust_remote_code)
    resolved = resolve_all(study, planned)
    names: dict[str, str] = {}
    for trial in resolved:
        if (first := names.setdefault(trial.id, trial.label)) != trial.label:
            raise InputError(f"'{first}' and '{trial.label}' are the same trial: name it once")
    store = store_of(path, study, resolved)
    stale = [e.label for e in before if e.id not in names and store.state(e.id) == "finished"]
    if stale:
        note(
            f"the study has changed: {len(stale)} finished trials, first '{stale[0]}', are no "
            f"longer asked for and stay in {path / 'trials'}"
        )
    left = [trial for trial in resolved
            if trial.key in chosen and store.state(trial.id) != "finished"]  # fmt: skip
    check_free(path, checkpoint_bytes(study, left), "checkpoints take")
    write_json(path / INDEX, store.index.model_dump())
    todo = [trial for trial in left if retry_failed or store.state(trial.id) != "failed"]
    if len(todo) < len(resolved):
        note(f"{len(todo)} of {len(resolved)} trials to run")
    ends, seconds = dict[str, Ended](), list[float]()

    def stage(trial: Planned, what: str, done: int, total: int) -> None:
        named = f"trial {len(ends) + 1} of {len(todo)}: {trial.label} {what}".rstrip()
        ahead = (len(todo) - len(ends)) * sum(seconds) / max(1, len(seconds))
        show(named, done / total if total else None, left=ahead or None)

    for trial, ended in (execute or run_locally)(Bench(study, store, options), todo, stage, note):
        ends[trial.label] = how, what = ended
        said = f"{how}: {what}"
        if how == "finished":
            seconds.append(what.seconds.get("total", 0.0))
            said = what.told
        if how in ("finished", "failed"):
            note(f"{len(ends)}/{len(todo)} {trial.label}: {said}")
    write_table(read_results(path), path)
    return store, {n: ended for n, ended in ends.items() if ended[0] in ("failed", "elsewhere")}


def chosen_trials(
    trials: Sequence[Planned], only: Sequence[str], skip: Sequence[str]
) -> list[Planned]:
    """Return the trials that patterns choose."""

    def matches(trial: Planned, patterns: Sequence[str]) -> bool:
        names = (trial.model, trial.calibration, trial.label)
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    for pattern in [*only, *skip]:
        if not any(matches(trial, [pattern]) for trial in trials):
            known = dict.fromkeys(n for trial in trials for n in (trial.model, trial.calibration))
            raise InputError(f"no trial matches '{pattern}': {nearest(pattern, known)}")
    kept = [t for t in trials if (not only or matches(t, only)) and not matches(t, skip)]
    if not kept:
        raise InputError("--only and --skip together leave no trial")
    return kept


def run_locally(bench: Bench, todo: Sequence[Planned], stage: Stage, note: Note) -> Ends:
    """Run trials one after another in this process; what another one runs is left to it."""
    check_memory(bench.study, todo, **bench.how)
    left = []
    for trial in todo:
        yield trial, (ended := run_one(bench, trial, stage, note))
        left += [trial] if ended[0] == "elsewhere" else []
    for trial in left:  # what others ran may have been given up meanwhile
        if bench.store.state(trial.id) == "pending":
            yield trial, run_one(bench, trial, stage, note)


def run_one(bench: Bench, trial: Planned, stage: Stage, note: Note) -> Ended:
    """Run one trial under its lock and keep what comes of it, a failure too."""
    store, said = bench.store, partial(stage, trial)
    try:
        with store.lock(trial.id).acquire(timeout=0):
            if (store.trial(trial.id) / RESULT).is_file():  # finished a moment ago
                return "", None
            said("", 0, 1)
            # A model that does not open or cannot be scored fails every trial alike.
            bench.ready(trial.model, said)
            try:
                return "finished", bench.run(trial, said, note)
            except DiskError:
                raise
            except Exception as error:
                line = " ".join(str(error).split())
                if not isinstance(error, CalmixError):
                    line = f"{type(error).__name__}: {first_line(error)}"
                told = {"label": trial.label, "error": line}
                with store.writing(trial) as folder:
                    write_json(folder / ERROR, told | {"traceback": traceback.format_exc()})
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
    """Return what runs trials on a Ray cluster, for `run_study`."""
    try:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported, which reads it once
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
    except ImportError:
        raise MissingExtraError("running on Ray", "ray") from None
    start: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        cores = max(machine.cores(), round((workers or 0) * cpus))
        start |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": PASSED}
    elif address != "auto":  # at once: Ray itself tries for a minute
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"no Ray cluster answers at '{address}' ({error}): write auto, HOST:PORT or "
                "ray://HOST:PORT, or leave it out to run on this machine"
            ) from error

    def execute(bench: Bench, todo: Sequence[Planned], stage: Stage, note: Note) -> Ends:
        if not todo:
            return
        try:
            ray.init(address=address or "local", **start)
        except Exception as error:  # Ray raises anything
            line = f"Ray does not start ({first_line(error)}): check --address"
            raise InputError(line) from error
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            any_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
            given = float(any_gpu) if gpus is None else gpus
            label, memory = largest(bench.study, todo, **bench.how | {"device": "cpu"})
            if given and bench.how["device"] != "cpu":  # weights only pass through memory
                names = (model.name for model in bench.study.file.models.values())
                memory = PROGRAM + max(weight_bytes(resolve_model(name)) for name in names)
            check_room(nodes, {"CPU": cpus, "GPU": given, "memory": memory}, label)
            note(f"each trial is given {memory / 1e9:.1f} GB of memory")
            remote: Any = ray.remote(
                num_cpus=cpus, num_gpus=given, memory=memory, max_retries=retries, max_calls=1
            )(_on_worker)
            bench.store.path = bench.store.path.absolute()
            left, at_work = list(todo), dict[Any, Planned]()
            while left or at_work:
                while left and len(at_work) < (workers or len(todo)):
                    trial = left.pop(0)
                    sent = replace(trial, asked=None)  # which may hold a set: too large for a call
                    at_work[remote.remote(Path.cwd(), bench, sent)] = trial
                ended = ray.wait(list(at_work))[0][0]
                trial = at_work.pop(ended)
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
    """Refuse trials that no machine of a cluster can hold: Ray would wait for one that can."""
    if not any(all(node.get(key, 0) >= need for key, need in needs.items()) for node in nodes):
        raise InputError(
            f"no machine of the cluster has {needs['CPU']:g} CPUs, {needs['GPU']:g} GPUs and "
            f"{needs['memory'] / 1e9:.1f} GB of memory, which {label} takes: use larger machines, "
            "or fewer or shorter rows"
        )


def _on_worker(folder: Path, bench: Bench, trial: Planned) -> Ended:
    """Run one trial in a process of Ray's."""
    if folder.is_dir():  # paths in the study are relative to where it was started
        os.chdir(folder)
    check_memory(bench.study, [trial], **bench.how)
    return run_one(bench, trial, ignored, ignored)
