"""Locks between runners of a shared folder: a file made exclusively, kept alive by its time stamp.

What one machine makes is guarded by `filelock`, by the kernel's own locks. A store may lie on a
network folder, whose runners are on several machines: there those locks may be missing or hold
within one machine only, and nobody could tell who is at work. Hence these.

A lock is stale when its process is gone (told on the same machine, boot and process namespace) or
its time stamp has not moved for `SILENCE` seconds by the file system's clock (told from anywhere).
It is replaced in one step, by one runner at a time, so that of several that want it one gets it. A
runner that was silent and comes back finds its lock taken; both then do the same work and the
first to finish counts: results are never mixed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from calmix.errors import disk_errors

BEAT = 10.0  # seconds between two movements of the time stamp
SILENCE = 120.0


class Lock:
    """A lock that may be held by this process; `acquire` tells whether it is.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free or stale; return whether it was taken."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"token": self._token, **_place(), "pid": os.getpid()}
            content["started"] = _started(os.getpid())
            own = self.path.with_name(f".{self.path.name}.{self._token}")
            try:
                own.write_text(json.dumps(content), encoding="utf-8")
                if not (_linked(own, self.path) or self._take_over(own)):
                    return False
            finally:
                own.unlink(missing_ok=True)
        self._beat = threading.Thread(target=self._keep_alive, daemon=True)
        self._beat.start()
        return True

    def wait(self, seconds: float = 1.0) -> None:
        """Take the lock, waiting for whoever holds it."""
        while not self.acquire():
            time.sleep(seconds)

    def release(self) -> None:
        """Give the lock back; nothing happens if another runner has taken it over."""
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        if self._held:
            self.path.unlink(missing_ok=True)

    @property
    def _held(self) -> bool:
        return (_holder(self.path) or {}).get("token") == self._token

    def _take_over(self, own: Path) -> bool:
        """Put `own` in a stale lock's place; return whether that was done."""
        seen = _holder(self.path)
        if seen is None or not _stale(self.path, seen):
            return False
        turn = self.path.with_name(f".{self.path.name}.turn")
        if not _linked(own, turn):
            if _silent(turn):  # killed in its turn
                turn.unlink(missing_ok=True)
            return False
        try:
            if _holder(self.path) != seen:
                return False
            own.replace(self.path)
        finally:
            turn.unlink(missing_ok=True)
        return True

    def _keep_alive(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                if self._held:
                    os.utime(self.path)


def holder_of(path: Path) -> str | None:
    """Return who holds a lock, as `pid N on HOST`; None if nobody does, or nobody any more."""
    holder = _holder(path)
    if holder is None or _stale(path, holder):
        return None
    return f"pid {holder.get('pid')} on {holder.get('host')}"


def _linked(own: Path, path: Path) -> bool:
    """Make `path` another name of `own`, whole from the start; return whether it was free."""
    links = own.stat().st_nlink
    try:
        os.link(own, path)
    except FileExistsError:
        return own.stat().st_nlink > links  # asked twice, where the network lost the first answer
    return True


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _place() -> dict[str, str]:
    """Return what must be the same for a process number to mean the same process."""
    place = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):  # Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        place |= {"boot": boot.strip(), "namespace": str(Path("/proc/self/ns/pid").readlink())}
    return place


def _started(pid: int) -> float | None:
    """Return when a process began, by a clock that nobody sets; 0 if it has ended, None if unknown.

    psutil counts from the boot time, which moves whenever the system's clock is set.
    """
    if sys.platform != "linux":
        try:
            return psutil.Process(pid).create_time()
        except psutil.Error:
            return None
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # gone, or hidden from this user
        return None
    state, *rest = text.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(rest[18])


def _stale(path: Path, holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if isinstance(pid, int) and all(holder.get(key) == own for key, own in _place().items()):
        if not psutil.pid_exists(pid):
            return True
        if (started := _started(pid)) is not None:
            return started != holder.get("started")
    return _silent(path)


def _silent(path: Path) -> bool:
    """Tell whether a time stamp has not moved for long, by the clock of its file system."""
    try:
        stamp = path.stat().st_mtime
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock-") as file:
            os.utime(file.fileno())
            now = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return False
    except OSError:  # a folder one may only read
        now = time.time()
    return now - stamp > SILENCE
