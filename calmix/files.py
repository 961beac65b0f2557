"""Files and folders: the cache, hashes, and writing that never leaves half a result behind."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock

from calmix.errors import InputError, disk_errors

PARTIAL, OLD = "partial-", "old-"  # hidden beside a result: what is to become it, what it was


def cache_dir() -> Path:
    """Return the cache folder: `CALMIX_CACHE`, else `calmix` under `XDG_CACHE_HOME` or ~/.cache."""
    if named := os.environ.get("CALMIX_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "calmix"


def user_path(text: str) -> Path:
    """Return what a user wrote as a path, with `~` for the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of a user there is none of
        return Path(text)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that others may have written.

    Raises:
        ValueError: it is no JSON, or nested more deeply than anything calmix writes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """Return the JSON object a file holds.

    Raises:
        InputError: the line `missing` where there is no file; or it holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(missing) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: it is no JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, beside `path` first and then renamed onto it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, beside `path` first and then renamed onto it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, beside `path` first and then renamed onto it."""
    path = real_place(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden(path, Path.touch) as beside:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.chmod(0o644)
            beside.replace(path)
            sync(path.parent)


@contextmanager
def hidden(
    path: Path, make: Callable[[Path], None] = Path.mkdir, kind: str = PARTIAL
) -> Iterator[Path]:
    """Yield a new hidden file or folder beside `path`; what is left of it at the end is removed.

    This process holds the kernel's lock on it, which ends with the process however that ends. What
    lies there unlocked was left by one that was killed, and goes first.

    Args:
        path: what it is to become, or was.
        make: makes the file or folder.
        kind: the middle of its name.
    """
    _sweep(path)
    while True:
        beside, handle = path.with_name(f".{path.name}.{kind}{secrets.token_hex(4)}"), None
        try:
            make(beside)
            if (handle := _locked(beside, own=True)) is not None and beside.exists():
                yield beside
                return
        finally:  # also if it was interrupted before it was locked, or somebody swept it
            _remove(beside)
            if handle is not None:
                os.close(handle)


def is_hidden(path: Path) -> bool:
    """Tell whether a file is, or lies in, what was hidden beside another by a process."""
    return any(part.startswith(".") and f".{PARTIAL}" in part for part in path.parts)


def _locked(path: Path, *, own: bool) -> int | None:
    """Return an open handle that holds the lock on a path; None if another process has it.

    Where a file system has no locks, an own path is taken as locked, and no other.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not own or isinstance(error, BlockingIOError):
            os.close(handle)
            return None
    return handle


def _sweep(path: Path) -> None:
    """Remove what processes that were killed have left beside `path`.

    One killed between the two renames of `atomic_folder` has left the old folder in a hidden one:
    it gets its name back.
    """
    for kind in (OLD, PARTIAL):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{kind}*"):
            with suppress(OSError):  # another user's
                if (handle := _locked(left, own=False)) is None:
                    continue
                try:
                    if kind == OLD and (left / path.name).exists() and not path.exists():
                        (left / path.name).rename(path)
                    _remove(left)
                finally:
                    os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a disk that cannot for folders
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Wait until all that lies in a folder is on the disk: a rename may come before the bytes."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() or path.is_file():
            sync(path)


def real_place(path: Path) -> Path:
    """Return where a path leads: a rename would replace a link, not what it names."""
    return Path(os.path.realpath(path))


def check_output_folder(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder that exists, or that cannot be made, before any work is done.

    Raises:
        InputError: `path` is a file, or a non-empty folder and `overwrite` is off; nothing can be
            written beside it, or no rename can replace it.
    """
    with disk_errors(path):
        place = real_place(path)
        _sweep(place)
        if place.is_symlink():
            raise InputError(f"{path} is a link in a circle: name another folder for the output")
        if path.is_file():
            raise InputError(f"{path} is a file: name a folder for the output")
        held = "the folder you are in" if Path.cwd().is_relative_to(place) else None
        if _holds_mount(place):
            held = "a disk's mount point"
        if held is not None:
            raise InputError(
                f"{path} is or holds {held}, so nothing can take its place: name a folder in it, "
                f"such as {path / 'out'}"
            )
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise InputError(
                f"{path} exists and is not empty: choose another folder or --overwrite"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        with hidden(place):
            pass


def check_output_file(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output file that exists, or that cannot be written, before any work is done.

    Raises:
        InputError: `path` is a folder, or a file and `overwrite` is off; nothing can be written
            beside it, or no rename can replace it.
    """
    with disk_errors(path):
        place = real_place(path)
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file for the output")
        if _holds_mount(place):
            raise InputError(
                f"{path} is mounted from elsewhere, so nothing can take its place: mount the "
                "folder it lies in, or name another file"
            )
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: choose another file or --overwrite")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{path.parent} is no folder: choose another file") from None
        with hidden(place, Path.touch):
            pass


def _holds_mount(place: Path) -> bool:
    """Tell whether something is mounted at a path or below it: a disk, or a file of its own."""
    mounts = [Path(disk.mountpoint) for disk in psutil.disk_partitions(all=True)]
    return os.path.ismount(place) or any(mount.is_relative_to(place) for mount in mounts)


def give_back(lock: BaseFileLock) -> None:
    """Release a lock; its file goes first, while nobody else can hold it."""
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def made_once(path: Path) -> Iterator[None]:
    """Hold the lock on what is to be made at `path` in the cache, waiting for whoever makes it.

    What a process that was killed has left half made beside it is removed.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        give_back(lock)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`; rename it onto `path` only if the body succeeds.

    Whatever stood at `path` is replaced; of a link, what it leads to. On any failure, an interrupt
    included, the hidden folder is removed and `path` is left as it was.
    """
    path = real_place(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden(path) as beside:
            yield beside
            sync_all(beside)
            if not path.exists():
                beside.rename(path)
                sync(path.parent)
                return
            with hidden(path, kind=OLD) as old:
                try:
                    path.rename(old / path.name)
                    beside.rename(path)
                    sync(path.parent)
                except BaseException:
                    with suppress(OSError):
                        if not path.exists():
                            (old / path.name).rename(path)
                    raise
