"""The errors a user can cause. Each is one line: what is wrong, where, and what to do.

The command line prints the line and ends with exit code 2. Everything else that is raised is
a defect of calmix and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class CalmixError(Exception):
    """A mistake the user can mend, told in one line."""


class InputError(CalmixError):
    """An option, specification or file that cannot be used as given."""


class ModelError(CalmixError):
    """A model that cannot be opened or that the engine cannot prune."""


class SourceError(CalmixError):
    """A calibration source that is unknown, unreadable or too small."""


class AssetError(CalmixError):
    """A data archive that is missing, damaged or cannot be fetched."""


class SolverError(CalmixError):
    """Numbers no solver can work with (not finite, no positive definite Gram matrix)."""


class MissingExtraError(CalmixError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'calmix[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the known names closest to `name`, or all of them if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}"


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn "no space left" and "not permitted" while writing to `where` into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(_no_space(where)) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"cannot write to {where}: {error.strerror}") from error
        raise
    except Exception as error:
        # safetensors reports a full disk through an exception class of its own.
        if "os error 28" in str(error) or "No space left" in str(error):
            raise InputError(_no_space(where)) from error
        raise


def _no_space(where: Path) -> str:
    return f"no space left on the disk of {where}: free some or choose another folder"
