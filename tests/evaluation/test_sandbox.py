"""Generated programs: what a right one may do, that anything else fails, and that none gets out."""

import contextlib
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from calmix.errors import InputError
from calmix.evaluation import judge, sandbox
from calmix.evaluation.sandbox import check_sandbox, failure
from tests.evaluation import attempts

ROOT = Path(__file__).parents[2]
LINUX = sys.platform == "linux"

FORKS = "import os\nwhile True:\n  try:\n    os.fork()\n  except OSError:\n    pass"
PROCESS, FILE = "start a process", "write a file"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import math, re, heapq, collections\nprint('x')\nassert math.gcd(4, 6) == 2", None),
        ("import fractions, sys\nassert sys.dont_write_bytecode", None),  # some have no .pyc
        ("import bz2, os\nassert 'SECRET_OF_THE_USER' not in os.environ", None),
        ("while True:\n    pass", "still running"),
        (FORKS, PROCESS),
        ("import subprocess\nsubprocess.run(['true'])", PROCESS),
        ("import os\nos.kill(os.getppid(), 0)", PROCESS),
        ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", "MemoryError"),
        ("import os\nos.open('out', os.O_CREAT | os.O_WRONLY)", FILE),
        ("try:\n    open('out.txt', 'w')\nexcept BaseException:\n    pass", FILE),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "use the network"),
        ("import os\nos._exit(0)", "ended early with exit code 0"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os\nos.abort()", "exit code -6"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("input()", "RuntimeError"),
        ("raise ValueError('\\ud800')", ""),
    ],
)
def test_only_right_programs_pass(source, reason, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    # Programs that end by themselves get enough time even on a busy machine.
    found = failure(source, seconds=0.3 if reason == "still running" else 30)
    assert bool(found) == (reason is not None)
    assert (reason or "") in found
    assert "\n" not in found


def test_set_order_is_fixed():
    source = "raise ValueError(''.join({*'abcdefghij'}))"
    assert len({failure(source) for _ in range(4)}) == 1


def test_no_leftovers_and_bounded_output(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failure(f"open({str(tmp_path / 'target.txt')!r}, 'w').write('x')")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    endless = "import sys\nwhile True: sys.stderr.write('x' * 100_000)"
    assert failure(endless, seconds=1) == "still running after 1 s"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert list(tmp_path.iterdir()) == []


RIGHT = {  # a program and its test
    "types": (
        "from typing import *\ndef f(x: List[int]) -> Optional[int]: return max(x)",
        "f([1, 3]) == 3",
    ),
    "modules": (
        "import collections, heapq, itertools, math, re, random, string, json, functools\n"
        "import dataclasses, datetime, decimal, enum, fractions, statistics, subprocess\n"
        "def f(x): return re.sub('a', 'b', x), math.pi > 3",
        "f('aa') == ('bb', True)",
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(20_000)\ndef f(n): return n and 1 + f(n - 1)",
        "f(9_000) == 9_000",
    ),
    "a long loop": ("def f(n):\n    for i in range(n): pass\n    return i", "f(4_000_000) > 9"),
    "its own main": ("def f(): return 1\nif __name__ == '__main__': f()", "f() == 1"),
    "data of all kinds": (
        "import collections, datetime, fractions\n"
        "class Pair(collections.namedtuple('Pair', 'a b')): pass\n"
        "def f(): return [None, True, 2**70, -.5, 1j, 'ä\\ud800', b'x', {1: {2}}, Pair(1, 2),\n"
        "    collections.Counter('aa'), fractions.Fraction(1, 2), datetime.date(2024, 2, 29)]",
        "f() == [None, True, 2**70, -.5, 1j, 'ä\\ud800', b'x', {1: {2}}, (1, 2), {'a': 2}, .5,"
        " datetime.date(2024, 2, 29)]",
    ),
    "not a number": ("def f(): return float('nan')", "math.isnan(f())"),
    "a generator": (
        "def f(n):\n    while True:\n        yield n\n        n += 1",
        "[one for one, _ in zip(f(3), 'ab')] == [3, 4]",
    ),
    "a class": (
        "class f:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def __len__(self): return 7",
        "(s := f(), s.push(3), s.items, len(s))[2:] == ([3], 7)",
    ),
    "a function of the test": ("def f(g, x): return g(g(x))", "f(lambda x, n=2: x * n, 3) == 12"),
    "an error that is expected": ("def f(x): raise ValueError('no')", "raises(ValueError, f, 1)"),
    "copies of arguments": ("def f(x): x.clear()", "(lambda x: (f(x), x))([1]) == (None, [1])"),
}
HEAD = """
def raises(kind, f, *args):
    try: f(*args)
    except kind: return True
"""


@pytest.mark.parametrize("name", RIGHT)
def test_archive_programs(name):
    program, test = RIGHT[name]
    assert not failure(program, f"assert {test}", names=["f"], head=HEAD, seconds=60)
    assert failure(program, f"assert not ({test})", names=["f"], head=HEAD, seconds=60)


def test_test_names_are_hidden_from_programs():
    """A function that checks comes from the head or from Python."""
    program = "def f(): return 0\ndef same(*_): return True\nabs = lambda _: 0"
    head = "def same(x, y): return x == y"
    for test in ("same(f(), 1)", "abs(f() - 1) < 0.5", "math.isclose(f(), 1)"):
        assert failure(program, f"assert {test}", names=["f"], head=head)
    for test, name in (("other()", "f"), ("g()", "g")):
        reason = failure(program, f"assert {test}", names=[name], seconds=60)
        assert reason.startswith("NameError: name '")


def test_program_error_inside_a_test_loop():
    program, test = "def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 1, [0]))"
    assert failure(program, test, names=["f"], seconds=60).startswith("RuntimeError")


@pytest.fixture(scope="module")
def begin():
    with attempts.surroundings() as text:
        yield text


@pytest.mark.skipif(not LINUX, reason="the attempts are those of Linux")
@pytest.mark.parametrize("name", [*attempts.DEEDS, *attempts.FORGERIES])
def test_escape_attempts_fail(name, begin):
    assert not attempts.succeeds(name, begin)


@pytest.mark.skipif(not LINUX, reason="the attempts are those of Linux")
@pytest.mark.parametrize(
    "call", ["", "frames()", "call(39)" * attempts.X86, "open(os.__file__).read()"]
)
def test_attempts_succeed_without_confinement(call, begin):
    """They fail by what they do, and not by how they begin."""
    text = f"def f(x):\n    {call}\n    return x + 1"
    assert not failure(
        attempts.beginning(text, begin) + text, attempts.TESTS, names=["f"], seconds=60
    )


def readable_python():
    """Another Python, which everyone may read, or None."""
    for name in ("/usr/bin/python3", "/usr/local/bin/python3"):
        new = "import sys; sys.exit(sys.version_info < (3, 11))"
        if Path(name).exists() and not subprocess.run([name, "-c", new], check=False).returncode:
            return name
    return None


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_escape_attempts_fail_as_another_user(user):
    python = readable_python()
    if python is None or not shutil.which("setpriv"):
        pytest.skip("no other Python, or no setpriv")
    files = [
        "calmix/errors.py",
        "calmix/evaluation/judge.py",
        "calmix/evaluation/sandbox.py",
        "tests/evaluation/attempts.py",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        command = [
            python,
            "-c",
            "from calmix.evaluation.sandbox import *; check_sandbox();"
            "print(failure('import os; assert 0, os.getuid()', seconds=60))",
        ]
        if user == "nobody":
            who = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python]
            command = [*who, "-m", "tests.evaluation.attempts"]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.strip() == ("AssertionError: 65534" if user == "root" else "")


@pytest.fixture
def without_landlock(monkeypatch):
    monkeypatch.setattr(sandbox, "_landlock", lambda paths: -1)
    sandbox._confinement.cache_clear()
    yield
    sandbox._confinement.cache_clear()


@pytest.mark.skipif(not LINUX or not shutil.which("bwrap"), reason="needs bubblewrap")
def test_bubblewrap_replaces_landlock(without_landlock, begin):
    check_sandbox.__wrapped__()
    for name in attempts.DEEDS:
        if name.startswith("read"):
            assert not attempts.succeeds(name, begin)


def test_no_program_runs_unconfined(without_landlock, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(
        InputError, match=r"Landlock is missing .* install bubblewrap; or leave out"
    ):
        failure("")
    monkeypatch.setattr(sys, "platform", "freebsd14")
    with pytest.raises(InputError, match="only on Linux and macOS"):
        failure("")


@pytest.mark.skipif(not LINUX, reason="a ruleset of Linux")
def test_failed_confinement_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "_confinement", lambda: ([], 0, ""))  # no ruleset
    with pytest.raises(InputError, match="cannot be run here: syscall 446: "):
        failure("", seconds=60)


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
    ("machine", "calls"),  # read, openat, clone, kill, tgkill, prlimit64, fcntl
    [("x86_64", (0, 257, 56, 62, 234, 302, 72)), ("aarch64", (63, 56, 220, 129, 131, 261, 25))],
)
def test_seccomp_filter_allows_computation(machine, calls):
    reading, opening, cloning, killing, raising, limiting, control = calls
    at, write = 100, os.O_WRONLY
    assert [
        filtered(machine, *one)
        for one in (
            (reading,),
            (opening, at, 0, os.O_CLOEXEC),
            (opening, at, 0, write),
            (cloning,),
            (killing,),
            (raising, 7),
            (raising, 8),
            (limiting, 0),
            (limiting, 8),
            (control, 3, 3),
            (control, 3, 8),
            (434,),
        )
    ] == [
        "allow",
        "allow",
        "kill",
        "kill",
        "kill",
        "allow",
        "kill",
        "allow",
        "kill",
        "allow",
        "kill",
        "error",
    ]
    assert filtered(machine, reading, architecture=1) == "kill"
    with pytest.raises(OSError, match="the processor sparc is none of x86_64"):
        judge.filter_program("sparc", 1)


@pytest.mark.skipif(not LINUX, reason="macOS has no signal at a parent's end")
def test_program_dies_with_calmix(tmp_path):
    """Also where calmix is killed."""
    code = "from calmix.evaluation.sandbox import failure; failure('while True: pass', seconds=300)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as calmix:
        try:
            running = wait(lambda: [one for one in children(calmix.pid) if children(one)])
            judges = running + [two for one in running for two in children(one)]
        finally:
            calmix.kill()
    assert len(judges) == 2
    wait(lambda: not any(Path(f"/proc/{one}").exists() for one in judges))


def children(pid):
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(one) for one in text.split()]
    return []


def wait(condition):
    for _ in range(2400):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("still waiting after 120 s")
