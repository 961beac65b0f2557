"""Generated code: right programs pass, and every way to go wrong is a plain failure."""

import os
import resource

import pytest

from calmix.evaluation.sandbox import failure

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the limits are POSIX")
FORKS = "import os\nwhile True:\n  try:\n    os.fork()\n  except OSError:\n    pass"
PROCESS, FILE = "start a process", "write a file"


@pytest.mark.parametrize(
    "source",
    [
        "import math, re, heapq, collections, itertools\nprint('x')\nassert math.gcd(4, 6) == 2",
        "import bz2, os\nassert 'SECRET_OF_THE_USER' not in os.environ",
    ],
)
def test_right_programs_pass(source, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    assert not failure(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True:\n    pass", "still running"),
        ("while True:\n    print('x' * 10_000)", "still running"),
        (FORKS, PROCESS),
        ("import subprocess\nsubprocess.run(['true'])", PROCESS),
        ("import os\nos.kill(os.getppid(), 0)", PROCESS),
        ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", "MemoryError"),
        ("from pathlib import Path\nPath('out.txt').write_text('text')", FILE),
        ("import os\nos.open('out', os.O_CREAT | os.O_WRONLY)", FILE),
        ("try:\n    open('out.txt', 'w')\nexcept BaseException:\n    pass", FILE),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "use the network"),
        ("import os\nos._exit(0)", "left early with exit code 0"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os\nos.abort()", "exit code -6"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("input()", "RuntimeError"),
        ("raise ValueError('\\ud800')", ""),
    ],
)
def test_everything_else_is_a_plain_failure(source, reason):
    # What ends by itself gets time to, however busy the machine is.
    found = failure(source, seconds=0.3 if reason == "still running" else 30)
    assert found
    assert reason in found
    assert "\n" not in found


def test_nothing_is_left_behind_and_what_is_printed_fills_no_memory_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failure(f"open({str(tmp_path / 'target.txt')!r}, 'w').write('x')")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    endless = "import sys\nwhile True: sys.stderr.write('x' * 100_000)"
    assert failure(endless, seconds=1) == "still running after 1 s"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert list(tmp_path.iterdir()) == []
