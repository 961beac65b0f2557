"""The errors a user can cause. Each is one line: what is wrong, where, and what to do.

The command line prints it and ends with exit code 2; anything else raised is a defect of calmix.
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
    """A mistake the user can correct, described in one line."""


class NotKeptError(CalmixError):
    """No candidate keeps what was asked for: a result, not a mistake."""


class InputError(CalmixError):
    """An option, specification or file that cannot be used as given."""


class DiskError(InputError):
    """A place that is full or cannot be written to, which another run may find otherwise."""


class ModelError(CalmixError):
    """A model that cannot be opened or that the engine cannot prune."""


class SourceError(CalmixError):
    """A calibration source that is unknown, unreadable or too small."""


class SolverError(CalmixError):
    """Numbers no solver can work with (not finite, no positive definite Gram matrix)."""


class PassingError(CalmixError):
    """What another run may find otherwise: a device without memory, a process that has ended."""


class MissingExtraError(CalmixError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'calmix[{extra}]'")


# What people call a thing, and what it is called here.
MEANT = {
    "fast": "quick", "faster": "quick", "small": "quick", "full": "standard", "slow": "best",
    "ratio": "sparsity", "amount": "sparsity", "data": "calibration", "dataset": "calibration",
    "nsamples": "rows", "samples": "rows", "seqlen": "length", "gpu": "device", "out": "output",
    "quantize": "prune", "quantise": "prune", "gguf": "export", "benchmark": "evaluate",
    "distill": "recover", "finetune": "recover", "train": "recover", "sample": "calibrate",
}  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the known names closest to `name`, or all of them if none is close."""
    known = sorted(known)
    meant = MEANT.get(name.lower(), name)
    close = [meant] if meant in known else difflib.get_close_matches(name, known, 3, 0.55)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EEXIST, errno.ENOTDIR, errno.ELOOP,
    errno.ENAMETOOLONG,
}  # fmt: skip


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn "no space left" and "not permitted" while writing to `where` into a DiskError's line."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if told := re.search(r"\(os error (\d+)\)", str(error)):  # all that Rust libraries give
            number = number or int(told[1])
        if number in _FULL:
            line = f"no space left on the disk of {where}: free some or choose another folder"
        elif number in _REFUSED:
            line = f"cannot write to {where}: {os.strerror(number or 0)}"
        else:
            raise
        raise DiskError(line) from error
