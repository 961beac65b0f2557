"""Run a study's trials on a Ray cluster, or on a Ray of this machine's own.

Each worker is an actor with a bench of its own; the store, a folder all of them reach, is what
they share. A worker that dies gives its trial back, and another takes it. Each is given the memory
that the largest trial takes by formula, so that no machine gets more of them than it can hold.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from calmix import machine
from calmix.errors import CalmixError, InputError, MissingExtraError
from calmix.models.opening import device_of
from calmix.study.planning import check_memory, host_memory, too_large
from calmix.study.results import Trial
from calmix.study.running import Execute, Observer, Options, Outcome, run_one
from calmix.study.spec import Study, parse_study
from calmix.study.store import Store, open_store
from calmix.study.trials import Resolved

REACH_SECONDS = 5.0
PASSED = 2**27  # bytes: what is too large for a call is in files
AGAIN_SECONDS = 1.0  # before a dead worker's trial is tried again


@dataclass(frozen=True)
class Cluster:
    """Where trials run, and what each is given.

    Attributes:
        address: `auto` for the cluster this machine belongs to, `HOST:PORT` or `ray://HOST:PORT`;
            None for a Ray of this machine's own.
        workers: trials that run at a time; None for as many as there is room for.
        cpus, gpus: of each trial; None means one GPU where the cluster has any.
        retries: how often a trial is begun again after its worker died.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1
    gpus: float | None = None
    retries: int = 2


def on_ray(cluster: Cluster) -> Execute:
    """Return what runs trials on a cluster, for `run_study`.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: the address is none, or nobody answers at it.
    """
    try:
        # Before Ray is imported: it reads them once, and is to tell nobody.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray  # noqa: F401
    except ImportError:
        raise MissingExtraError("running on Ray", "ray") from None
    _check_reach(cluster.address)

    def execute(
        study: Study, store: Store, todo: Sequence[Resolved], options: Options, observer: Observer
    ) -> Outcome:
        if not todo:
            return Outcome()
        with _connected(cluster):
            return _Run(cluster, study, store, todo, options, observer).all()

    return execute


