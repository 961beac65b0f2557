"""Generated programs: what a right one may do, that anything else fails, and that none gets out."""

import io
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from calmix.evaluation import judge, sandbox
from calmix.evaluation.sandbox import check_sandbox, failure
from tests.evaluation import attempts
from tests.evaluation.helpers import refuses

ROOT = Path(__file__).parents[2]
LINUX = sys.platform == "linux"
needs_linux = pytest.mark.skipif(not LINUX, reason="the attempts are those of Linux")

PROGRAM = """
import collections, heapq, itertools, math, re, random, string, json, functools, sys
import dataclasses, datetime, decimal, enum, fractions, statistics, subprocess
from typing import *
sys.setrecursionlimit(20_000)
class Pair(collections.namedtuple('Pair', 'a b')): pass
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def __len__(self): return 7
def largest(x: List[int]) -> Optional[int]: return max(x)
def substituted(x): return re.sub('a', 'b', x), math.pi > 3
def depth(n): return n and 1 + depth(n - 1)
if __name__ == '__main__': ran = 1
def as_main(): return ran
def data():
    return [None, True, 2**70, -.5, 1j, 'ä\\ud800', b'x', {1: {2}}, Pair(1, 2),
    collections.Counter('aa'), fractions.Fraction(1, 2), datetime.date(2024, 2, 29)]
def nan(): return float('nan')
def count(n):
    while True:
        yield n
        n += 1
def twice(g, x): return g(g(x))
def wrong(x): raise ValueError('no')
def stopped(x): raise StopIteration
def cleared(x): x.clear()
"""
NAMES = [one.split("(")[0].split()[1] for one in PROGRAM.splitlines() if one.startswith("def ")]
HEAD = """
def raises(kind, f, *args):
    try: f(*args)
    except kind: return True
"""
RIGHT = r"""
largest([1, 3]) == 3 | substituted('aa') == ('bb', True) | depth(9_000) == 9_000 | as_main() == 1
data()[:8] == [None, True, 2**70, -.5, 1j, 'ä\ud800', b'x', {1: {2}}]
data()[8:] == [(1, 2), {'a': 2}, .5, datetime.date(2024, 2, 29)] | math.isnan(nan())
[one for one, _ in zip(count(3), 'ab')] == [3, 4] | twice(lambda x, n=2: x * n, 3) == 12
(s := Stack(), s.push(3), s.items, len(s))[2:] == ([3], 7) | raises(ValueError, wrong, 1)
raises(RuntimeError, lambda: all(map(lambda x: stopped(x) == 1, [0]))) | raises(NameError, missing)
(lambda x: (cleared(x), x))([1]) == (None, [1])
"""
FINE = """
import bz2, fractions, os, sys
print('x')
assert sys.dont_write_bytecode and not sys.flags.hash_randomization
assert 'SECRET_OF_THE_USER' not in os.environ
"""


