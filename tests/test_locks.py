"""Locks: one holder, given back, and taken over only from the dead or the silent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calmix import locks
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
    content = {"token": "t", "host": locks.socket.gethostname(), "pid": int(process.stdout),
               "started": time.time()}  # fmt: skip
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def test_a_dead_process_loses_its_lock(tmp_path: Path) -> None:
    dead(tmp_path / "a.lock")
    lock = Lock(tmp_path / "a.lock")
    assert holder_of(lock.path) is None
    assert lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_number_given_to_another_process_is_not_the_holder(tmp_path: Path) -> None:
    dead(tmp_path / "a.lock", pid=os.getpid(), started=1.0)
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
    dead(first.path, pid=os.getpid(), started=locks.psutil.Process().create_time())
    first.release()
    assert first.path.exists()


def test_a_lock_made_meanwhile_by_a_faster_runner_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    dead(path)
    slow, fast = Lock(path), Lock(path)
    seen = json.loads(path.read_text(encoding="utf-8"))
    assert fast.acquire()
    slow._set_aside(seen)
    assert not slow.acquire()
    assert json.loads(path.read_text(encoding="utf-8"))["token"] == fast._token
    fast.release()


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
