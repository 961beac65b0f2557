"""Prune and recover in one run: the pruned checkpoint is a stage, which goes once the rest stands.

    OUTPUT.stages/pruned        what pruning alone would have written; until then its work folder
                  calibration/  the set both draw once

Beside it lies the recovery's own work folder. What stands is kept, what is missing is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet, is_saved_set
from calmix.errors import InputError, disk_errors
from calmix.files import check_output_folder, read_object, real_place, sha256_json
from calmix.models.streaming import StreamedModel
from calmix.pruning import PruneReport
from calmix.pruning.checkpoint import (
    MANIFEST,
    RUN,
    asked_of,
    check_request,
    prune_checkpoints,
    read_told,
    told_report,
)
from calmix.pruning.work import SET, SUFFIX
from calmix.recovery.checkpoint import finished_report, recover, streamed
from calmix.recovery.job import Job, RecoveryReport
from calmix.recovery.memory import BEHIND, Sizes, sizes_of
from calmix.recovery.training import split_rows
from calmix.specs import How, PruneRequest, RecoverRequest

STAGES, PRUNED = ".stages", "pruned"
Done = tuple[PruneReport, RecoveryReport]


def prune_and_recover(
    name: str,
    targets: Mapping[Path, PruneRequest],
    recovery: RecoverRequest,
    *,
    pruning: Callable[[int, int], None] | None = None,
    recovering: Callable[[int, int, str], None] | None = None,
    **how: Any,
) -> list[Done]:
    """Prune a model to one or several targets, and recover each on the same calibration set.

    The outputs are those of `prune_checkpoints` and `recover` in a row, but for what the manifest
    calls the pruned model, which is then gone. Interrupted at any moment, it resumes with
    `resume`. `how` is as for these two; the recovery computes in that dtype too, or in what it can
    train in.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--recover also prunes, in one process: start it without a launcher, or run calmix "
            "recover under one afterwards"
        )
    run = How.of(**how)
    training = replace(run, dtype="auto") if run.dtype == "float16" else run
    asked = check_request(name, targets, run, recovery)
    if asked is not None:
        split_rows([""] * asked.draw.rows, recovery.batch, 0)  # whether there are enough
    source = streamed(name, run.opening)
    try:
        done: dict[Path, Done] = {}
        jobs: list[tuple[Job, Sizes]] = []
        for output, request in targets.items():
            job = Job(recovery, output, training)
            if run.resume and (found := _finished(job, request, source)) is not None:
                done[output] = found
                _remove(_stages(output))
                continue
            check_output_folder(output, overwrite=run.overwrite)
            if (stage := _stages(output)).exists() and not (run.resume or run.overwrite):
                raise InputError(
                    f"{stage} holds an interrupted run: resume it with --resume, start over with "
                    "--overwrite, or name another output"
                )
            if request.drop_experts is None:  # else it will be smaller
                jobs.append((job, sizes_of(source, recovery.method, job.dtype)))
    finally:
        source.close()
    left = {output: request for output, request in targets.items() if output not in done}
    if not left:
        return list(done.values())

    def drawn(made: CalibrationSet | None) -> None:
        if made is not None:
            split_rows(made.sources, recovery.batch, 0)
            for job, sizes in jobs:
                job.check_memory(sizes, made.length, BEHIND)
            for output in left:
                made.save(_stages(output) / SET, overwrite=True)
        run.started(made)

    try:
        with disk_errors(next(iter(targets))):
            for output in left:
                _stages(output).mkdir(parents=True, exist_ok=True)
        stages = {_stages(output) / PRUNED: request for output, request in left.items()}
        reports = prune_checkpoints(name, stages, **how | {"started": drawn, "progress": pruning})
    except BaseException:
        for output in left:
            if not any((_stages(output) / (PRUNED + end)).exists() for end in ("", SUFFIX)):
                _remove(_stages(output))
        raise
    for (output, request), report in zip(left.items(), reports, strict=True):
        stage, made = _stages(output), None
        if is_saved_set(stage / SET):
            held = CalibrationSet.open(stage / SET)
            manifest = read_object(stage / PRUNED / MANIFEST, f"{stage} is damaged")["calibration"]
            made = CalibrationSet(held.ids, held.sources, manifest)
        own = {"dtype": training.dtype, "progress": recovering, "started": None}
        recovered = recover(
            str(stage / PRUNED), name, recovery, output, drawn=made,
            called=stage_name(name, request), **how | own,
        )  # fmt: skip
        _remove(stage)
        done[output] = report, recovered
    return [done[output] for output in targets]


def stage_name(name: str, request: PruneRequest) -> str:
    """Return what the manifest calls the pruned model, which is gone once the rest stands."""
    return f"{name}, {request.name}"


def _stages(output: Path) -> Path:
    place = real_place(output)
    return place.with_name(place.name + STAGES)


def _finished(job: Job, request: PruneRequest, source: StreamedModel) -> Done | None:
    """Return the reports of an output that an earlier run of the same request has finished."""
    manifest, run = (read_told(job.output / one) for one in (MANIFEST, RUN))
    try:
        if manifest["pruned"]["request_sha256"] != sha256_json(asked_of(request, source)):
            return None
        report = told_report(manifest["pruned"], run["pruned"])
        asked = job.asked(manifest["model"]["sha256"], manifest["against"]["sha256"])
    except (KeyError, TypeError):
        return None
    recovered = finished_report(job, asked)
    return None if recovered is None else (report, recovered)


def _remove(stage: Path) -> None:
    """Remove the stages of an output; what is not calmix's stays."""
    for part in (PRUNED, SET):
        shutil.rmtree(stage / part, ignore_errors=True)
    with suppress(OSError):
        stage.rmdir()