def test_only_right_programs_pass(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    for source, reason in (
        (FINE, None),
        ("import os\nos.fork()", "start a process"),
        ("bytearray(1 << 30)", "MemoryError"),
        ("try:\n    open('out.txt', 'w')\nexcept BaseException:\n    pass", "write a file"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "use the network"),
        ("import os\nos._exit(0)", "ended early with exit code 0"),
        ("raise SystemExit(0)", "exit code 0"),
        ("import os\nos.abort()", "exit code -6"),
        ("def f(:", "SyntaxError"),
        ("input()", "RuntimeError"),
        ("raise ValueError('\\ud800')", ""),
    ):
        found = failure(source, seconds=60)
        assert (bool(found), "\n" in found) == (reason is not None, False)
        assert (reason or "") in found


def test_no_leftovers_and_bounded_output(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failure(f"open({str(tmp_path / 'target.txt')!r}, 'w').write('x')")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    endless = "import sys\nwhile True: sys.stderr.write('x' * 100_000)"
    assert failure(endless, seconds=0.5) == "still running after 0.5 s"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert list(tmp_path.iterdir()) == []


def test_archive_programs():
    right = re.split(r" \| |\n", RIGHT.strip())
    tests = "\n".join(f"assert ({test}) is True, {test!r}" for test in right)
    assert not failure(PROGRAM, tests, names=[*NAMES, "Stack", "missing"], head=HEAD, seconds=60)


def test_test_names_are_hidden_from_programs():
    """A function that checks comes from the head or from Python."""
    program = "def f(): return 0\ndef same(*_): return True\nabs = lambda _: 0"
    head = "def same(x, y): return x == y"
    tests = "assert same(f(), 1) or abs(f() - 1) < 0.5 or math.isclose(f(), 1)"
    assert failure(program, tests, names=["f"], head=head, seconds=60) == "AssertionError"
    found = failure(program, "assert other()", names=["f"], seconds=60)
    assert found.startswith("NameError: name '")


def test_answers_that_are_not_data_are_refused():
    for name in ("posix\ngetpid", "builtins\nexec", "__main__\nJUDGE"):
        load = judge.AnswerUnpickler(io.BytesIO(f"c{name}\n.".encode())).load
        refuses("is not data", load, error=pickle.UnpicklingError)


@needs_linux
def test_escape_attempts_fail():
    assert attempts.survey() == ""


@needs_linux
@pytest.mark.parametrize("name", attempts.FORGERIES)
def test_forgeries_fail(name):
    reason = attempts.forgery(name)
    assert reason
    errors = ("SyntaxError", "NameError", "ImportError", "AttributeError", "still running")
    assert not reason.startswith(errors)


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="only root can become another user")
def test_escape_attempts_fail_as_another_user():
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")  # everyone may read it
    new = "import sys; assert sys.version_info >= (3, 11)"
    if not shutil.which("setpriv") or subprocess.run([python or "false", "-c", new]).returncode:
        pytest.skip("no other Python, or no setpriv")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    files = "calmix/errors.py calmix/evaluation/judge.py calmix/evaluation/sandbox.py"
    program = (
        "from calmix.evaluation.sandbox import *; check_sandbox();"
        "print(failure('import os; assert 0, os.getuid()', seconds=60))"
    )
    with tempfile.TemporaryDirectory() as name:
        for file in (*files.split(), "tests/evaluation/attempts.py"):
            Path(name, file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, Path(name, file))
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        for command, output in (
            ([python, "-c", program], "AssertionError: 65534"),  # as root
            ([*nobody, python, "-m", "tests.evaluation.attempts"], ""),
        ):
            found = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
            assert (found.returncode, found.stderr, found.stdout.strip()) == (0, "", output)


@pytest.fixture
def without_landlock(monkeypatch):
    monkeypatch.setattr(sandbox, "_landlock", lambda paths: -1)
    sandbox._confinement.cache_clear()
    yield
    sandbox._confinement.cache_clear()


@pytest.mark.skipif(not LINUX or not shutil.which("bwrap"), reason="needs bubblewrap")
def test_bubblewrap_replaces_landlock(without_landlock):
    check_sandbox.__wrapped__()
    with attempts.surroundings() as begin:
        reads = [name for name in attempts.DEEDS if name.startswith("read")]
        assert attempts.successes(reads, begin) == ""


def test_no_program_runs_unconfined(without_landlock, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    for platform, says in (
        ("linux", "Landlock is missing .* bubblewrap; or leave out"),
        ("freebsd14", "only on Linux and macOS"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        refuses(says, failure, "")


@needs_linux
def test_failed_confinement_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "_confinement", lambda: ([], 0, ""))  # no ruleset
    refuses("cannot be run here: syscall 446: ", failure, "", seconds=60)


def filtered(machine, number, *arguments, architecture=None):
    """The action of the filter for a system call, by a small interpreter of BPF."""
    code = [*struct.iter_unpack("HBBI", judge.filter_program(machine, 7))]
    known = architecture or judge.PROCESSORS[machine][1]
    data = struct.pack("IIQ6Q", number, known, 0, *arguments, *[0] * (6 - len(arguments)))
    at = value = 0
    while True:
        kind, yes, no, operand = code[at]
        at += 1
        if kind == 0x20:
            (value,) = struct.unpack_from("I", data, operand)
        elif kind == 0x06:
            return {judge.KILL: "kill", judge.ALLOW: "allow"}.get(operand, "error")
        else:
            tests = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}
            at += yes if tests[kind] else no


@pytest.mark.parametrize(
    ("machine", "calls"),
    [("x86_64", (0, 257, 56, 62, 234, 302, 72)), ("aarch64", (63, 56, 220, 129, 131, 261, 25))],
)
def test_seccomp_filter_allows_computation(machine, calls):
    read, openat, clone, kill, tgkill, prlimit64, fcntl = calls
    for action, *tried in (
        ("allow", (read,), (openat, 100, 0, os.O_CLOEXEC), (tgkill, 7), (prlimit64, 0)),
        ("allow", (fcntl, 3, 3)),
        ("kill", (openat, 100, 0, os.O_WRONLY), (clone,), (kill,), (tgkill, 8), (prlimit64, 8)),
        ("kill", (fcntl, 3, 8)),
        ("error", (434,)),
    ):
        assert [filtered(machine, *call) for call in tried] == [action] * len(tried)
    assert filtered(machine, read, architecture=1) == "kill"
    says = "the processor sparc is none of x86_64"
    refuses(says, judge.filter_program, "sparc", 1, error=OSError)


@needs_linux
def test_program_dies_with_calmix():
    """Also where calmix is killed."""
    code = "from calmix.evaluation.sandbox import failure; failure('while True: pass', seconds=300)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as calmix:
        try:
            judges = []
            while len(judges) < 2 or judges[1].cpu_times().user < 0.2:  # until the program runs
                assert calmix.poll() is None
                time.sleep(0.05)
                judges = psutil.Process(calmix.pid).children(recursive=True)
        finally:
            calmix.kill()
    assert psutil.wait_procs(judges, timeout=120)[1] == []
