"""Run a study's trials on a Ray cluster: workers on one store, a folder all of them reach.

Each worker gets the memory the largest trial takes by formula, so that no machine gets more of
them than it can hold. Ray restarts a worker that dies and gives it its trial again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calmix import machine
from calmix.errors import CalmixError, InputError, MissingExtraError, first_line
from calmix.models.opening import device_of
from calmix.options import TrialOptions
from calmix.study.bench import Bench
from calmix.study.estimate import check_memory, largest, passing_memory, trial_memory
from calmix.study.running import Ended, Execute, Observer, Outcome, run_one
from calmix.study.spec import Study
from calmix.study.store import Store
from calmix.study.trials import Resolved

REACH_SECONDS = 5.0
PASSED = 2**27  # bytes: what is too large for a call is in files


def on_ray(
    address: str | None = None,
    workers: int | None = None,
    cpus: float = 1,
    gpus: float | None = None,
    retries: int = 2,
) -> Execute:
    """Return what runs trials on a cluster, for `run_study`."""
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
            socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"no Ray cluster answers at '{address}' ({error}): write auto, HOST:PORT or "
                "ray://HOST:PORT, or leave it out to run on this machine"
            ) from error

    def execute(
        study: Study, store: Store, todo: Sequence[Resolved], how: TrialOptions, observer: Observer
    ) -> Outcome:
        if not todo:
            return Outcome()
        try:
            ray.init(address=address or "local", **start)
        except Exception as error:  # Ray raises anything
            raise InputError(
                f"Ray does not start ({first_line(error)}): check --address"
            ) from error
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            given = gpus
            if given is None:
                given = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
            held = passing_memory if given and how.device != "cpu" else trial_memory
            label, memory = largest(study, [trial.planned for trial in todo], "cpu", held)
            most = room(nodes, {"CPU": cpus, "GPU": given, "memory": memory}, label)
            count = min(most, workers or most, len(todo))
            observer.note(f"{count} at a time, each with {memory / 1e9:.1f} GB of memory")
            actor: Any = ray.remote(
                num_cpus=cpus, num_gpus=given, memory=memory or None,
                max_restarts=-1, max_task_retries=retries,
            )(Worker)  # fmt: skip
            shared = Path.cwd(), study, Store(store.path.absolute(), store.index), how
            outcome, died = _run([actor.remote(*shared) for _ in range(count)], todo, observer)
        finally:
            ray.shutdown()
        for trial in todo if died else ():
            if store.state(trial.id) in ("pending", "running"):
                line = f"its worker died {retries + 1} times, last: {died}"
                outcome.add(trial, ("failed", line), observer)
        return outcome

    return execute


def room(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float], label: str) -> int:
    """Return how many workers there is room for, machine by machine."""
    asked = {key: need for key, need in needs.items() if need}
    found = sum(int(min(n.get(key, 0) // need for key, need in asked.items())) for n in nodes)
    if not found:
        raise InputError(
            f"no machine of the cluster has {needs['CPU']:g} CPUs, {needs['GPU']:g} GPUs and "
            f"{needs['memory'] / 1e9:.1f} GB of memory, which {label} takes: use larger machines, "
            "or fewer or shorter rows"
        )
    return found


class Worker:
    """A process that runs trials of one study; an actor of Ray."""

    def __init__(self, folder: Path, study: Study, store: Store, how: TrialOptions) -> None:
        if folder.is_dir():  # paths in the study are relative to where it was started
            os.chdir(folder)
        self.bench, self.device = Bench(study, store, how), device_of(how.device)

    def run(self, trial: Resolved) -> tuple[Resolved, Ended]:
        """Run one trial, and return what came of it."""
        check_memory(self.bench.study, [trial.planned], self.device)
        return trial, run_one(self.bench, trial, Observer())


def _run(workers: list[Any], todo: Sequence[Resolved], observer: Observer) -> tuple[Outcome, str]:
    """Give trials to workers; return what came of them, and how the last worker died, if any."""
    import ray
    from ray.util import ActorPool

    pool, outcome, died = ActorPool(workers), Outcome(), ""
    for trial in todo:
        pool.submit(lambda worker, one: worker.run.remote(one), trial)
    while pool.has_next():
        try:
            trial, ended = pool.get_next_unordered()
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CalmixError):
                raise InputError(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError as error:
            died = first_line(error)
            continue
        outcome.add(trial, ended, observer)
    return outcome, died
