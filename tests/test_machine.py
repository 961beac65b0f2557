"""Memory and cores are limited by the process's control groups."""

import os
from unittest.mock import Mock

import psutil
import pytest
import torch

from calmix import machine, memory
from calmix.models import opening

MIB = 2**20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Fake the files of control groups."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUP", tmp_path / "own")

    def make(own, **files):
        (tmp_path / "own").write_text(own, encoding="utf-8")
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n", encoding="utf-8")

    return make


FREE = {"memory.max": "max", "memory.current": 5, "cpu.max": "max 100000"}
FULL = {"memory.max": 96 * MIB, "memory.current": 48 * MIB, "cpu.max": "100000 100000"}
CACHED = {"memory.current": 64 * MIB, "memory.stat": f"anon 1\ninactive_file {16 * MIB}\nfile 7"}
NESTED = {f"a/b/{name}": value for name, value in FREE.items()}
NESTED |= {f"a/{name}": value for name, value in FULL.items()}


@pytest.mark.parametrize(
    ("own", "files", "limited"),
    [
        ("0::/\n", FULL | CACHED | {"cpu.max": "50000 100000"}, True),
        ("0::/a/b\n", NESTED, True),  # a group within a limited one
        ("", {}, False),
        ("0::/\n", FREE, False),
        ("nonsense\n0::/../..\n", {"memory.max": "what", "cpu.max": ""}, False),
    ],
)
def test_container_and_host_limits(groups, own, files, limited):
    groups(own, **files)
    (free, total), usable = machine.host_memory(), machine.cores()
    if limited:
        assert (free, total, usable) == (48 * MIB, 96 * MIB, 1)
        return
    assert (total, usable) == (psutil.virtual_memory().total, len(os.sched_getaffinity(0)))
    assert 0 < free <= total


def test_device_memory(monkeypatch):
    values = {"mem_get_info": (50, 200), "memory_allocated": 30, "memory_reserved": 70}
    backend = Mock(**{f"{key}.return_value": value for key, value in values.items()})
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    assert memory.device_memory(torch.device("cuda", 1)) == (30, 90, 200)
    stored, free, total = memory.device_memory(torch.device("cpu"))
    assert 0 < stored < free + stored
    assert total is None


@pytest.mark.parametrize(("asked", "threads"), [(None, 2), ("8", 8)])
def test_thread_count_in_a_container(groups, monkeypatch, asked, threads):
    groups("0::/\n", **{"cpu.max": "200000 100000"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    now = [8]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    opening.device_of("cpu")
    assert now[-1] == threads
