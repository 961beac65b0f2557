"""Errors that a user can fix. Each is one line: what is wrong, where, and what to do.

The command line prints it and exits with code 2; any other exception is a bug in calmix.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class CalmixError(Exception):
    """An error the user can fix, described in one line."""


class NotKeptError(CalmixError):
    """No candidate keeps what the user requires: a result, not a mistake."""


class InputError(CalmixError):
    """An option, specification or file that cannot be used as given."""


class DiskError(InputError):
    """A disk that is full or not writable; a later run may succeed."""


class ModelError(CalmixError):
    """A model that cannot be opened or that the engine cannot prune."""


class SourceError(CalmixError):
    """A calibration source that is unknown, unreadable or too small."""


class SolverError(CalmixError):
    """Values no solver can use: not finite, or a Gram matrix that is not positive definite."""


class PassingError(CalmixError):
    """A transient failure, such as a device out of memory or a process that died."""


def plain_problem(message: str) -> str:
    """Return what pydantic says of a value in calmix's words."""
    message = message.removeprefix("Value error, ").partition(", unable")[0]
    return message.replace("Input should", "must")


def missing_extra(what: str, extra: str) -> CalmixError:
    """Return the error of a feature whose optional dependency is not installed."""
    return CalmixError(f"{what} needs an optional dependency: pip install 'calmix[{extra}]'")


# Names from other tools, and their equivalents here.
MEANT = {
    "fast": "quick",
    "faster": "quick",
    "small": "quick",
    "full": "standard",
    "slow": "best",
    "ratio": "sparsity",
    "amount": "sparsity",
    "data": "calibration",
    "dataset": "calibration",
    "nsamples": "rows",
    "samples": "rows",
    "seqlen": "length",
    "gpu": "device",
    "out": "output",
    "quantize": "prune",
    "quantise": "prune",
    "gguf": "export",
    "ollama": "gguf",
    "llama.cpp": "gguf",
    "lmstudio": "gguf",
    "sglang": "vllm",
    "benchmark": "evaluate",
    "distill": "recover",
    "finetune": "recover",
    "train": "recover",
    "sample": "calibrate",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known names closest to `name`, or all of them if none is close."""
    known = sorted(known)
    meant = MEANT.get(name.lower(), name)
    close = [meant] if meant in known else difflib.get_close_matches(name, known, 3, 0.55)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EBUSY,
    errno.EEXIST,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn "no space left" and "not permitted" while writing to `where` into a DiskError."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if code := re.search(r"\(os error (\d+)\)", str(error)):  # from Rust libraries
            number = number or int(code[1])
        if number in _FULL:
            line = f"no space left on the disk of {where}: free some or choose another folder"
        elif number in _REFUSED:
            line = f"cannot write to {where}: {os.strerror(number or 0)}"
        else:
            raise
        raise DiskError(line) from error