@contextmanager
def _connected(cluster: Cluster) -> Iterator[None]:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if cluster.address is None:
        cores = machine.cores()
        if cluster.workers is not None:
            cores = max(cores, round(cluster.workers * cluster.cpus))
        quiet |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": PASSED}
    try:
        ray.init(address=cluster.address or "local", **quiet)
    except Exception as error:  # Ray raises anything where no cluster answers
        raise _unreachable(cluster.address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reach(address: str | None) -> None:
    """Refuse an address nobody answers at, at once: Ray itself tries for a minute."""
    if address in (None, "auto"):
        return
    assert address is not None
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"'{address}' is no address of a Ray cluster: {error}") from error
    if not host or port is None:
        raise InputError(
            f"'{address}' is no address of a Ray cluster: write auto, HOST:PORT or ray://HOST:PORT"
        )
    try:
        socket.create_connection((host, port), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> InputError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if address is None:
        return InputError(f"Ray does not start on this machine ({reason[:200]})")
    return InputError(
        f"no Ray cluster answers at '{address}' ({reason[:200]}): check the address, or leave it "
        "out to run on this machine"
    )


def places(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """Return how many workers there is room for, machine by machine.

    Args:
        nodes: what each machine has, by Ray's names.
        needs: the same of what each worker is given; none of what is 0.
    """
    asked = {key: need for key, need in needs.items() if need}
    return sum(int(min(node.get(key, 0) // need for key, need in asked.items())) for node in nodes)


def room(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float], label: str) -> int:
    """Do the same, or refuse trials for which there is no room anywhere.

    Args:
        nodes, needs: as for `places`.
        label: of the trial that takes the most memory.

    Raises:
        InputError: no machine has as many CPUs and GPUs, or as much memory.
    """
    able = [node for node in nodes if places([node], {**needs, "memory": 0})]
    if not able:
        most = [max((node.get(key, 0) for node in nodes), default=0) for key in ("CPU", "GPU")]
        raise InputError(
            f"no machine of the cluster has more than {most[0]:g} CPUs and {most[1]:g} GPUs, "
            f"but a trial asks for {needs['CPU']:g} and {needs['GPU']:g}"
        )
    if not (found := places(able, needs)):
        there = max(node.get("memory", 0) for node in able)
        where = "the largest machine of the cluster has"
        raise InputError(too_large(label, needs["memory"], there, where))
    return found


class _Quiet:
    """An observer for the workers: what they find travels in the outcome."""

    def __init__(self) -> None:
        self.found: Trial | None = None

    def begin(self, todo: int, planned: int) -> None: ...

    def started(self, trial: Resolved) -> None: ...

    def stage(self, trial: Resolved, what: str, done: int, total: int) -> None: ...

    def finished(self, trial: Resolved, outcome: Trial) -> None:
        self.found = outcome

    def failed(self, trial: Resolved, error: str) -> None: ...

    def note(self, text: str) -> None: ...


class Worker:
    """A process that runs trials of one study; an actor of Ray."""

    def __init__(
        self, text: str, path: Path, folder: Path, store: Path, options: Options, share: float
    ) -> None:
        if folder.is_dir():  # paths in the study are meant from where it was started
            os.chdir(folder)
        study = parse_study(text, path).study
        if study is None:
            raise InputError(f"{path} names files that this worker does not reach")
        self.store = open_store(store)
        self.study, self.share, self.device = study, share, device_of(options.device)
        self.bench = options.bench(study, self.store)

    def run(self, trial: Resolved) -> tuple[str, Any]:
        """Run one trial; return `finished` and its record, or `failed`, `elsewhere`, `mistake`
        or `done` (by another runner) with a line."""
        outcome, observer = Outcome(), _Quiet()
        try:
            check_memory(self.study, [trial.planned], self.device, self.share)
            run_one(self.bench, self.store, trial, observer, outcome)
        except CalmixError as error:
            return "mistake", str(error)
        if observer.found is not None:
            return "finished", observer.found
        for state, lines in (("failed", outcome.failed), ("elsewhere", outcome.elsewhere)):
            for line in lines.values():
                return state, line
        return "done", ""


class _Run:
    """One run on a connected cluster."""

    def __init__(
        self,
        cluster: Cluster,
        study: Study,
        store: Store,
        todo: Sequence[Resolved],
        options: Options,
        observer: Observer,
    ) -> None:
        import ray

        self.ray = ray
        self.cluster = cluster
        self.observer = observer
        self.outcome = Outcome()
        self.todo = todo
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = cluster.gpus
        if gpus is None:
            gpus = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
        kind = "cuda" if gpus and options.device != "cpu" else "cpu"
        label, memory = host_memory(study, [trial.planned for trial in todo], kind)
        needs = {"CPU": cluster.cpus, "GPU": gpus, "memory": math.ceil(memory)}
        most = room(nodes, needs, label)
        self.workers = min(most, cluster.workers or most)
        if most < min(len(todo), cluster.workers or places(nodes, {**needs, "memory": 0})):
            observer.note(
                f"{most} at a time, as a trial may take {memory / 1e9:.1f} GB of memory ({label})"
            )
        given = {"num_cpus": cluster.cpus, "num_gpus": gpus, "memory": needs["memory"] or None}
        actor: Any = ray.remote(**given)(Worker)
        self.make = actor.remote
        self.given = (
            study.text, study.path.absolute(), Path.cwd(), store.path.absolute(), options,
            min(gpus, 1) or 1,
        )  # fmt: skip

    def all(self) -> Outcome:
        """Run the trials, as many at a time as there are workers; tell of each as it ends."""
        queue = deque((trial, 0.0) for trial in self.todo)
        idle = [self.make(*self.given) for _ in range(min(self.workers, len(self.todo)))]
        running: dict[Any, tuple[Any, Resolved]] = {}
        deaths = Counter[str]()
        while queue or running:
            while queue and idle and queue[0][1] <= time.monotonic():
                trial, _ = queue.popleft()
                worker = idle.pop()
                if not deaths[trial.id]:
                    self.observer.started(trial)
                running[worker.run.remote(trial)] = (worker, trial)
            ended, _ = self.ray.wait(list(running), timeout=AGAIN_SECONDS) if running else ([], [])
            if not running:
                time.sleep(AGAIN_SECONDS / 10)
            for task in ended:
                worker, trial = running.pop(task)
                try:
                    state, found = self.ray.get(task)
                except self.ray.exceptions.RayActorError as error:
                    deaths[trial.id] += 1
                    idle.append(self.make(*self.given))
                    if deaths[trial.id] <= self.cluster.retries:
                        queue.append((trial, 0.0))
                    else:
                        self._lost(trial, error)
                    continue
                idle.append(worker)
                if state == "elsewhere" and deaths[trial.id]:
                    # The dead worker's lock: on another machine it goes stale after a while.
                    queue.append((trial, time.monotonic() + AGAIN_SECONDS))
                else:
                    self._tell(trial, state, found)
        return self.outcome

    def _tell(self, trial: Resolved, state: str, found: Any) -> None:
        label = trial.planned.label
        if state == "mistake":
            raise InputError(found)
        if state == "finished":
            self.outcome.finished.append(label)
            self.observer.finished(trial, found)
        elif state == "failed":
            self.outcome.failed[label] = found
            self.observer.failed(trial, found)
        elif state == "elsewhere":
            self.outcome.elsewhere[label] = found

    def _lost(self, trial: Resolved, error: Exception) -> None:
        line = f"its worker died {self.cluster.retries + 1} times, last: "
        line += next(iter(str(error).strip().splitlines()), type(error).__name__)
        self.outcome.failed[trial.planned.label] = line
        self.observer.failed(trial, line)
