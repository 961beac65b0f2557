"""Run the command line in forks of this process, and end them at moments counted in processor time.

A fork needs no second import of torch, and a timer of processor time ends it at the same place
however busy the machine is. A timer whose signal nobody handles ends a process as SIGKILL does: at
once, with nothing tidied up.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HANG = 600  # seconds of processor time that no run of these tiny models takes


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: by which signal), its error stream, its CPU seconds."""

    code: int
    errors: str
    seconds: float

    @property
    def line(self) -> bool:
        """Whether it ended with one line that says what is wrong."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(lines) == 1 and "Traceback" not in self.errors


def start(arguments: Sequence[object], log: Path, after: float | None, how: str) -> int:
    """Fork, run the command line in the child, and return its process id.

    Args:
        arguments: of the command line.
        log: file that takes what it prints.
        after: processor seconds to end it after; None lets it end by itself.
        how: `kill` or `interrupt`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if how == "interrupt":
            signal.signal(signal.SIGPROF, signal.default_int_handler)
        else:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, HANG if after is None else max(after, 1e-4))
        from calmix.cli import main

        sys.argv = ["calmix", *map(str, arguments)]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, log: Path) -> Ended:
    """Return how a run has ended, once it has."""
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, log.read_text(errors="replace"), usage.ru_utime + usage.ru_stime)


def run(
    arguments: Sequence[object], log: Path, after: float | None = None, how: str = "kill"
) -> Ended:
    """Run the command line to its end, or to the moment `after`."""
    return wait(start(arguments, log, after, how), log)


def tree(folder: Path, without: Sequence[str] = ()) -> Mapping[str, bytes]:
    """Return every file below a folder by its path, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }
