"""What a recovery writes: files at full size, weights in their places, and what stands beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calmix.errors import disk_errors
from calmix.files import check_free, sha256_json, write_json
from calmix.manifest import file_hashes, request_record, run_record, sealed, versions
from calmix.models.shards import ShardWriter
from calmix.pruning.checkpoint import MANIFEST, RUN
from calmix.recovery.checks import check_zeros
from calmix.recovery.distill import trained_names
from calmix.recovery.job import Job, RecoveryReport
from calmix.recovery.training import Masters

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # what makes a folder of weights a model


def prepare_files(job: Job) -> None:
    """Make the files of the result at full size."""
    files: dict[str, dict[str, Any]] = {}
    for name, place in job.pair.pruned.shards.places.items():
        files.setdefault(place.file, {})[name] = (place.dtype, place.shape)
    job.work.writer = ShardWriter(job.work.checkpoint, files)


def check_room(job: Job, tokens: int) -> None:
    """Refuse a recovery on so many tokens for whose files the disk has no room."""
    work, places = job.work, job.pair.pruned.shards.places
    needed = sum(place.size for place in places.values())
    model = job.pair.pruned.model
    width = model.get_output_embeddings().weight.shape[1]
    states = tokens * width * job.dtype.itemsize
    if job.request.method == "distill":
        own = dict(model.named_parameters())
        trained = sum(own[n].numel() for n in trained_names(model, job.pair.pruned.blocks))
        needed += states + 2 * (12 + 4) * trained
    else:
        needed += 4 * states
    held = sum(p.stat().st_blocks * 512 for p in work.path.rglob("*") if p.is_file())
    check_free(job.output, needed - held, "checkpoint and states take up to")


def as_stored(job: Job, masters: Masters, *, copy: bool = False) -> dict[str, Tensor]:
    """Return masters whole, by name, in the types the pruned model is stored in."""
    kept = {}
    for name, value in masters.full():
        if job.main:
            kept[name] = value.to(job.pair.pruned.stored_dtype(name), copy=copy)
    return kept


def put(job: Job, tensors: Mapping[str, Tensor]) -> None:
    """Write trained weights to their places; every zero must still be one."""
    assert job.work.writer is not None
    for name in job.pair.masked & tensors.keys():
        check_zeros(job.pair, name, tensors[name])
    for names in dict.fromkeys(map(job.pair.pruned.stored_with, tensors)):
        job.work.writer.write(job.pair.pruned.as_stored({name: tensors[name] for name in names}))


def copy_others(job: Job, but: Collection[str]) -> None:
    """Copy the pruned model's tensors, but those of some parameters, one at a time."""
    assert job.work.writer is not None
    shards = job.pair.pruned.shards
    left = {stored for name in but for stored in job.pair.pruned.stored_names(name)}
    for name in shards.places:
        if name not in left:
            job.work.writer.write(shards.read([name]))


def finish(job: Job, asked: dict[str, Any], report: RecoveryReport, called: str) -> None:
    """Write all that stands beside the weights, and turn the work into the output."""
    work, pruned = job.work, job.pair.pruned
    told = report.to_json()
    seconds = told.pop("seconds")
    manifest = {
        "kind": "recovered checkpoint",
        "model": {"name": called, "sha256": asked["pruned"]},
        "against": {"name": job.pair.dense.name, "sha256": asked["against"]},
        "dtype": asked["dtype"],
        "device": asked["device"],
        "processes": job.processes,
        "request": request_record(job.request),
        "calibration": job.calibration.manifest,
        "recovery": told,
        "pruned": _told(pruned.folder / MANIFEST),
        "versions": versions() | asked["versions"],
        "request_sha256": sha256_json(asked),
    }
    assert work.writer is not None
    kinds = (*BESIDE, "*.py") if job.how["trust_remote_code"] else BESIDE
    with disk_errors(work.path):
        work.writer.write_index()
        for path in (path for kind in kinds for path in pruned.folder.glob(kind)):
            if path.name not in (MANIFEST, RUN) and not path.name.endswith(".index.json"):
                shutil.copyfile(path, work.checkpoint / path.name)
        hashed = {"files": file_hashes(work.checkpoint, without=(MANIFEST, RUN))}
        write_json(work.checkpoint / MANIFEST, sealed(manifest | hashed))
        run = run_record(seconds) | {"pruned": _told(pruned.folder / RUN)}
        write_json(work.checkpoint / RUN, run)
    work.complete()


def _told(path: Path) -> Any:
    """Return what the pruned model's manifest or run record holds; None if it has none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finished_report(job: Job, asked: dict[str, Any]) -> RecoveryReport | None:
    """Return the report of an output that an earlier run of the same request has finished."""
    try:
        manifest = json.loads((job.output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["request_sha256"] != sha256_json(asked):
            return None
        run = json.loads((job.output / RUN).read_text(encoding="utf-8"))
        report = RecoveryReport(**manifest["recovery"], seconds=run["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    job.say(f"{job.output} was finished by an earlier run")
    job.work.remove_leftover()
    return report
