"""Manifests and run records: two files beside each artefact.

The manifest records what determines the bytes (inputs by hash, seeds, versions), so equal inputs
give equal manifests; the run record holds what varies between runs (date, machine, seconds).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calmix.errors import InputError
from calmix.files import is_hidden, read_object, sha256_file, sha256_json
from calmix.machine import cores

SEAL = "manifest_sha256"
# Dependencies whose versions can change the bytes of a result. The others read, plot, print or move
# files; a run saves its calibration set, so resuming does not depend on them either.
DECIDING = ("calmix", "torch", "transformers", "tokenizers")


version = cache(importlib.metadata.version)  # it parses the package's metadata each time


def versions() -> dict[str, str]:
    """Return the versions of Python, calmix and the libraries that compute results."""
    python = {"python": platform.python_version()}
    return {**python, **deciding_versions(), "safetensors": version("safetensors")}


def deciding_versions() -> dict[str, str]:
    """Return the versions that can change the bytes of a result."""
    return {name: version(name) for name in DECIDING}


def run_record(seconds: dict[str, float]) -> dict[str, Any]:
    """Return date, machine and seconds by activity of a run that ends now."""
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its own hash as the last entry."""
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return {**content, SEAL: sha256_json(content)}


def read_sealed(path: Path, missing: str) -> dict[str, Any]:
    """Read a manifest and check its hash; InputError, with the text `missing` if there is none."""
    value = read_object(path, missing)
    if sealed(value) != value:
        raise InputError(f"{path} is damaged or changed: its hash does not match")
    return value


def file_hashes(
    folder: Path, *, without: Collection[str] = (), tick: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder except `without`, sorted by relative path.

    `tick` is called with each file's name once it is hashed. Links to folders are not followed, and
    hidden leftovers of killed processes are ignored.
    """
    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    names = sorted({p.as_posix() for p in paths if not is_hidden(p)} - set(without))
    found: dict[str, str] = {}
    with ThreadPoolExecutor(cores()) as pool:
        hashes = pool.map(lambda name: sha256_file(folder / name), names)
        for name, value in zip(names, hashes, strict=True):
            found[name] = value
            tick(name)
    return found


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield the differences between two requests, e.g. `calibration.rows: 64, now 128`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            where = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), after.get(key), where)
    elif before != after:
        was, now = (text if len(text) <= 40 else text[:12] + "..."
                    for text in (str(before), str(after)))  # fmt: skip
        yield f"{path}: {was}, now {now}"
