"""Run generated code in a limited subprocess, without files, processes or network.

This guards against accidents, not against an attacker. It uses what the system offers (resource
limits, a separate user and network where permitted, an empty folder), and an audit hook inside the
interpreter ends the program at its first attempt to write a file, start a process or open a
connection. That, a crash, a timeout and an early exit all count as failure. Programs run with
calmix's own interpreter and can import its standard library.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile

from calmix.errors import InputError

# Runs in the child process. Standard input is a line with a token, then the program. The token is
# written back only after the program has run to its end, so `sys.exit(0)` is not a success.
CHILD = r"""
import collections, heapq, itertools, math, os, random, re, resource, sys, typing
seconds, report, memory = float(sys.argv[1]), int(sys.argv[2]), 1 << 30
token, source = sys.stdin.readline(), sys.stdin.read()
limits = {"CPU": int(seconds) + 1, "CORE": 0, "FSIZE": 0, "NOFILE": 32, "AS": memory, "NPROC": 0}
if sys.platform == "darwin":
    del limits["AS"]
if sys.platform == "linux":
    import ctypes
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    # An empty network namespace, if this user may create one.
    if libc.unshare(0x40000000) != 0:
        libc.unshare(0x10000000 | 0x40000000)
try:
    if os.geteuid() == 0:  # root is exempt from NPROC: become nobody, if nobody can read Python
        os.seteuid(65534)
        readable = os.access(os.__file__, os.R_OK, effective_ids=True)
        os.seteuid(0)
        if readable:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
except (OSError, NotImplementedError):
    pass
for name, most in limits.items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (OSError, ValueError):
        pass
FORBIDDEN = (
    "os.fork", "os.forkpty", "os.exec", "os.spawn", "os.posix_spawn", "os.system",
    "os.kill", "os.killpg", "subprocess.", "pty.", "socket.", "ctypes.", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "shutil.", "tempfile.", "mmap.", "ftplib.", "smtplib.", "urllib.",
    "http.", "sqlite3.", "signal.pthread_kill", "_thread.start_new_thread",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def watch(event, arguments, leave=os._exit, isinstance=isinstance, int=int, str=str, any=any):
    if event == "open":
        mode, flags = arguments[1:3]
        if isinstance(mode, str) and any(letter in mode for letter in "wax+"):
            leave(13)
        if isinstance(flags, int) and flags & WRITING:
            leave(13)
    elif event.startswith(FORBIDDEN):
        leave(13)
write = os.write
sys.addaudithook(watch)
sys.argv, sys.stdin = ["program.py"], None
try:
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
except Exception as error:
    write(report, f"{type(error).__name__}: {error}".rstrip(": ").encode()[:200])
    raise
write(report, token.encode())
"""


def failure(source: str, *, seconds: float = 10.0) -> str:
    """Run a Python program and return why it failed, or "" if it ran to its end.

    `seconds` limits wall time; CPU time is limited to the next whole second above.
    """
    token = secrets.token_hex(16)
    reading, writing = os.pipe()  # for the token; the program's own output is discarded
    command = [sys.executable, "-B", "-s", "-P", "-c", CHILD, str(seconds), str(writing)]
    with (
        os.fdopen(reading, "rb", buffering=0) as report,
        tempfile.TemporaryDirectory(prefix="calmix-run-", ignore_cleanup_errors=True) as folder,
    ):
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # it could fill our memory
                cwd=folder, pass_fds=[writing], start_new_session=True,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
                     "PYTHONHASHSEED": "0"},
            )  # fmt: skip
        finally:
            os.close(writing)
        with process:
            try:
                raw = f"{token}\n{source}".encode("utf-8", "surrogatepass")
                process.communicate(raw, timeout=seconds)
            except subprocess.TimeoutExpired:
                return f"still running after {seconds:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        message = " ".join(report.read(200).decode(errors="replace").split())
    if message == token:
        return ""
    if (code := process.returncode) == 13:
        return "tried to write a file, start a process or use the network"
    return message if code and message else f"ended early with exit code {code}"


@functools.cache
def check_sandbox() -> None:
    """Raise an `InputError` if a correct program fails here or a wrong one passes."""
    reason = failure("import math, fractions\nassert math.gcd(4, 6) == 2\n")
    if reason or not failure("assert 1 == 2\n"):
        raise InputError(f"generated code cannot be run here ({reason or 'nothing fails'}): "
                         "leave out --allow-code-execution")  # fmt: skip
