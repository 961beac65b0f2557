"""Studies whose processes die give the same table as an undisturbed run, locally and on Ray."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from calmix.errors import InputError
from calmix.study import running
from calmix.study.running import check_room, on_ray, run_study
from calmix.study.spec import load_study
from calmix.study.store import SILENCE, open_store, read_results
from tests.forks import run
from tests.study import conftest
from tests.study.conftest import outcomes, states, write_study


@pytest.mark.real
def test_distance_of_a_trial_over_the_archive(tmp_path, tiny_folder):
    """Two items of a task are too few for a total."""
    seen = conftest.run(write_study(tmp_path, tiny_folder), tmp_path / "store", only=["letters*"])
    assert seen.errors == {}
    assert any("no retention" in text for text in seen.notes)
    (trial,) = read_results(tmp_path / "store").trials
    assert set(trial.distance["dimensions"]) == {"general"}
    assert trial.distance["total"]["kl_mean"] > 0


def killer(store, killed):
    """Return a callback that kills a running worker once the first trial has finished."""

    def note(text):
        ended = text.startswith("1/3 ")
        while not killed and ended and {"pending", "running"} & set(states(store)):
            opened_store = open_store(store)
            owners = (opened_store.lock(entry.id).owner for entry in opened_store.index.trials)
            pids = [one.pid for one in owners if one is not None and one.pid != os.getpid()]
            for pid in pids[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    return note


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_folder):
    """A study with trials long enough to be killed, and its store after a plain run."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_study(folder, tiny_folder, rows=12)
    run_study(load_study(path), folder / "store")
    return path, folder / "store"


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("dies", [False, True])
def test_ray_gives_the_same_results_after_worker_loss(undisturbed, tmp_path, monkeypatch, dies):
    pytest.importorskip("ray")
    path, whole = undisturbed
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine may starve it
    store = tmp_path / "store"

    def act():
        killed, ray = [], on_ray(workers=2 if dies else 1)
        more = {"note": killer(store, killed)} if dies else {}
        _, left = run_study(load_study(path), store, execute=ray, **more)
        assert (left, bool(killed)) == ({}, dies)
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

    ended = run(act, tmp_path / "log")  # Ray leaves threads behind, which must not be forked
    assert ended.code == 0, ended.errors
    assert states(store) == ["finished"] * 3
    assert outcomes(store) == outcomes(whole)


def test_trial_too_large_for_the_cluster_is_refused():
    nodes = [{"CPU": 8, "memory": 40e9, "GPU": 2}, {"CPU": 32, "memory": 25e9}]
    for fits in ({"CPU": 1, "GPU": 0.5, "memory": 30e9}, {"CPU": 32, "GPU": 0, "memory": 12e9}):
        check_room(nodes, fits, "a")
    line = r"no machine of the cluster has 9 CPUs, 0 GPUs and 30 GB of memory, which a needs: "
    with pytest.raises(InputError, match=line):
        check_room(nodes, {"CPU": 9, "GPU": 0, "memory": 30e9}, "a")


def test_worker_waits_for_an_expiring_lock(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "check_trial_memory", lambda *_, **__: None)
    monkeypatch.setattr(running, "run_one", lambda *_, wait=0: wait)
    bench = SimpleNamespace(study=None, how={}, close=Mock())
    assert running._on_worker(tmp_path, bench, None) > SILENCE
    bench.close.assert_called_once()


def test_worker_draws_a_set_that_is_not_there(ran, tmp_path, monkeypatch):
    """A worker gets a trial without its parsed calibration."""

    def by_worker(bench, todo, stage, note):
        for trial in todo:
            yield trial, running._on_worker(tmp_path, bench, replace(trial, parsed=None))

    monkeypatch.chdir(tmp_path)
    study = load_study(ran.path)
    _, left = run_study(study, tmp_path / "store", execute=by_worker, only=["mix sparsegpt*"])
    assert left == {}
    assert outcomes(tmp_path / "store") == outcomes(ran.store)[4:5]


@pytest.mark.parametrize(("device", "wanted"), [("auto", 1.0), ("cpu", 0.0)])
def test_gpu_reservation(monkeypatch, device, wanted):
    resources = {"CPU": 8, "GPU": 2, "memory": 40e9}
    ray = Mock(**{"nodes.return_value": [{"Alive": True, "Resources": resources}]})
    ray.remote.side_effect = InterruptedError
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(running, "largest", lambda *_, **how: ("a", 1e9))
    monkeypatch.setattr(running, "resolve_model", Path)
    monkeypatch.setattr(running, "weight_bytes", lambda _: 1)
    models = {"m": SimpleNamespace(name="m")}
    bench = Mock(**{"study.file.models": models}, how={"device": device})
    with pytest.raises(InterruptedError):
        next(on_ray()(bench, ["trial"], Mock(), Mock()))
    assert ray.remote.call_args.kwargs["num_gpus"] == wanted


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "host:x"])
def test_unreachable_ray_address(address):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=f"no Ray cluster answers at '{address}'"):
        on_ray(address)
