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
from typing import Any, NamedTuple

from calmix.errors import InputError
from calmix.files import RESULTS, is_hidden, read_object, sha256_file, sha256_json

MANIFEST, RUN = "calmix.json", "calmix-run.json"  # of a model
SEAL, GGUF = "manifest_sha256", ".gguf"
ROLES = ("model", "against", "calibration")  # what a result is made from, in its record
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
    import torch

    return {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def record(
    kind: str,
    *,
    request: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Input] | None = None,
    files: Mapping[str, str] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Return the sealed record of a result.

    Args:
        request: what decides it, besides the `inputs` by role.
        files: SHA-256 of its files by name.
        facts: everything else about it.
    """
    parts = {role: one._asdict() for role, one in (inputs or {}).items()}
    about = {"request": request, "files": files}
    about = {key: value for key, value in about.items() if value is not None}
    return sealed({"kind": kind, **parts, **facts, **about, "versions": versions()})


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its own hash as the last entry."""
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return {**content, SEAL: sha256_json(content)}


def read_sealed(path: Path, missing: str) -> dict[str, Any]:
    """Read a manifest and check its hash; InputError, with the text `missing` if there is none."""
    check_seal(path, value := read_object(path, missing))
    return value


def check_seal(path: Path, value: Mapping[str, Any]) -> None:
    """Refuse the content of a sealed file unless it is as calmix wrote it."""
    if SEAL not in value:
        raise InputError(
            f"{path} is damaged or of an older calmix, because it has no hash of its own: make it "
            "again"
        )
    if sealed(value) != value:
        raise InputError(f"{path} is damaged or changed: its hash does not match")


class Input(NamedTuple):
    """What a result is made from: its name as the user wrote it, and its SHA-256."""

    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} ({self.sha256[:12]})"


def record_file(path: Path) -> Path | None:
    """Return the record of a result: the manifest in its folder, the one beside a GGUF file, or the
    file itself; None if there is none."""
    named = [path.with_name(f"{path.name}.json") if path.suffix == GGUF else path]
    if path.is_dir():
        named = [path / names[0] for names in RESULTS.values()]
    return next(filter(Path.is_file, named), None)


def read_record(path: Path) -> dict[str, Any]:
    """Read the sealed record of a result."""
    if (file := record_file(path)) is None:
        raise InputError(f"{path} is not a result of calmix: it has no manifest")
    return read_sealed(file, "")


def read_if_there(path: Path) -> dict[str, Any]:
    """Return the content of a record, which is not checked; {} if there is none."""
    try:
        return read_object(path, "")
    except InputError:
        return {}


def lineage(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the record of a model, and those of the models that it was made from, the first one
    last."""
    one: Mapping[str, Any] | None = record
    while one:
        yield one
        one = one.get("pruned")  # None if another program pruned the model


def inputs_of(record: Mapping[str, Any]) -> dict[str, Input]:
    """Return what a result was made from, by role, as its record has it."""
    parts = {role: record.get(role) for role in ROLES}
    return {
        role: Input(str(part.get("name", f"another {role}")), str(part["sha256"]))
        for role, part in parts.items()
        if isinstance(part, dict) and "sha256" in part
    }


def check_inputs(
    result: Path,
    record: Mapping[str, Any],
    inputs: Mapping[str, Input],
    request: Mapping[str, Any],
    remedy: str,
) -> None:
    """Refuse a result that was made on another `request`, or from other `inputs`, than those here.

    `record` is the result's own; `inputs` are by role, and only these and the parts of `request`
    are compared. The error ends with the `remedy`.
    """
    recorded = record.get("request") or {}
    for line in differences({key: recorded.get(key) for key in request}, request):
        raise InputError(f"{result} was made on another request ({line}): {remedy}")
    before = inputs_of(record)
    for role, now in inputs.items():
        if role not in before:
            raise InputError(f"{result} does not record its {role}: {remedy}")
        if before[role].sha256 != now.sha256:
            raise InputError(f"{result} was made from {before[role]}, but {now} is there: {remedy}")


def changed(folder: Path, files: Mapping[str, str], hashes: Mapping[str, str]) -> list[str]:
    """Return a line for each of the `files` in a manifest that is missing or has another hash."""
    wrong = {
        name: "is damaged or changed: its hash differs" if name in hashes else "is missing"
        for name, value in files.items()
        if hashes.get(name) != value
    }
    return [f"{folder / name} {what}" for name, what in wrong.items()]


def file_hashes(
    folder: Path,
    *,
    without: Collection[str] = (),
    tick: Callable[[str], None] = lambda name: None,
    hashed: Callable[[Path], str] = sha256_file,
) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder except `without`, sorted by relative path.

    `tick` is called with each file's name once it is `hashed`. Links to folders are not followed,
    and hidden leftovers of killed processes are ignored.
    """
    from calmix.machine import cores

    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    names = sorted({p.as_posix() for p in paths if not is_hidden(p)} - set(without))
    by_name: dict[str, str] = {}
    with ThreadPoolExecutor(cores()) as pool:
        hashes = pool.map(lambda name: hashed(folder / name), names)
        for name, value in zip(names, hashes, strict=True):
            by_name[name] = value
            tick(name)
    return by_name


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield the differences between two requests, e.g. `calibration.rows: 64, now 128`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            where = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), after.get(key), where)
    elif before != after:
        was, now = (
            text if len(text) <= 40 else text[:12] + "..." for text in (str(before), str(after))
        )
        yield f"{path}: {was}, now {now}"
