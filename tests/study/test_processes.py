"""Studies in processes that die: the table is that of an undisturbed run, here and on Ray."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calmix.errors import InputError
from calmix.study import load_study, run_study
from calmix.study.bench import Bench
from calmix.study.cluster import Cluster, _Run, on_ray, places, room
from calmix.study.planning import PROGRAM, host_memory, sizes_of_model, trial_memory
from calmix.study.running import Options
from calmix.study.store import open_store
from calmix.study.trials import plan
from tests.forks import command, run, start, stopped, wait
from tests.study.test_running import Recorder
from tests.study.worker import write_study

TABLES = ("results.csv", "results.parquet")


def states(store: Path) -> list[str]:
    found = open_store(store)
    return [found.state(entry["id"]) for entry in found.entries]


def running_process(store: Path) -> int | None:
    """The process that holds a trial's lock."""
    for lock in (store / "locks").glob("*.lock"):
        if len(lock.stem) == 64:
            try:
                return int(json.loads(lock.read_text(encoding="utf-8"))["pid"])
            except (OSError, ValueError):
                continue
    return None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Path]:
    """A study with trials long enough to be met at work, and its store after a plain run."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_study(folder, tiny_folder, rows=30)
    # In this process, so that what it imports need not be imported in every fork.
    run_study(load_study(path), folder / "store", Recorder())
    assert states(folder / "store") == ["finished"] * 6
    return path, folder / "store"


def kill_in_third_trial() -> None:
    prune, seen = Bench._prune, []

    def pruned(self: Bench, *given: Any) -> Any:
        made = prune(self, *given)
        seen.append(made)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    Bench._prune = pruned  # type: ignore[method-assign]


@pytest.mark.real
def test_a_study_killed_at_work_goes_on_where_it_was(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = undisturbed
    store = tmp_path / "store"
    study = ("study", "run", path, "-o", store)
    stopped(kill_in_third_trial, *study)
    assert states(store).count("finished") == 2
    ended = run(command(*study), tmp_path / "log")
    assert ended.code == 0, ended.errors
    for name in TABLES:
        assert (store / name).read_bytes() == (whole / name).read_bytes()
    assert not list((store / "locks").iterdir())
    assert not [f for f in (store / "trials").iterdir() if f.name.startswith(".")]


@pytest.mark.real
def test_two_runners_on_one_store_share_the_work(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    path, whole = undisturbed
    store = tmp_path / "store"
    act = command("study", "run", path, "-o", store)
    logs = [tmp_path / "a", tmp_path / "b"]
    for child, log in [(start(act, log), log) for log in logs]:
        ended = wait(child, log)
        assert ended.code == 0, ended.errors
    assert states(store) == ["finished"] * 6
    assert run(act, tmp_path / "log").code == 0
    for name in TABLES:
        assert (store / name).read_bytes() == (whole / name).read_bytes()


class Killer(Recorder):
    """Kills the worker it finds at work once the first trial has finished."""

    def __init__(self, store: Path) -> None:
        super().__init__()
        self.store = store
        self.killed: int | None = None

    def finished(self, trial: Any, outcome: Any) -> None:
        while self.killed is None and {"pending", "running"} & set(states(self.store)):
            if (found := running_process(self.store)) is not None and found != os.getpid():
                os.kill(found, signal.SIGKILL)
                self.killed = found


@pytest.mark.real
def test_on_ray_the_table_is_the_same_even_if_a_worker_dies(
    undisturbed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    path, whole = undisturbed
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine never gets round to it
    store = tmp_path / "store"

    def act() -> None:
        seen = Killer(store)
        _, outcome = run_study(load_study(path), store, seen, execute=on_ray(Cluster(workers=2)))
        assert seen.killed is not None
        assert outcome.failed == outcome.elsewhere == {}
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

    ended = run(act, tmp_path / "log")  # Ray leaves threads behind, which no fork may have
    assert ended.code == 0, ended.errors
    assert states(store) == ["finished"] * 6
    for name in TABLES:
        assert (store / name).read_bytes() == (whole / name).read_bytes()


def test_no_machine_gets_more_workers_than_its_memory_holds() -> None:
    nodes = [
        {"CPU": 8, "memory": 40e9, "GPU": 2},
        {"CPU": 32, "memory": 25e9},
        {"CPU": 2, "memory": 90e9},
    ]
    needs = {"CPU": 1, "GPU": 0, "memory": 12e9}
    assert places(nodes, needs) == room(nodes, needs, "a") == 3 + 2 + 2
    assert room(nodes, {**needs, "memory": 0}, "") == 42  # of a model that is not known here
    assert room(nodes, {**needs, "GPU": 0.5}, "a") == 3
    assert room(nodes, {**needs, "CPU": 4, "memory": 30e9}, "a") == 1  # not two halves of one
    with pytest.raises(InputError, match=r"more than 32 CPUs and 2 GPUs, but .* asks for 1 and 4"):
        room(nodes, {**needs, "GPU": 4}, "a")
    line = r"llama wanda 60% needs 50\.0 GB, and the largest machine of the cluster has 40\.0 GB: "
    with pytest.raises(InputError, match=line):
        room(nodes, {"CPU": 4, "GPU": 0, "memory": 50e9}, "llama wanda 60%")


def test_what_a_worker_is_given_is_what_its_trial_takes() -> None:
    study = load_study(Path(__file__).parents[2] / "studies" / "paper-llama31-8b.yaml")
    trials = plan(study)
    label, most = host_memory(study, trials, "cpu")
    (model,) = study.models
    sizes = sizes_of_model(model, study.models[model])
    each = {trial.label: trial_memory(sizes, trial, "cpu") for trial in trials}
    assert most == PROGRAM + max(each.values()) == PROGRAM + each[label]
    # What a GPU prunes passes through the machine's memory once.
    assert host_memory(study, trials, "cuda")[1] == PROGRAM + sizes.weights * sizes.value_bytes
    assert host_memory(study, [], "cpu") == ("", 0)


def test_workers_ask_for_the_memory_of_their_trials(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(write_study(tmp_path, tiny_folder))
    todo: Any = [SimpleNamespace(planned=trial) for trial in plan(study)]
    _, needed = host_memory(study, plan(study), "cpu")
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "memory": 3.5 * needed}}]
    given: dict[str, Any] = {}

    def remote(**options: Any) -> Any:
        given.update(options)
        return lambda worker: SimpleNamespace(remote=worker)

    ray = SimpleNamespace(nodes=lambda: nodes, remote=remote)
    monkeypatch.setitem(sys.modules, "ray", ray)
    store: Any = SimpleNamespace(path=tmp_path)
    seen = Recorder()
    run = _Run(Cluster(workers=4), study, store, todo, Options(), seen)
    assert given == {"num_cpus": 1, "num_gpus": 0, "memory": math.ceil(needed)}
    assert run.workers == 3
    assert [note for note in seen.notes if note.startswith("3 at a time, as a trial may take")]
    nodes[0]["Alive"] = False
    nodes.append({"Alive": True, "Resources": {"CPU": 8.0, "memory": 0.9 * needed}})
    with pytest.raises(InputError, match=r" needs 0\.5 GB, and the largest machine of the cluster"):
        _Run(Cluster(), study, store, todo, Options(), seen)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at"),
        ("nowhere", "is no address of a Ray cluster: write auto, HOST:PORT"),
        ("host:x", "is no address of a Ray cluster"),
    ],
)
def test_an_address_nobody_answers_at(address: str, says: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=says):
        on_ray(Cluster(address))
