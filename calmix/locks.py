"""Locks between runners: a file made exclusively, kept alive by its time stamp.

A lock is stale when its process is gone (told on the same machine) or its time stamp has not
moved for `SILENCE` seconds (told from anywhere). A stale lock is moved aside before a new one is
made, so that of two runners that both want it one gets it. Should both get it after all, they do
the same work and the first to finish counts: results are never mixed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
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
            if not self._create():
                holder = _holder(self.path)
                if holder is None or not _stale(self.path, holder):
                    return False
                self._set_aside(holder)
                if not self._create():
                    return False
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
        holder = _holder(self.path)
        if holder is not None and holder.get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file, whole from the start: written beside, then linked into place."""
        beside = self.path.with_name(f".{self.path.name}.{self._token}")
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }
        beside.write_text(json.dumps(content), encoding="utf-8")
        try:
            os.link(beside, self.path)
        except FileExistsError:
            return False
        finally:
            beside.unlink()
        return True

    def _set_aside(self, seen: dict[str, Any]) -> None:
        aside = self.path.with_name(f".{self.path.name}.{self._token}.stale")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            found = _holder(aside)
            if found is not None and found.get("token") != seen.get("token"):
                # Another runner was faster, and this is its new lock.
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _keep_alive(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def holder_of(path: Path) -> str | None:
    """Return who holds a lock, as `pid N on HOST`; None if nobody does, or nobody any more."""
    holder = _holder(path)
    if holder is None or _stale(path, holder):
        return None
    return f"pid {holder.get('pid')} on {holder.get('host')}"


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _stale(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        try:
            return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1
        except (psutil.NoSuchProcess, KeyError, TypeError):
            return True
    try:
        return time.time() - path.stat().st_mtime > SILENCE
    except FileNotFoundError:
        return False
