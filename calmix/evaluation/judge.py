"""Judge a program that a model wrote. `sandbox.failure` runs this file as a script.

The script confines itself and forks. The child runs the program, and the parent, the judge, runs
the tests: they call the program's functions through a pipe, get plain data back, and compare it
here. So the program can reach neither the tests nor the verdict. Imports the standard library only.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import importlib
import io
import marshal
import operator
import os
import pickle
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

NOBODY, MEMORY, MESSAGE = 65534, 1 << 30, 1 << 26  # user id; bytes per process and per message
PASSED, FAILED, REFUSED = b"+-!"  # first byte of the report: the verdict, or not confined
BLOCKED = "tried to write a file, start a process, use the network or reach another process"

# Data that a program may return; anything else stays with it and is a `Remote` here.
BASES: Any = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
EXACT = frozenset((type(None), bool, *BASES))
DATA = {  # by module
    "builtins": [base.__name__ for base in BASES] + ["range"],
    "collections": ["deque"],
    "datetime": ["date", "datetime", "time", "timedelta", "timezone"],
    "decimal": ["Decimal"],
    "fractions": ["Fraction"],
}

# System calls that a program may make: number on x86-64, and on arm64 and RISC-V.
ALLOWED = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79,
statx 332 291, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, lseek 8 62, pread64 17 67,
readv 19 65, writev 20 66, mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216,
madvise 28 233, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132,
pause 34 -, restart_syscall 219 128, access 21 -, faccessat 269 48, readlink 89 -,
readlinkat 267 78, getcwd 79 17, getdents64 217 61, dup 32 23, dup2 33 -, dup3 292 24,
sched_yield 24 124, sched_getaffinity 204 123, nanosleep 35 101, clock_nanosleep 230 115,
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153,
getitimer 36 102, setitimer 38 103, alarm 37 -, getpid 39 172, getppid 110 173, gettid 186 178,
getpgid 121 155, getpgrp 111 -, getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getpriority 140 141,
getrusage 98 165, getrlimit 97 163, sysinfo 99 179, uname 63 160, futex 202 98,
set_robust_list 273 99, rseq 334 293, membarrier 324 283, getrandom 318 278, getcpu 309 168,
wait4 61 260, exit 60 93, exit_group 231 94
"""
ABSENT = """
ioctl 16 29, prctl 157 167, umask 95 166, statfs 137 43, fstatfs 138 44, fadvise64 221 223,
epoll_create1 291 20, setfsuid 122 151, setfsgid 123 152
"""
NEW = 424  # from here on numbers are the same on all processors; libraries do without these calls
FLAGS = "open 2 - 1, openat 257 56 2"  # allowed to read: the last number is the argument's place
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # O_TMPFILE
PROCESSORS = {  # column of the numbers, and audit architecture
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
    "riscv64": (1, 0xC00000F3),
}
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000 | 38, 0x7FFF0000  # ENOSYS


def _system(name: str, *arguments: Any) -> None:
    """Call a function of the C library and raise an `OSError` if it fails."""
    values = [ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments]
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*values) < 0:
        raise OSError(f"{name} {arguments[0]}: {os.strerror(ctypes.get_errno())}")


