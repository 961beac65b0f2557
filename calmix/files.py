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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from calmix.errors import DiskError, InputError, disk_errors

PARTIAL, OLD = "partial-", "old-"  # hidden beside a result: what is to become it, what it was
EXPORT = "calmix-export.json"  # the manifest of what is made for another program
# By kind of result, files that stand together in its folder and in no other. The first names the
# kind: a pack, which holds a checkpoint's manifest too, comes before it.
RESULTS = {
    "study store": ("store.json",),
    "compressed model": ("compress.json",),
    "pack": ("calmix-pack.json", "config.json"),
    "checkpoint": ("calmix.json", "config.json"),
    "export": (EXPORT,),
    "calibration set": ("manifest.json", "calibration.safetensors"),
    "study analysis": ("analysis.json", "ranking.csv"),
    "study report": ("report.html", "summary.txt"),
}
KEPT = ("study store", "compressed model")  # which no --overwrite replaces


def cache_dir() -> Path:
    """Return the cache folder: `CALMIX_CACHE`, else `calmix` under `XDG_CACHE_HOME` or ~/.cache."""
    if named := os.environ.get("CALMIX_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "calmix"


def user_path(text: str | Path) -> Path:
    """Return what a user wrote as a path, with `~` for the home folder."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # leaves ~name of nobody as it is


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that others may have written; a ValueError if it is none or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """Return the JSON object a file holds; InputError, where there is no file with `missing`."""
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
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file beside `path` to write to; on the disk, it takes `path`'s place."""
    path = real_place(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden(path, Path.touch) as beside:
            with beside.open("wb") as file:
                yield file
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
            remove(beside)
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
    """Remove what killed processes have left beside `path`; an old folder gets its name back."""
    for kind in (OLD, PARTIAL):
        for left in path.parent.glob(f".{glob.escape(path.name)}.{kind}*"):
            with suppress(OSError):  # another user's
                if (handle := _locked(left, own=False)) is None:
                    continue
                try:
                    if kind == OLD and (left / path.name).exists() and not path.exists():
                        (left / path.name).rename(path)
                    remove(left)
                finally:
                    os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
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


def real_place(path: Path) -> Path:
    """Return where a path leads: a rename would replace a link, not what it names."""
    return Path(os.path.realpath(path))


def check_output_folder(
    path: Path, *, inputs: Iterable[object] = (), overwrite: bool = False
) -> None:
    """Refuse an output folder before any work is done; nothing is made on the way."""
    with disk_errors(path):
        place = real_place(path)
        _sweep(place)
        if os.path.lexists(place) and not path.is_dir():  # it may be a link in a circle
            raise InputError(f"{path} is a file: name a folder for the output")
        check_apart(path, inputs)
        mounted = "a disk's mount point" if _holds_mount(place) else None
        if mounted or Path.cwd().is_relative_to(place):
            raise InputError(
                f"{path} is or holds {mounted or 'the folder you are in'}, so nothing can take its "
                f"place: name a folder in it, such as {path / 'out'}"
            )
        names = sorted(held.name for held in path.iterdir()) if path.is_dir() else []
        if names and not overwrite:
            raise InputError(
                f"{path} exists and is not empty: choose another folder or --overwrite"
            )
        if names and not holds_result(path):
            found = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise InputError(
                f"--overwrite replaces only results of calmix, and {path} holds {found}: name "
                "another folder, or delete this one first"
            )
        check_writable(path)


def check_output_file(
    path: Path, *, inputs: Iterable[object] = (), overwrite: bool = False
) -> None:
    """Refuse an output file before any work is done, as `check_output_folder` a folder."""
    with disk_errors(path):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise InputError(f"{path} is {what}: name a file for the output")
        check_apart(path, inputs)
        if _holds_mount(real_place(path)):
            raise InputError(
                f"{path} is mounted from elsewhere, so nothing can take its place: mount the "
                "folder it lies in, or name another file"
            )
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: choose another file or --overwrite")
        check_writable(path)


def check_result_file(path: Path, inputs: Iterable[object] = ()) -> None:
    """Raise InputError where the ending is neither .json nor .csv, or no file can be written."""
    if path.suffix.lower() not in (".json", ".csv"):
        raise InputError(f"cannot write results to {path}: name a .json or .csv file")
    check_output_file(path, inputs=inputs, overwrite=True)


def holds_result(folder: Path) -> bool:
    """Tell whether a folder is a result of calmix, which may be replaced when that is asked for."""
    found = (names for kind, names in RESULTS.items() if kind not in KEPT)
    return any(all((folder / name).is_file() for name in names) for names in found)


def check_apart(path: Path, inputs: Iterable[object]) -> None:
    """Refuse an output that is an input, lies in one or holds one, links followed.

    Inputs are as a user named them; what is no path is passed over.
    """
    for named in (one for one in inputs if one is not None):
        given = user_path(str(named))
        within, around = _within(path, given), _within(given, path)
        if within or around:
            what = "is" if within and around else "lies in" if within else "holds"
            raise InputError(f"{path} {what} the input {named}: name another place for the output")


def _within(path: Path, folder: Path) -> bool:
    """Tell whether a path is, or lies in, a folder that is there, links followed."""
    with suppress(OSError, ValueError):  # as a mix's text is longer than a name may be
        place = real_place(path)
        return any(part.samefile(folder) for part in (*reversed(place.parents), place))
    return False


def check_writable(path: Path) -> None:
    """Refuse a place where nothing can be made; folders on the way to it may be missing."""
    with disk_errors(path):
        place = real_place(path)
        there = existing(place)
        try:
            with hidden(there / place.name):
                pass
        except FileNotFoundError:  # as in /proc
            raise DiskError(f"cannot write to {path}: {there} takes no new files") from None


def existing(path: Path) -> Path:
    """Return the nearest of the folders a path lies in that is there."""
    return next(place for place in path.parents if place.exists())


def check_free(path: Path, needed: int, what: str) -> None:
    """Refuse work, before it starts, that needs more bytes than are free beside `path`."""
    free = shutil.disk_usage(existing(real_place(path))).free
    if free < needed:
        raise DiskError(
            f"no space left for {path}: {what} {needed / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free"
        )


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
def alone(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on what is made at `path`, waiting for whoever makes it, or else refused."""
    path = real_place(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            line = f"another process is at work in {path}: wait for it, or stop it"
            raise InputError(line) from None
    try:
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
            put_folder(beside, path)


def put_folder(beside: Path, path: Path) -> None:
    """Rename a folder onto `path`; what stands there is replaced, and put back on any failure."""
    for part in [*beside.rglob("*"), beside]:  # a rename may come before the bytes
        if part.is_dir() or part.is_file():
            sync(part)
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
