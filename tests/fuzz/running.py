"""Run mutations one after the other, and find what is neither read nor refused in one line."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import traceback
import zlib
from collections import Counter
from pathlib import Path

import psutil

from calmix.errors import CalmixError
from tests.fuzz.mutations import mutated
from tests.fuzz.readers import KINDS, make

SECONDS = 10
MEMORY = 1 << 30  # above what the process has before


class HangError(BaseException):
    """It took longer than `SECONDS`."""


def run(folder, count, seed=0, only=None):
    """Run `count` mutations, shared out over the kinds; the same seed gives the same ones.

    The cache must be `folder`/files/cache. Returns how many of each kind were `read` and `refused`
    in one line, and the others by kind and place: their numbers, and the trace of the first.
    """
    make(folder / "files")
    kinds = {name: kind for name, kind in KINDS.items() if only in (None, name)}
    whole = sum(kind.weight for kind in kinds.values())
    read, refused, faults = Counter(), Counter(), {}
    for name, kind in kinds.items():
        path = folder / "files" / kind.file
        raw = path.read_bytes()
        kind.read(folder / "files")
        for number in range(max(1, round(count * kind.weight / whole))):
            rng = random.Random(zlib.crc32(f"{name}/{seed}/{number}".encode()))
            content = mutated(raw, kind.form, rng)
            path.write_bytes(content)
            try:
                with _limited(len(content)):
                    kind.read(folder / "files")
                read[name] += 1
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                if isinstance(error, CalmixError) and str(error).strip():
                    refused[name] += 1
                else:
                    trace = "".join(traceback.format_exception(error))[-3000:]
                    faults.setdefault(f"{name}: {_place(error)}", ([], trace))[0].append(number)
        path.write_bytes(raw)
    return read, refused, faults


@contextlib.contextmanager
def _limited(size):
    """Hold the body to the time and memory that it may take; the alarm wakes Python code alone."""

    def hang(signum, frame):
        raise HangError

    before = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MEMORY + size
    signal.signal(signal.SIGVTALRM, hang)  # of processor time, so that a busy machine is no hang
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _place(error):
    trace = traceback.extract_tb(error.__traceback__)
    ours = next((f for f in reversed(trace) if "/calmix/" in f.filename), None)
    where = "its line" if ours is None else f"{Path(ours.filename).name}:{ours.lineno}"
    return f"{type(error).__name__} at {where}"
