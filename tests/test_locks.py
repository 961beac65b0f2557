"""Locks: one holder, given back, and taken over only from the dead or the silent."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from calmix import locks
from calmix.errors import DiskError
from calmix.locks import Lock, holder_of


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "a.lock"), Lock(tmp_path / "a.lock")
    assert first.acquire()
    assert not second.acquire()
    assert holder_of(first.path) == f"pid {os.getpid()} on {locks.socket.gethostname()}"
    first.release()
    assert holder_of(first.path) is None
    assert second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def dead(path: Path, **changes: object) -> None:
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                             capture_output=True, text=True, check=True)  # fmt: skip
    content = {"token": "t", **locks._place(), "pid": int(process.stdout), "started": 1}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def test_a_dead_process_loses_its_lock(tmp_path: Path) -> None:
    dead(tmp_path / "a.lock")
    lock = Lock(tmp_path / "a.lock")
    assert holder_of(lock.path) is None
    assert lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_number_given_to_another_process_is_not_the_holder(tmp_path: Path) -> None:
    dead(tmp_path / "a.lock", pid=os.getpid(), started=1)
    assert Lock(tmp_path / "a.lock").acquire()


def test_another_machine_is_believed_until_it_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    dead(path, host="elsewhere")
    assert not Lock(path).acquire()
    old = time.time() - locks.SILENCE - 1
    os.utime(path, (old, old))
    assert Lock(path).acquire()


def test_the_time_stamp_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    lock = Lock(tmp_path / "a.lock")
    assert lock.acquire()
    os.utime(lock.path, (1, 1))
    for _ in range(100):
        if lock.path.stat().st_mtime > 1:
            break
        time.sleep(0.02)
    assert lock.path.stat().st_mtime > 1
    lock.release()


def test_a_lock_taken_over_is_not_given_back_by_the_former_holder(tmp_path: Path) -> None:
    first = Lock(tmp_path / "a.lock")
    assert first.acquire()
    dead(first.path, pid=os.getpid(), started=locks._started(os.getpid()))
    first.release()
    assert first.path.exists()


def test_a_lock_is_taken_over_by_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another that wants the same dead lock comes between every two steps of taking it over."""
    path = tmp_path / "a.lock"
    dead(path)
    taken = []

    def between(step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*given: Any) -> Any:
            other = Lock(path)
            with monkeypatch.context() as plain:
                for name, original in steps.items():
                    plain.setattr(locks, name, original)
                taken.append(other.acquire())
            return step(*given)

        return stepped

    steps = {name: getattr(locks, name) for name in ("_holder", "_stale", "_linked")}
    for name, step in steps.items():
        monkeypatch.setattr(locks, name, between(step))
    taken.append(Lock(path).acquire())
    assert sum(taken) == 1


def test_one_that_saw_the_dead_lock_leaves_the_new_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    dead(path)
    slow, fast = Lock(path), Lock(path)
    stale = locks._stale

    def late(seen: Path, holder: dict[str, Any]) -> bool:
        assert stale(seen, holder)
        assert fast.acquire()
        return True

    with pytest.MonkeyPatch.context() as patched:
        calls = iter([late, stale])
        patched.setattr(locks, "_stale", lambda *of: next(calls)(*of))
        assert not slow.acquire()
    assert json.loads(path.read_text(encoding="utf-8"))["token"] == fast._token
    fast.release()


def test_one_killed_in_its_turn_is_waited_for_and_then_forgotten(tmp_path: Path) -> None:
    path, turn = tmp_path / "a.lock", tmp_path / ".a.lock.turn"
    dead(path)
    dead(turn)
    assert not Lock(path).acquire()
    old = time.time() - locks.SILENCE - 1
    os.utime(turn, (old, old))
    assert not Lock(path).acquire()
    assert Lock(path).acquire()


@pytest.mark.parametrize("what", ["boot", "namespace"])
def test_the_number_of_a_process_means_nothing_elsewhere(tmp_path: Path, what: str) -> None:
    """A container may have this host's name, and so may another machine."""
    if what not in locks._place():
        pytest.skip("this system does not tell")
    path = tmp_path / "a.lock"
    dead(path, **{what: "another"})
    assert holder_of(path) is not None
    assert not Lock(path).acquire()
    old = time.time() - locks.SILENCE - 1
    os.utime(path, (old, old))
    assert Lock(path).acquire()


def test_setting_the_clock_ends_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock(tmp_path / "a.lock")
    assert lock.acquire()
    # psutil's time of a process's start counts from the boot time, which moves with the clock.
    began = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: began(self) + 3600)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert not Lock(lock.path).acquire()
    lock.release()


def test_silence_is_told_by_the_clock_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock may be minutes away from that of the machine whose disk it is."""
    dead(tmp_path / "a.lock", host="elsewhere")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not Lock(tmp_path / "a.lock").acquire()


def test_a_dead_process_nobody_has_waited_for_loses_its_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from calmix.locks import Lock\n"
        "print(Lock(Path(sys.argv[1])).acquire(), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    assert not Lock(tmp_path / "a.lock").acquire()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the table
    assert Lock(tmp_path / "a.lock").acquire()
    process.communicate()


def test_many_that_want_a_dead_lock_get_it_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from calmix.locks import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()"
    )
    dead(tmp_path / "a.lock")
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.lock")],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]  # fmt: skip
    answers = [process.stdout.readline().strip() for process in runs if process.stdout]
    for process in runs:
        process.communicate("")
    assert sorted(answers) == ["False", "False", "True"]


def test_a_full_disk_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *text: Any, **how: Any) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DiskError):
        Lock(tmp_path / "one.lock").acquire()
    assert not list(tmp_path.iterdir())
