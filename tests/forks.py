"""Forks of this process that run a command, or anything else, and may be killed on the way.

A fork needs no second import of torch, and a timer of processor time ends it at the same place
however busy the machine is. A timer whose signal nobody handles ends a process as SIGKILL does: at
once, with nothing tidied up. This process must compute in one thread (`tests/conftest.py`).
"""

import os
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from calmix.cli import main

HANG = 600  # seconds of processor time that no run of these tiny models takes


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: by which signal), what it printed, its CPU seconds."""

    code: int
    errors: str
    seconds: float

    @property
    def line(self):
        """Whether it ended with a one-line error."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(lines) == 1 and "Traceback" not in self.errors


def command(*arguments):
    """Return what runs the command line."""

    def act():
        sys.argv = ["calmix", *map(str, arguments)]
        main()

    return act


def start(act, log, after=None, how="kill"):
    """Fork, act in the child, and return its process id; `log` takes what it prints, and `after` so
    many processor seconds it is ended by a `kill` or an `interrupt`."""
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
        sys.stdout, sys.stderr = (os.fdopen(at, "w", closefd=False) for at in (1, 2))
        if how == "interrupt":
            signal.signal(signal.SIGPROF, signal.default_int_handler)
        else:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
        # torch makes its pool of threads anew after a fork, and two threads at once break that.
        torch.set_num_threads(1)
        signal.setitimer(signal.ITIMER_PROF, HANG if after is None else max(after, 1e-4))
        act()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child, log):
    """Return how a run has ended, once it has."""
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, log.read_text(errors="replace"), usage.ru_utime + usage.ru_stime)


def run(act, log, after=None, how="kill"):
    """Act in a fork, to its end or to the moment `after`."""
    return wait(start(act, log, after, how), log)


def stopped(arm, *arguments):
    """Run the command line in a fork that ends itself by SIGKILL; `arm` has set where."""

    def act():
        arm()
        command(*arguments)()

    with tempfile.TemporaryDirectory() as folder:
        ended = run(act, Path(folder) / "log")
    assert ended.code == -signal.SIGKILL, ended.errors
