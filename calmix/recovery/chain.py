"""Prune and recover in one run: the pruned checkpoint is a stage, which goes once the rest stands.

    OUTPUT.stages/pruned        what a prune alone would have written; until then its work folder
                  calibration/  the set both draw once, calibration.json its manifest

Beside it lies the recovery's own work folder. What stands is kept, what is missing is made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet
from calmix.errors import InputError, disk_errors
from calmix.files import check_output_folder, real_place, sha256_json
from calmix.models.streaming import StreamedModel
from calmix.pruning import PruneReport
from calmix.pruning.checkpoint import (
    MANIFEST,
    RUN,
    asked_of,
    check_request,
    prune_checkpoints,
    told_report,
)
from calmix.pruning.old_work import SET, SET_MANIFEST, SUFFIX, keep_set, kept_set
from calmix.recovery.checkpoint import recover, streamed
from calmix.recovery.job import Job, RecoveryReport
from calmix.recovery.memory import BEHIND, Sizes
from calmix.recovery.output import finished_report
from calmix.recovery.sizes import sizes_of
from calmix.recovery.training import split_rows
from calmix.specs import PruneRequest, RecoverRequest, target_name

STAGES, PRUNED = ".stages", "pruned"
Done = tuple[PruneReport, RecoveryReport]


def prune_and_recover(
    name: str,
    targets: Mapping[Path, PruneRequest],
    recovery: RecoverRequest,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    checkpoint_every: float | None = None,
    started: Callable[[CalibrationSet | None], None] | None = None,
    pruning: Callable[[int, int], None] | None = None,
    recovering: Callable[[int, int, str], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Done]:
    """Prune a model to one or several targets, and recover each on the same calibration set.

    The outputs are those of `prune_checkpoints` and `recover` in a row, but for what the manifest
    calls the pruned model, which is then gone. Interrupted at any moment, it goes on with
    `resume`.

    Args:
        name: the dense model, as `open_model` takes it.
        targets: as for `prune_checkpoints`.
        recovery: of each of them.
        dtype: as for a prune; the recovery computes in it too, or in what it can train in.
        max_memory: bytes the process may hold.
        checkpoint_every: of the prune.
        started, pruning: `started` and `progress` of the prune.
        recovering: `progress` of the recoveries.
        device, trust_remote_code, overwrite, resume, writing, note: as for both.

    Raises:
        CalmixError: anything a user can mend, before an output is touched.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--recover prunes too, in one process: start it without a launcher, or calmix recover "
            "with one afterwards"
        )
    how: dict[str, Any] = {
        "device": device, "trust_remote_code": trust_remote_code, "max_memory": max_memory,
        "resume": resume, "overwrite": overwrite, "writing": writing, "note": note,
    }  # fmt: skip
    trained_in = "auto" if dtype == "float16" else dtype
    asked = check_request(
        name, targets, recovery, resume=resume, overwrite=overwrite, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if asked is not None:
        split_rows([""] * asked.draw.rows, recovery.batch, 0)  # whether there are enough
    say = note or (lambda line: None)
    source = streamed(name, dtype, device, trust_remote_code)
    try:
        done: dict[Path, Done] = {}
        jobs: list[tuple[Job, Sizes]] = []
        for output, request in targets.items():
            job = Job(
                recovery, output, {"trust_remote_code": trust_remote_code}, trained_in, device,
                max_memory, lambda *of: None, say,
            )  # fmt: skip
            found = _finished(job, request, source) if resume else None
            if found is not None:
                done[output] = found
                _remove(_stages(output))
            else:
                _check(output, resume=resume, overwrite=overwrite)
                if request.drop_experts is None:  # else it will be smaller
                    jobs.append((job, sizes_of(source, recovery.method, job.dtype)))
    finally:
        source.close()
    left = {output: request for output, request in targets.items() if output not in done}
    if not left:
        return list(done.values())

    def drawn(made: CalibrationSet | None) -> None:
        if made is not None:
            split_rows(made.sources, recovery.batch, 0)  # whether there are enough
            for job, sizes in jobs:
                job.check_memory(sizes, made.length, BEHIND)
            for output in left:
                keep_set(_stages(output), made)
        if started is not None:
            started(made)

    try:
        with disk_errors(next(iter(targets))):
            for output in left:
                _stages(output).mkdir(parents=True, exist_ok=True)
        stages = {_stages(output) / PRUNED: request for output, request in left.items()}
        reports = prune_checkpoints(
            name, stages, dtype=dtype, checkpoint_every=checkpoint_every, started=drawn,
            progress=pruning, **how,
        )  # fmt: skip
    except BaseException:
        for output in left:
            if not any((_stages(output) / (PRUNED + end)).exists() for end in ("", SUFFIX)):
                _remove(_stages(output))
        raise
    for (output, request), report in zip(left.items(), reports, strict=True):
        stage = _stages(output)
        recovered = recover(
            str(stage / PRUNED), name, recovery, output, dtype=trained_in, progress=recovering,
            drawn=kept_set(stage) if (stage / SET).exists() else None,
            called=stage_name(name, request), **how,
        )  # fmt: skip
        _remove(stage)
        done[output] = report, recovered
    return [done[output] for output in targets]


def stage_name(name: str, request: PruneRequest) -> str:
    """Return what the manifest calls the pruned model, which is gone once the rest stands."""
    return f"{name}, {target_name(request)}"


def _stages(output: Path) -> Path:
    place = real_place(output)
    return place.with_name(place.name + STAGES)


def _check(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that cannot be written, or whose stages somebody may want to go on with."""
    check_output_folder(output, overwrite=overwrite)
    stage = _stages(output)
    if stage.exists() and not (resume or overwrite):
        raise InputError(
            f"{stage} holds an interrupted run: go on with --resume, start over with --overwrite, "
            "or name another output"
        )


def _finished(job: Job, request: PruneRequest, source: StreamedModel) -> Done | None:
    """Return the reports of an output that an earlier run of the same request has finished."""
    try:
        manifest = json.loads((job.output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["pruned"]["request_sha256"] != sha256_json(asked_of(request, source)):
            return None
        run = json.loads((job.output / RUN).read_text(encoding="utf-8"))
        report = told_report(manifest["pruned"], run["pruned"])
        asked = job.asked(manifest["model"]["sha256"], manifest["against"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    recovered = finished_report(job, asked)
    return None if recovered is None else (report, recovered)


def _remove(stage: Path) -> None:
    """Remove the stages of an output; what is not calmix's stays."""
    for part in (PRUNED, SET):
        shutil.rmtree(stage / part, ignore_errors=True)
    (stage / SET_MANIFEST).unlink(missing_ok=True)
    with suppress(OSError):
        stage.rmdir()
