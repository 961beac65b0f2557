"""Run mutations one after the other, and find what is neither read nor refused in one line."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import time
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from calmix.errors import CalmixError
from tests.fuzz.mutations import mutated
from tests.fuzz.readers import KINDS, make

SECONDS = 10
MEMORY = 1 << 30  # above what the process has before


@dataclass
class Found:
    """What became of the mutations.

    Attributes:
        read, refused: how many were taken, and refused in one line.
        faults: by kind and place, the seeds that end there and the trace of the first.
    """

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[list[str], str]] = field(default_factory=dict)


class HangError(BaseException):
    """It took longer than `SECONDS`."""


def run(folder, count, seed=0, only=None):
    """Run `count` mutations, shared out over the kinds; the same seed gives the same ones.

    The cache must be `folder`/files/cache.
    """
    make(folder / "files")
    kinds = {name: kind for name, kind in KINDS.items() if only in (None, name)}
    whole = sum(kind.weight for kind in kinds.values())
    found = Found()
    for name, kind in kinds.items():
        path = folder / "files" / kind.file
        raw = path.read_bytes()
        kind.read(folder / "files")
        for number in range(max(1, round(count * kind.weight / whole))):
            rng = random.Random(zlib.crc32(f"{name}/{seed}/{number}".encode()))
            content = mutated(raw, kind.form, rng)
            path.write_bytes(content)
            outcome = _outcome(kind.read, folder / "files", len(content))
            if outcome is None:
                found.read[name] += 1
            elif isinstance(outcome, CalmixError):
                found.refused[name] += 1
            else:
                _note(found, name, f"{seed}/{number}", outcome)
        path.write_bytes(raw)
    return found


def _outcome(read, folder, size):
    try:
        with _limited(size):
            read(folder)
    except CalmixError as error:
        return error if str(error).strip() else AssertionError("it says nothing")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return error
    return None


@contextlib.contextmanager
def _limited(size):
    """Hold the body to the time and memory that it may take; the alarm wakes Python code alone."""

    def hang(signum, frame):
        raise HangError

    before = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MEMORY + size
    handler = signal.signal(signal.SIGALRM, hang)
    # Processor time, so that a busy machine makes no hang.
    signal.signal(signal.SIGVTALRM, hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    began = time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
    if time.process_time() - began > SECONDS:
        raise HangError


def _note(found, name, which, error):
    trace = traceback.extract_tb(error.__traceback__)
    ours = next((f for f in reversed(trace) if "/calmix/" in f.filename), None)
    where = "its line" if ours is None else f"{Path(ours.filename).name}:{ours.lineno}"
    place = f"{name}: {type(error).__name__} at {where}"
    seeds, _ = found.faults.setdefault(
        place, ([], "".join(traceback.format_exception(error))[-3000:])
    )
    seeds.append(which)
