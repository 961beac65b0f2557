"""Manifests and run records, in two files beside an artefact.

The manifest holds what decides the bytes (inputs by hash, seeds, versions) and is the same for the
same inputs; the run record holds what differs from run to run (date, machine, seconds).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calmix.errors import InputError
from calmix.files import is_hidden, read_object, sha256_file, sha256_json
from calmix.machine import cores

SEAL = "manifest_sha256"
# Of all that calmix depends on these may change the bytes of a result: they compute it. The others
# read, draw, show or move files; what a run has drawn is kept for its resumption.
DECIDING = ("calmix", "torch", "transformers", "tokenizers")


version = cache(importlib.metadata.version)  # a package's metadata is read through for it


def versions() -> dict[str, str]:
    """Return the versions of what computes: Python, calmix and the libraries under it."""
    python = {"python": platform.python_version()}
    return {**python, **deciding_versions(), "safetensors": version("safetensors")}


def deciding_versions() -> dict[str, str]:
    """Return the versions that may change the bytes of a result."""
    return {name: version(name) for name in DECIDING}


def run_record(seconds: dict[str, float]) -> dict[str, Any]:
    """Return date, machine and seconds by activity of the run that ends now."""
    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its own hash at the end."""
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return {**content, SEAL: sha256_json(content)}


def seal_holds(manifest: Mapping[str, Any]) -> bool:
    """Tell whether a manifest is as it was sealed."""
    return sealed(manifest)[SEAL] == manifest.get(SEAL)


def read_sealed(path: Path, missing: str) -> dict[str, Any]:
    """Return a manifest that is as it was sealed; an InputError, where there is none `missing`."""
    value = read_object(path, missing)
    if not seal_holds(value):
        raise InputError(f"{path} is damaged or changed: its hash is another")
    return value


def file_hashes(
    folder: Path, *, without: Collection[str] = (), tick: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder but `without`, by its path within, in order.

    `tick` is called with the name of each file once it is hashed. Links are not followed into
    folders; what a killed process has left hidden beside a file is passed over.
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
