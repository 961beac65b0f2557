"""Generated code: right programs pass, and every way to go wrong is a plain failure."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calmix.evaluation import sandbox as execution
from calmix.evaluation.sandbox import CodeEval, check_sandbox, code_eval_in_sandbox, run_program


def test_programs_run_at_once_as_the_container_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, most: int) -> None:
            asked.append(most)
            super().__init__(most)

    monkeypatch.setattr(execution, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(execution, "cores", lambda: 3)
    CodeEval().compute(references=["assert f() == 1"], predictions=[["def f(): return 1"]], k=(1,))
    assert asked == [3]


pytestmark = pytest.mark.skipif(os.name != "posix", reason="the limits are POSIX")


@pytest.mark.parametrize(
    "source",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import math, re, heapq, collections, itertools, typing\nassert math.gcd(4, 6) == 2",
        "from typing import List\ndef f(x: List[int]) -> int:\n    return x[0]\nassert f([3]) == 3",
        "print('some output')",
        "import bz2\nassert bz2",  # a module the sandbox has not imported beforehand
    ],
)
def test_right_programs_pass(source: str) -> None:
    assert run_program(source).passed


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True:\n    pass", "still running"),
        ("import time\ntime.sleep(60)", "still running"),
        ("while True:\n    print('x' * 10_000)", "still running"),
        ("import os\nos.fork()", "start a process"),
        (
            "import os\nwhile True:\n  try:\n    os.fork()\n  except OSError:\n    pass",
            "",
        ),
        ("import subprocess\nsubprocess.run(['true'])", "start a process"),
        ("import os\nos.system('true')", "start a process"),
        ("x = [0] * (1 << 31)", "MemoryError"),
        ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", "MemoryError"),
        ("open('out.txt', 'w').write('text')", "write a file"),
        ("from pathlib import Path\nPath('out.txt').write_text('text')", "write a file"),
        ("import os\nos.open('out', os.O_CREAT | os.O_WRONLY)", "write a file"),
        ("try:\n    open('out.txt', 'w')\nexcept BaseException:\n    pass", "write a file"),
        ("import os\nos.remove('x')", "write a file"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "use the network"),
        ("import sys\nsys.exit()", "left early with exit code 0"),
        ("import os\nos._exit(0)", "left early with exit code 0"),
        ("raise SystemExit(3)", "exit code 3"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("def f():\n    return f()\nf()", "RecursionError"),
        ("input()", "RuntimeError"),
        ("import os\nos.kill(os.getppid(), 0)", "start a process"),
        ("raise ValueError('\\ud800')", ""),
    ],
)
def test_everything_else_is_a_plain_failure(source: str, reason: str) -> None:
    # What ends by itself gets time to, however busy the machine is.
    outcome = run_program(source, seconds=1.5 if reason == "still running" else 30)
    assert not outcome.passed
    assert reason in outcome.reason
    assert "\n" not in outcome.reason


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = tmp_path / "target.txt"
    run_program(f"open({str(target)!r}, 'w').write('x')")
    run_program("while True:\n    pass", seconds=0.5)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    assert run_program("import os\nassert 'SECRET_OF_THE_USER' not in os.environ").passed


def test_the_sandbox_checks_itself() -> None:
    check_sandbox()


def test_code_eval_has_the_metrics_interface() -> None:
    scores, results = CodeEval().compute(
        references=["assert add(2, 3) == 5", "assert twice(2) == 4"],
        predictions=[
            ["def add(a, b): return a + b", "def add(a, b): return a * b"],
            ["def twice(x): return x + x", "import sys\nsys.exit(0)"],
        ],
        k=[1],
    )
    assert scores == {"pass@1": 0.5}
    assert [[one.passed for one in rows] for rows in results.values()] == [[True, False]] * 2


def test_the_harness_gets_our_metric_and_only_while_loading() -> None:
    import evaluate

    before = evaluate.load
    with code_eval_in_sandbox():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
    assert evaluate.load is before
