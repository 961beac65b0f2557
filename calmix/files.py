"""Files and folders: the cache, hashes, and atomic writes."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from calmix.errors import DiskError, InputError, disk_errors

PARTIAL, OLD = "partial-", "old-"  # hidden beside a result: the new one, the replaced one
# Files that identify each kind of result. The first match counts: a pack also has a checkpoint's
# manifest, so it comes first.
RESULTS = {
    "study store": ("store.json",),
    "compressed model": ("compress.json",),
    "pack": ("calmix-pack.json", "config.json"),
    "checkpoint": ("calmix.json", "config.json"),
    "calibration set": ("manifest.json", "calibration.safetensors"),
    "study report": ("report.html", "summary.txt"),
}
NEVER_REPLACED = ("study store", "compressed model")  # never replaced by --overwrite


def cache_dir() -> Path:
    """Return the cache folder: `CALMIX_CACHE`, else `calmix` under `XDG_CACHE_HOME` or ~/.cache."""
    if named := os.environ.get("CALMIX_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "calmix"


def user_path(text: str | Path) -> Path:
    """Return a user's text as a path, with `~` expanded."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # leaves an unknown ~name unchanged


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path, *, again: bool = False) -> str:
    """Return a file's SHA-256, kept in the cache by path, size and time; with `again`, read the
    file in any case."""
    stat = path.stat()
    # Copies keep the time of a change, but not that of the entry.
    key = sha256_json([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    entry = cache_dir() / "hashes" / key
    # A file changed in the last seconds can change again within its time stamp's resolution.
    settled = time.time_ns() - stat.st_mtime_ns > 5_000_000_000
    known = settled and not again and entry.is_file()
    if known and len(cached := entry.read_text(encoding="ascii")) == 64:
        return cached
    value = sha256_file(path)
    if settled:
        with suppress(OSError, DiskError):
            write_text(entry, value)
    return value


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    try:
        return sha256_json([[p.relative_to(path).as_posix(), cached_sha256(p)] for p in files])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def sha256_json(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Parse untrusted JSON; raise ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object; raise InputError, with the text `missing` if there is no file."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(missing) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: not JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: not a JSON object")
    return value


def check_readable(path: Path) -> None:
    """Raise an InputError with the system's reason if an existing file cannot be opened."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. What a file's name has that is no UTF-8 becomes an escape, which
    JSON reads back."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file beside `path` to write to; once it is on disk, rename it to `path`."""
    path = real_place(path)
    with disk_errors(path), hidden(path, Path.touch) as beside:
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
    """Yield a new hidden file or folder beside `path`, whose folder is made, and remove it at the
    end.

    It stays locked meanwhile; the kernel releases the lock if the process dies. Unlocked ones were
    left by killed processes and are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    while True:
        beside, handle = path.with_name(f".{path.name}.{kind}{secrets.token_hex(4)}"), None
        try:
            make(beside)
            if (handle := _locked(beside, own=True)) is not None and beside.exists():
                yield beside
                return
        finally:  # also after an interrupt before the lock, or a sweep by another process
            _clear(beside, path)
            if handle is not None:
                os.close(handle)


def is_hidden(path: Path) -> bool:
    """Whether a path is, or is inside, a hidden partial file or folder."""
    return any(part.startswith(".") and f".{PARTIAL}" in part for part in path.parts)


def _locked(path: Path, *, own: bool) -> int | None:
    """Lock a path and return the open handle; None if another process holds the lock.

    On a file system without locks, only this process's `own` path counts as locked.
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
    """Clear what killed processes left beside `path`."""
    for kind in (OLD, PARTIAL):
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.{kind}*"):
            with suppress(OSError):  # another user's
                if (handle := _locked(leftover, own=False)) is not None:
                    try:
                        _clear(leftover, path)
                    finally:
                        os.close(handle)


def _clear(leftover: Path, path: Path) -> None:
    """Remove a hidden file or folder; an old folder goes back to `path` if that is gone."""
    with suppress(OSError):
        old = leftover / path.name
        if leftover.name.startswith(f".{path.name}.{OLD}") and old.exists() and not path.exists():
            old.rename(path)
        remove(leftover)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def matching(folder: Path, kinds: Iterable[str]) -> list[Path]:
    """Return the files of a folder that fit glob patterns, relative to it."""
    return [
        path.relative_to(folder) for kind in kinds for path in folder.glob(kind) if path.is_file()
    ]


def leads_out(link: Path, folder: Path) -> bool:
    """Whether a link leads out of a folder. A snapshot in the hub's cache includes the blobs of its
    repository."""
    target, real = real_place(link), real_place(folder)
    blobs = (one.parent / "blobs" for one in real.parents if one.name == "snapshots")
    return not any(map(target.is_relative_to, (real, *blobs)))


def check_links(folder: Path) -> None:
    """Refuse a folder with links that lead out of it: a stranger's could name a private file."""
    for path in folder.rglob("*"):
        if path.is_symlink() and leads_out(path, folder):
            raise InputError(
                f"{path} is a link out of its folder, to {real_place(path)}: delete it, or replace "
                "it by a copy of that file"
            )


def copy_files(source: Path, folder: Path, names: Iterable[str | Path]) -> None:
    """Copy files of one folder to the same places in another."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported for folders here
            raise
    finally:
        os.close(handle)


def real_place(path: Path) -> Path:
    """Resolve links: a rename would replace the link, not its target."""
    return Path(os.path.realpath(path))


def check_output_folder(
    path: Path, *, inputs: Iterable[object] = (), overwrite: bool | None = False
) -> None:
    """Refuse an unusable output folder before any work; nothing is created. `overwrite` is None for
    a verb without that option."""
    with disk_errors(path):
        real = real_place(path)
        _sweep(real)
        if os.path.lexists(real) and not path.is_dir():  # it may be a circular link
            raise InputError(f"{path} is a file: name a folder for the output")
        check_apart(path, inputs)
        mounted = "a mount point" if _holds_mount(real) else None
        if mounted or Path.cwd().is_relative_to(real):
            raise InputError(
                f"{path} is or contains {mounted or 'the current folder'} and cannot be replaced: "
                f"name a folder inside it, such as {path / 'out'}"
            )
        names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
        if names and not overwrite:
            other = " or --overwrite" * (overwrite is not None)
            raise InputError(f"{path} exists and is not empty: choose another folder{other}")
        if names and not holds_result(path):
            content = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise InputError(
                f"--overwrite replaces only results of calmix, and {path} contains {content}: name "
                "another folder, or delete this one first"
            )
        check_writable(path)


def check_output_file(
    path: Path, *, inputs: Iterable[object] = (), overwrite: bool | None = False
) -> None:
    """Refuse an unusable output file before any work; nothing is created. `overwrite` is None for a
    verb without that option."""
    with disk_errors(path):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            raise InputError(f"{path} is {what}: name a file for the output")
        check_apart(path, inputs)
        if _holds_mount(real_place(path)):
            raise InputError(
                f"{path} is a mount point and cannot be replaced: mount the folder that contains "
                "it, or name another file"
            )
        if path.exists() and not overwrite:
            other = " or --overwrite" * (overwrite is not None)
            raise InputError(f"{path} exists: choose another file{other}")
        check_writable(path)


def check_result_file(path: Path, inputs: Iterable[object] = ()) -> None:
    """Raise InputError unless `path` ends in .json or .csv and can be written."""
    if path.suffix.lower() not in (".json", ".csv"):
        raise InputError(f"cannot write results to {path}: name a .json or .csv file")
    check_output_file(path, inputs=inputs, overwrite=True)


def holds_result(folder: Path) -> bool:
    """Whether a folder is a result of calmix that --overwrite may replace."""
    kinds = (names for kind, names in RESULTS.items() if kind not in NEVER_REPLACED)
    return any(all((folder / name).is_file() for name in names) for names in kinds)


def check_apart(path: Path, inputs: Iterable[object]) -> None:
    """Refuse an output that is, is inside, or contains an input, links followed.

    Inputs are as a user named them; names that are not paths are ignored.
    """
    for name in (one for one in inputs if one is not None):
        input_path = user_path(str(name))
        within, around = _within(path, input_path), _within(input_path, path)
        exists = os.path.exists(input_path)  # noqa: PTH110  # a mix may be too long for a path
        if exists and (within or around):
            what = "is" if within and around else "is inside" if within else "contains"
            raise InputError(f"{path} {what} the input {name}: name another output")


def _within(path: Path, folder: Path) -> bool:
    """Whether a path is, or is inside, an existing folder, links followed."""
    with suppress(OSError):
        real = real_place(path)
        return any(part.samefile(folder) for part in (*reversed(real.parents), real))
    return False


def check_writable(path: Path) -> None:
    """Refuse a path where nothing can be created; parent folders may be missing."""
    with disk_errors(path):
        real = real_place(path)
        parent = existing(real)
        try:
            with hidden(parent / real.name):
                pass
        except FileNotFoundError:  # as in /proc
            raise DiskError(f"cannot write to {path}: cannot create files in {parent}") from None


def existing(path: Path) -> Path:
    """Return the nearest parent folder that exists."""
    return next(folder for folder in path.parents if folder.exists())


def size_text(count: float) -> str:
    """Return bytes as text: `320 kB`, `3.2 MB`, `14 GB`."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
    unit, name = next((one for one in units if count >= one[0]), units[-1])
    return f"{float(f'{count / unit:.3g}'):g} {name}"  # never as 1e+03


def check_free(path: Path, needed: int, what: str) -> None:
    """Refuse work, before it starts, that needs more bytes than are free on the disk of `path`."""
    free = shutil.disk_usage(existing(real_place(path))).free
    if free < needed:
        raise DiskError(
            f"no space left for {path}: {what} {size_text(needed)}, but only "
            f"{size_text(free)} are free"
        )


def _holds_mount(path: Path) -> bool:
    """Whether a disk or a single file is mounted at a path or below it."""
    mounts = [Path(disk.mountpoint) for disk in psutil.disk_partitions(all=True)]
    return os.path.ismount(path) or any(mount.is_relative_to(path) for mount in mounts)


def give_back(lock: BaseFileLock) -> None:
    """Delete the file of a lock while nobody else can hold it, and release the lock."""
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on `path`; if another process has it, wait, or raise InputError."""
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


def check_unlocked(path: Path) -> None:
    """Raise InputError if another process holds the lock on `path`."""
    path = real_place(path)
    if path.with_name(f".{path.name}.lock").exists():
        with alone(path, wait=False):
            pass


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path`; rename it to `path` only if the body succeeds.

    An existing folder is replaced; for a link, its target. On any failure, including an interrupt,
    the hidden folder is removed and `path` stays unchanged.
    """
    path = real_place(path)
    with disk_errors(path), hidden(path) as beside:
        yield beside
        put_folder(beside, path)


def put_folder(beside: Path, path: Path) -> None:
    """Rename a folder to `path`; a replaced folder is restored on any failure."""
    for part in [*beside.rglob("*"), beside]:  # a rename can reach the disk before the bytes
        if part.is_dir() or part.is_file():
            sync(part)
    if not path.exists():
        beside.rename(path)
        sync(path.parent)
        return
    with hidden(path, kind=OLD) as old:
        path.rename(old / path.name)
        beside.rename(path)
        sync(path.parent)
