"""Mutations of every kind of file: each is read, or refused in one line, in little time and memory.

`make test` tries a few of each, `make test-long` some ten thousand; CALMIX_SEED sets the seed.
"""

import contextlib
import os
import random
import resource
import signal
import zlib

import psutil
import pytest

from calmix.errors import CalmixError
from tests.fuzz.mutations import mutated
from tests.fuzz.readers import KINDS, make

EACH = 450 if os.environ.get("CALMIX_LONG") else 6
SECONDS = 10
MEMORY = 1 << 30  # above what the process has before


class HangError(BaseException):
    """It took longer than `SECONDS`."""


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """A folder of good files, with its own cache."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALMIX_CACHE", str(folder / "cache"))
        make(folder, made)
        yield folder


@contextlib.contextmanager
def limited(size):
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


@pytest.mark.parametrize("name", KINDS)
def test_fuzzed_files_are_read_or_refused(files, name):
    kind, path, refused = KINDS[name], files / KINDS[name].file, 0
    raw = path.read_bytes()
    kind.read(files, path)
    count, seed = max(1, round(EACH * kind.weight)), os.environ.get("CALMIX_SEED", "0")
    for number in range(count):
        rng = random.Random(zlib.crc32(f"{name}/{seed}/{number}".encode()))
        content = mutated(raw, kind.form, rng)
        path.write_bytes(content)
        try:
            with limited(len(content)):
                kind.read(files, path)
        except BaseException as error:
            if not (isinstance(error, CalmixError) and str(error).strip()):
                error.add_note(f"{name}, mutation {number}")
                raise
            refused += 1
        finally:
            path.write_bytes(raw)
    assert refused or count < 100, "mutations that damage nothing test nothing"
