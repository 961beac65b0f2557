"""Run generated code in processes that can compute and do nothing else.

`judge.py` runs there: the program in one process, its tests in another that the program cannot
reach. Both belong to an unprivileged user and may read only Python's standard library, by Landlock
or, if the kernel has none, in a private root made by bubblewrap. A seccomp filter ends them at the
first attempt to write a file, start a process, open a connection or reach another process; on macOS
a sandbox profile makes such attempts fail. Without this protection nothing is run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pickle
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from calmix.errors import InputError
from calmix.evaluation import judge

READ_FILE, LIST_FOLDER = 4, 8  # access rights of Landlock
LIBRARY, INTERPRETER = Path(os.__file__).parent.resolve(), Path(sys.executable).resolve()
PACKAGES = "*-packages"  # installed ones, beside the standard library
LIBRARY_FOLDERS = [Path(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")]
OTHERS = "/etc/ld.so.cache /usr/share/zoneinfo /System " + " ".join(
    f"{folder}/{name}" for folder in ("/opt/homebrew", "/usr/local") for name in ("opt", "Cellar")
)
MACOS = """(version 1)(allow default)
(deny file-write* network* process-fork process-exec* mach-lookup signal file-read-data)
(allow signal (target self))(allow file-read-data {})"""


def failure(
    program: str,
    tests: str = "",
    *,
    names: Sequence[str] = (),
    head: str = "",
    seconds: float = 10.0,
) -> str:
    """Run a Python program and its tests; return why it failed, or "" if it passed.

    The tests reach the program only through its functions and classes `names`. Arguments are
    copies, and results are compared as data. Other names come from `head`, which runs before the
    tests. `seconds` limits wall time; CPU time is limited to the next whole second above.

    Raises:
        InputError: the program cannot be confined here.
    """
    prefix, ruleset, profile = _confinement()
    text = program.encode("utf-8", "surrogatepass")
    command = [*prefix, str(INTERPRETER), "-B", "-s", "-S", "-P", judge.__file__]
    command += [str(seconds), str(len(text)), str(ruleset), profile]
    with tempfile.TemporaryFile(prefix="calmix-run-") as source:
        source.write(text + pickle.dumps((head, tests, [*names])))
        source.seek(0)
        with subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            pass_fds=[ruleset] * (ruleset >= 0),
            start_new_session=True,
            env={"PATH": os.defpath, "HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        ) as process:
            try:
                assert process.stdout is not None
                waiting = select.poll()
                waiting.register(process.stdout, select.POLLIN)
                if not waiting.poll(1000 * seconds):
                    return f"still running after {seconds:g} s"
                report = os.read(process.stdout.fileno(), 1000)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    verdict, reason = report[:1], " ".join(report[1:].decode(errors="replace").split())
    if verdict == bytes([judge.REFUSED]):
        raise _refusal(reason)
    if verdict == bytes([judge.PASSED]):
        return ""
    return reason or f"ended early with exit code {process.returncode}"


def _refusal(reason: str) -> InputError:
    return InputError(
        f"generated code cannot be run here: {reason}; or leave out --allow-code-execution"
    )


@functools.cache
def _confinement() -> tuple[list[str], int, str]:
    """Return what confines a program: the command that makes a private root, the descriptor of a
    Landlock ruleset, a profile of macOS. Those not used are empty or -1."""
    paths = _readable()
    if sys.platform == "darwin":
        kinds = {
            path: "subpath" if rights & READ_FILE else "literal"
            for path, rights in paths.items()
            if '"' not in str(path)
        }
        return [], -1, MACOS.format(" ".join(f'({kind} "{path}")' for path, kind in kinds.items()))
    if sys.platform != "linux":
        raise _refusal("it can be confined only on Linux and macOS: use one of them")
    if (ruleset := _landlock(paths)) >= 0:
        return [], ruleset, ""
    if (bwrap := shutil.which("bwrap")) is None:
        raise _refusal(
            "Landlock is missing (it needs Linux 5.13 or later, and some containers block it): "
            "install bubblewrap"
        )
    whole = [INTERPRETER, judge.__file__, *LIBRARY_FOLDERS, LIBRARY]
    whole += [path for path in paths if not {*path.parents} & {*LIBRARY_FOLDERS, LIBRARY}]
    binds = [("--ro-bind-try", str(path), str(path)) for path in whole]
    folders = [
        *LIBRARY.glob(PACKAGES),
        *(f for one in LIBRARY_FOLDERS for f in one.glob(f"python*/{PACKAGES}")),
    ]
    hidden = [("--tmpfs", str(path)) for path in folders]
    user = ["--cap-add", "ALL"] if os.geteuid() == 0 else ["--unshare-user"]
    return (
        [
            *(bwrap, "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", *user),
            *(word for words in (*binds, *hidden) for word in words),
            *("--dev-bind", os.devnull, os.devnull, "--remount-ro", "/"),
        ],
        -1,
        "",
    )


def _readable() -> dict[Path, int]:
    """Return the paths that a program may read, with Landlock's rights: the standard library
    without installed packages, and shared libraries."""
    own, everything = Path(sys.base_prefix, "lib").resolve(), READ_FILE | LIST_FOLDER
    inside = [path for folder in LIBRARY_FOLDERS if folder.is_dir() for path in folder.iterdir()]
    paths = [path for path in inside if not path.name.startswith("python")]
    paths += [path for path in LIBRARY.iterdir() if not path.match(PACKAGES)]
    paths += [*own.glob("*.so*"), *own.glob("*.dylib"), *map(Path, OTHERS.split())]
    rights = {path: everything if path.is_dir() else READ_FILE for path in paths if path.exists()}
    return rights | {LIBRARY: LIST_FOLDER}


def _landlock(paths: dict[Path, int]) -> int:
    """Return the descriptor of a ruleset that allows reading `paths` and no other access to files,
    the network or other processes; -1 if the kernel has no Landlock."""
    library = ctypes.CDLL(None, use_errno=True)
    version = library.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return -1
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    handled = struct.pack("QQQ", rights, 3 * (version >= 4), 3 * (version >= 6))
    ruleset = int(library.syscall(444, handled, ctypes.c_size_t(len(handled)), 0))
    for path, allowed in paths.items():
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, beneath)
        if library.syscall(445, ruleset, 1, rule, 0) != 0:
            raise _refusal(f"Landlock refused {path}: {os.strerror(ctypes.get_errno())}")
        os.close(beneath)
    return ruleset


@functools.cache
def check_sandbox() -> None:
    """Raise an `InputError` if a right program fails here, a wrong one passes, or one reads more
    than Python."""
    program = "import math, fractions\ndef f():\n    return math.gcd(4, 6)\n"
    run = functools.partial(failure, program, names=["f"], seconds=60)  # also on a busy machine
    if reason := run("assert f() == 2\n"):
        raise _refusal(f"a right program fails ({reason})")
    if not run("assert f() == 3\n") or not failure("open('/etc/passwd')"):
        raise _refusal("a wrong program passes")
