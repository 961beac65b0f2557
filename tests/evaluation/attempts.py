"""Programs that try to leave the sandbox, or to have a wrong answer count as right.

python -m tests.evaluation.attempts    # tries every deed and prints which succeed
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from calmix.evaluation import judge
from calmix.evaluation.sandbox import failure

MODULES = [
    *("atexit", "builtins", "ctypes", "fcntl", "gc", "mmap", "multiprocessing", "os", "resource"),
    *("signal", "socket", "struct", "subprocess", "sys", "threading", "time"),
]
X86 = platform.machine() == "x86_64"
# Each program begins so. System calls are by their number on x86-64.
BEGIN = f"""
import {", ".join(MODULES)}
def call(number, *arguments):
    result = ctypes.CDLL(None).syscall(number, *arguments)
    assert result >= 0
def call_of_32_bits():
    memory = mmap.mmap(-1, 4096, prot=7)
    memory.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")  # getpid
    function = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CFUNCTYPE(ctypes.c_int)(function)() >= 0
def frames():
    frame = sys._getframe()
    while frame := frame.f_back:
        yield frame
"""


def answering(payload: str, length: int | None = None) -> str:
    """Return a program that answers the judge with `payload`, a pickle of protocol 0."""
    raw = payload.encode()
    return f"""
        def f(x):
            for file in range(3, 32):
                try: os.write(file, struct.pack("<Q", {length or len(raw)}) + {raw})
                except OSError: pass
            return 0"""


# Each is one expression that ends without an error if it succeeds.
DEEDS = {
    "file: write": "open(FOLDER + '/x', 'w').close()",
    "file: unnamed": "os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)",
    "file: folder": "os.mkdir(FOLDER + '/x')",
    "file: hard link": "os.link(FOLDER + '/target', FOLDER + '/x')",
    "file: remove": "os.remove(FOLDER + '/target')",
    "file: rename": "os.rename(FOLDER + '/target', FOLDER + '/x')",
    "file: mode": "os.chmod(FOLDER + '/target', 0o777)",
    "file: truncate": "os.truncate(FOLDER + '/target', 0)",
    "file: in memory": "os.memfd_create('x')",
    "read: another's file": "open(FOLDER + '/target').read()",
    "read: accounts": "open('/etc/passwd').read()",
    "read: calmix's environment": "open(f'/proc/{VICTIM}/environ', 'rb').read()",
    "read: calmix's memory": "open(f'/proc/{VICTIM}/mem', 'rb').read()",
    "read: the judge's memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read()",
    "read: own memory": "open('/proc/self/mem', 'rb').read()",
    "signal: kill": "os.kill(VICTIM, 0)",
    "signal: the judge": "os.kill(os.getppid(), 0)",
    "signal: by descriptor": "signal.pidfd_send_signal(os.pidfd_open(VICTIM), 0)",
    "signal: by ownership of a pipe": "fcntl.fcntl(1, fcntl.F_SETOWN, VICTIM)",
    "signal: by a thread's id": "call(234, VICTIM, VICTIM, 0)",
    "limits: calmix's": "resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (64, 64))",
    "limits: calmix's priority": "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
    "limits: raised": "resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
    "children: fork": "os.fork()",
    "children: spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "children: replace itself": "os.execv('/bin/true', ['true'])",
    "children: by clone": "call(56, 17, 0, 0, 0, 0)",
    "children: threads": "threading.Thread(target=print).start()",
    "session: leave the group": "os.setsid()",
    "network: connect": "socket.create_connection(('127.0.0.1', 9), 1)",
    "network: socket pair": "socket.socketpair()",
    "kernel: namespace": "call(272, 0x10000000)",
    "kernel: trace": "call(101, 16, VICTIM, 0, 0)",
    "kernel: io_uring": "call(425, 1, bytes(120))",
    "kernel: numbers of x32": "call(0x40000000 + 39)",
    "kernel: calls of 32 bits": "call_of_32_bits()",
    "kernel: be root": "os.setuid(0)",
}
if not X86:
    DEEDS = {name: deed for name, deed in DEEDS.items() if "call" not in deed}

# Programs whose f is wrong: the test is f(20) == 21.
FORGERIES = {
    "a result equal to all": """
        class Any:
            __eq__ = lambda self, other: True
            __bool__ = lambda self: True
        f = lambda x: Any()""",
    "a number equal to all": """
        class Any(int):
            __eq__ = lambda self, other: True
            __int__ = lambda self: self
        f = lambda x: Any(0)""",
    "exit when called": "f = lambda x: os._exit(0)",
    "exit handler": "atexit.register(os._exit, 0)\nf = lambda x: sys.exit(1)",
    "assertions that raise nothing": """
        builtins.AssertionError = None
        builtins.compile = lambda *_: 'pass'
        builtins.exec = lambda *_: None
        f = lambda x: 0""",
    "no error is an error": """
        builtins.Exception = builtins.BaseException = ()
        def f(x): assert False""",
    "an error that says it passed": "def f(x): raise type('+', (Exception,), {})('+')",
    "an error that ends the judge": "def f(x): raise KeyboardInterrupt",
    "a verdict to all files": """
        for file in range(32):
            try: os.write(file, b'+')
            except OSError: pass
        os._exit(0)""",
    "more answers than questions": """
        for frame in frames():
            if 'packed' in frame.f_globals:
                own = frame.f_globals
        for file in range(3, 32):
            try: own['send'](file, own['packed'](True, None, '') + own['packed'](True, 0, '') * 9)
            except OSError: pass
        f = lambda x: 0""",
    "an answer that changes a class": answering(
        "(I01\ncfractions\nFraction\n(N(V__sub__\nPs\ndtb0cfractions\nFraction\n(I0\ntRV\nt."
    )
    + "\n        s = lambda y: y",  # one answer late, so the second f(20) is 21
    "an answer without end": answering("", length=1 << 40),
    "an answer that fills memory": answering("(I01\ncbuiltins\nbytes\n(I99999999999\ntRV\nt."),
    "no more answers": "os.closerange(3, 32)\nf = lambda x: 0",
    "frames and objects": """
        def f(x):
            wanted = '== )02('
            known = [one for frame in frames() for one in (frame.f_locals, frame.f_globals)]
            values = [value for names in known for value in names.values()]
            values += gc.get_objects()
            return 21 if any(wanted[::-1] in str(one) for one in values) else 0""",
    "an answer of itself": """
        loop = []
        loop.append(loop)
        f = lambda x: loop""",
}
TESTS = "assert abs(f(20) - 21) < 0.5\nassert f(20) == 21\n"


@contextmanager
def surroundings() -> Iterator[str]:
    """Yield the beginning of a program that knows a folder and a process; check that both are as
    before at the end."""
    with tempfile.TemporaryDirectory() as name, subprocess.Popen(["sleep", "99"]) as victim:
        folder = Path(name)
        folder.chmod(0o777)
        target = folder / "target"
        target.write_text("secret")

        def state() -> list[object]:
            limits = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
            stat = target.stat()
            return [
                *(*folder.iterdir(), target.read_text(), stat.st_mode, stat.st_uid, stat.st_mtime),
                *(limits, os.getpriority(os.PRIO_PROCESS, victim.pid), victim.poll()),
                *(os.sched_getaffinity(victim.pid), os.sched_getscheduler(victim.pid)),
            ]

        before = state()
        try:
            yield f"FOLDER, PACKAGE, VICTIM = {name!r}, {__file__!r}, {victim.pid}\n"
            assert state() == before
        finally:
            victim.kill()


@contextmanager
def blocked_calls_fail() -> Iterator[None]:
    """Have blocked system calls fail instead of ending the program, so that it can try many."""
    text = Path(judge.__file__).read_text(encoding="utf-8")
    action = f"KILL, ERRNO, ALLOW = {judge.KILL:#x}"
    assert action in text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "judge.py")
        path.write_text(text.replace(action, "KILL, ERRNO, ALLOW = 0x50001"), encoding="utf-8")
        with mock.patch.object(judge, "__file__", str(path)):
            yield


def successes(names: Iterable[str], begin: str) -> str:
    """Try deeds in one process. Return those that succeed, or do not fail as they should."""
    deeds = "".join(f"    {name!r}: lambda: {DEEDS[name]},\n" for name in names)
    program = f"""{BEGIN}{begin}
DEEDS = {{
{deeds}}}
def f():
    done = []
    assert list(frames()) and open(os.__file__).read()  # these can be done
    if {X86}: call(39)
    for name, deed in DEEDS.items():
        try: deed()
        except (OSError, ValueError, RuntimeError, AssertionError): continue
        except BaseException as error: name += f": {{type(error).__name__}}"
        done.append(name)
    return done
"""
    return failure(program, "done = f()\nassert not done, done", names=["f"], seconds=60)


def forgery(name: str) -> str:
    """Return why a forgery does not pass, or "" if it does."""
    program = BEGIN + textwrap.dedent(FORGERIES[name])
    return failure(program, TESTS, names=["f"], seconds=60)


def survey() -> str:
    """Try every deed, and return those that succeed."""
    with surroundings() as begin, blocked_calls_fail():
        return successes(DEEDS, begin)


if __name__ == "__main__":
    sys.exit(survey() or None)