def drop_privileges() -> None:
    """Become nobody, if root, and give up all capabilities. On Linux, where the folders to read are
    limited in another way, nobody may read a Python that only root can."""
    root, linux = os.geteuid() == 0, sys.platform == "linux"
    if linux:
        _system("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        _system("prctl", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    if root:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        except OSError as error:
            raise OSError(f"root may not become nobody ({error}): use an ordinary user") from None
    if linux:
        _system("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
        # CAP_DAC_READ_SEARCH or, in most containers, CAP_DAC_OVERRIDE.
        for mask in (1 << 2, 1 << 1, 0) if root and not _readable() else (0,):
            header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", mask, mask, *[0] * 4)
            with contextlib.suppress(OSError):
                _system("capset", header, data)
                break
    if root and not _readable():
        raise OSError(
            f"the user nobody cannot read {os.__file__}: run calmix as an ordinary user, or with "
            "a Python that everyone may read"
        )


def _readable() -> bool:
    try:
        os.close(os.open(os.__file__, os.O_RDONLY))
    except OSError:
        return False
    return True


def limit(seconds: float) -> None:
    """Limit time, memory, files and processes."""
    limits = {
        "CPU": int(seconds) + 1,
        "CORE": 0,
        "FSIZE": 0,
        "NOFILE": 32,
        "AS": MEMORY,
        "NPROC": 0,
    }
    if sys.platform == "darwin":
        del limits["AS"]  # cannot be set there
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, allowed = resource.getrlimit(kind)
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (most, most))
    signal.alarm(int(seconds) + 2)  # if calmix is killed


def end_with_parent() -> None:
    """Have this process killed when its parent ends."""
    if sys.platform == "linux":
        _system("prctl", 1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


def block_calls(profile: str) -> None:
    """Allow only the system calls of a computation (seccomp), or on macOS what `profile` says."""
    if sys.platform == "darwin":
        _system("sandbox_init", profile.encode(), 0, ctypes.byref(ctypes.c_char_p()))
        return
    code = filter_program(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _system("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def filter_program(machine: str, pid: int) -> bytes:
    """Return the seccomp filter (classic BPF) for a processor and the process `pid`."""
    if machine not in PROCESSORS:
        raise OSError(f"the processor {machine} is none of {', '.join(PROCESSORS)}")
    column, architecture = PROCESSORS[machine]
    load, equal, at_least, any_bit, done = 0x20, 0x15, 0x35, 0x45, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (done, 0, 0, KILL), (load, 0, 0, 0)]

    def add(calls: str, *then: tuple[int, int, int, int]) -> None:
        for call in calls.replace("\n", " ").split(","):
            number = call.split()[1 + column]
            if number != "-":
                code.extend([(equal, 0, len(then), int(number)), *then])

    add(ALLOWED, (done, 0, 0, ALLOW))
    add(ABSENT, (done, 0, 0, ERRNO))
    for call in FLAGS.split(","):
        add(
            call,
            (load, 0, 0, 16 + 8 * int(call.split()[-1])),
            (any_bit, 1, 0, WRITING),
            (done, 0, 0, ALLOW),
            (done, 0, 0, KILL),
        )
    for call, place, values in (
        ("tgkill 234 131", 0, (pid,)),  # to raise a signal in itself
        ("prlimit64 302 261", 0, (0,)),  # its own limits
        ("fcntl 72 25", 1, (0, 1, 2, 3, 1030)),  # duplicates and flags, but not who gets signals
    ):
        tests = [(equal, len(values) - at, 0, value) for at, value in enumerate(values)]
        add(call, (load, 0, 0, 16 + 8 * place), *tests, (done, 0, 0, KILL), (done, 0, 0, ALLOW))
    code += [(at_least, 0, 1, NEW), (done, 0, 0, ERRNO), (done, 0, 0, KILL)]
    return b"".join(struct.pack("HBBI", *one) for one in code)


def send(sink: int, message: bytes) -> None:
    """Write a message, after its length."""
    rest = memoryview(struct.pack("<Q", len(message)) + message)
    while rest:
        rest = rest[os.write(sink, rest) :]


def receive(source: int) -> bytes:
    """Read a message.

    Raises:
        EOFError: the other process has closed the pipe.
        ValueError: the message is too long.
    """
    (length,) = struct.unpack("<Q", read(source, 8))
    if length > MESSAGE:
        raise ValueError(f"a result of {length:,} bytes is too large")
    return read(source, length)


def read(source: int, length: int) -> bytes:
    """Read exactly `length` bytes."""
    parts = []
    while length:
        parts.append(os.read(source, min(length, 1 << 20)))
        if not parts[-1]:
            raise EOFError
        length -= len(parts[-1])
    return b"".join(parts)


# ---- the program's process ----


class ResultPickler(pickle.Pickler):
    """Write a result: data by value, in its basic type, and any other object by its number."""

    objects: ClassVar[list[Any]] = []

    def persistent_id(self, value: Any) -> int | None:
        if type(value) in EXACT or isinstance(value, BASES):
            return None
        kind = value if isinstance(value, type) else type(value)
        if kind.__qualname__ in DATA.get(kind.__module__, ()):
            return None
        self.objects.append(value)
        return len(self.objects) - 1

    def reducer_override(self, value: Any) -> Any:
        for base in BASES:
            if isinstance(value, base) and type(value) is not base:
                return base, (str.__str__(value) if base is str else base(value),)
        return NotImplemented


class RequestUnpickler(pickle.Unpickler):
    """Read a request: objects by name or number, functions of the test by their code."""

    names: ClassVar[dict[str, Any]] = {}

    def persistent_load(self, key: Any) -> Any:
        if isinstance(key, bytes):
            code, defaults = marshal.loads(key)
            return types.FunctionType(code, self.names, None, defaults)
        if isinstance(key, int):
            return ResultPickler.objects[key]
        if key not in self.names:
            raise NameError(f"name '{key}' is not defined")
        return self.names[key]


def packed(*message: Any) -> bytes:
    """Return the bytes of a message of the program."""
    file = io.BytesIO()
    ResultPickler(file, 5).dump(message)
    return file.getvalue()


def serve(source: int, sink: int, text: str) -> None:
    """Run a program, then what its tests ask of it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"], RequestUnpickler.names = module, vars(module)
    sys.argv, sys.stdin = ["program.py"], None

    def run() -> None:
        exec(compile(text, "program.py", "exec"), vars(module))

    def ask(body: bytes) -> Any:
        operation, target, arguments, named = RequestUnpickler(io.BytesIO(body)).load()
        function = getattr(builtins, operation, None) or getattr(operator, operation)
        return function(target, *arguments, **named)

    def answer(action: Callable[..., Any], *arguments: bytes) -> None:
        try:
            message = packed(True, action(*arguments), "")
        except Exception as error:
            message = packed(False, type(error).__name__, str(error)[:200])
        send(sink, message)

    answer(run)
    while True:
        answer(ask, receive(source))


# ---- the judge ----


class Call(pickle.Pickler):
    """Write a request of a test."""

    def persistent_id(self, value: Any) -> Any:
        if type(value) is Remote:
            return value._place
        own = isinstance(value, types.FunctionType) and value.__module__ == "__main__"
        return marshal.dumps((value.__code__, value.__defaults__)) if own else None


class AnswerUnpickler(pickle._Unpickler):
    """Read an answer of the program: only data, and objects that stay there."""

    # BUILD sets attributes, also of a class that the tests use.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BUILD[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in DATA.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not data")
        return getattr(importlib.import_module(module), name)

    def persistent_load(self, key: Any) -> Remote:
        return Remote(key)


class Judge:
    """The judge's end of the pipes, and its report to calmix."""

    def __init__(self, source: int, sink: int, report: int, child: int) -> None:
        self.source, self.sink, self.report, self.child = source, sink, report, child

    def finish(self, reason: str | None) -> NoReturn:
        """Report the verdict and end; None passes. No test can catch this."""
        text = b"" if reason is None else reason.encode(errors="replace")[:200]
        os.write(self.report, bytes([PASSED if reason is None else FAILED]) + text)
        os._exit(0)

    def request(self, operation: str, target: Any, *arguments: Any, **named: Any) -> Any:
        """Have the program's process do an operation of `builtins` or `operator`."""
        file = io.BytesIO()
        Call(file, 5).dump((operation, target, arguments, named))
        try:
            send(self.sink, file.getvalue())
        except BrokenPipeError:
            self.ended()
        return self.answer(operation)

    def answer(self, operation: str = "") -> Any:
        """Return what the program's process answers to an operation, or raise its error."""
        try:
            passed, result, text = AnswerUnpickler(io.BytesIO(receive(self.source))).load()
            if passed is True:
                return result
            if type(result) is not str or type(text) is not str:
                raise TypeError("an error without a name")
        except EOFError:
            self.ended()
        except Exception as error:
            self.finish(f"returned no data: {error}")
        kind = getattr(builtins, result, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind, text = Exception, f"{result}: {text}"
        if kind is StopIteration and operation != "next":  # would end a loop of the test
            kind = RuntimeError
        raised = kind.__new__(kind)
        raised.args = (text,)
        raise raised

    def ended(self) -> NoReturn:
        """Report that the program's process has ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        blocked = sys.platform == "linux" and code == -signal.SIGSYS
        self.finish(BLOCKED if blocked else f"ended early with exit code {code}")

    def run(self, head: str, tests: str, names: list[str]) -> NoReturn:
        """Run the tests and report. `names` are the program's, other names those of `head`."""
        try:
            self.answer()
            space = Names(__name__="__main__")
            exec(compile(head, "head.py", "exec"), space)
            space.update((name, Remote(name)) for name in names)
            exec(compile(tests, "tests.py", "exec"), space)
        except BaseException as error:
            self.finish(f"{type(error).__name__}: {error}".rstrip(": "))
        self.finish(None)


class Names(dict[str, Any]):
    """Names of the tests. Modules of the standard library need no import."""

    def __missing__(self, name: str) -> Any:
        if name in sys.stdlib_module_names:
            return importlib.import_module(name)
        raise KeyError(name)


class Remote:
    """An object in the program's process: one of its names, or a result that is not data. What it
    says of itself decides nothing, so it cannot be compared."""

    _place: str | int
    __slots__ = ("_place",)

    def __init__(self, place: str | int) -> None:
        object.__setattr__(self, "_place", place)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return JUDGE.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        JUDGE.request("setattr", self, name, value)


def _forward(operation: str) -> Callable[..., Any]:
    return lambda self, *args, **named: JUDGE.request(operation, self, *args, **named)


def _refuse(self: Remote, *others: Any) -> NoReturn:
    JUDGE.finish("returned an object that is not data, and a test compares it")


for _name in ("call", "getitem", "iter", "len", "next", "repr", "str"):
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in ("bool", "eq", "ge", "gt", "hash", "le", "lt", "ne"):
    setattr(Remote, f"__{_name}__", _refuse)
JUDGE: Judge


def main() -> None:
    """Read the program and the tests from standard input, and report to standard output."""
    global JUDGE
    seconds, ruleset, profile = float(sys.argv[1]), int(sys.argv[3]), sys.argv[4]
    report, null, source = os.dup(1), os.open(os.devnull, os.O_RDWR), read(0, int(sys.argv[2]))
    os.dup2(null, 1)
    try:
        drop_privileges()
        if ruleset >= 0:  # Landlock
            _system("syscall", 446, ruleset, 0)
            os.close(ruleset)
        requests, answered = os.pipe(), os.pipe()
        end_with_parent()
        child = os.fork()
        if not child:
            os.dup2(null, 0)
            for one in (report, requests[1], answered[0]):
                os.close(one)
            end_with_parent()
        limit(seconds)
        block_calls(profile)
    except (OSError, ValueError) as error:
        os.write(report, bytes([REFUSED]) + str(error).encode())
        os._exit(1)
    if not child:
        serve(requests[0], answered[1], source.decode("utf-8", "surrogatepass"))
    os.close(requests[0])
    os.close(answered[1])
    JUDGE = Judge(answered[0], requests[1], report, child)
    with open(0, "rb") as rest:
        JUDGE.run(*pickle.load(rest))


if __name__ == "__main__":
    main()
