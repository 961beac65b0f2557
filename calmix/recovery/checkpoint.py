"""From a pruned checkpoint to a recovered one: what goes in is checked, what was done is recorded.

The output has the tensors and types of the pruned model. What was done stands beside the weights
as for a pruning run: `calmix.json`, the same for the same inputs, and `calmix-run.json`.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from calmix.calibration import CalibrationSet, ask, open_tokenizer
from calmix.errors import InputError, disk_errors
from calmix.files import sha256_json, write_json
from calmix.manifest import file_hashes, run_record, sealed, versions
from calmix.models import open_model
from calmix.models.opening import check_ids
from calmix.models.shards import write_index
from calmix.models.streaming import StreamedModel
from calmix.options import Recovering
from calmix.precision import reproducible
from calmix.pruning.checkpoint import MANIFEST, RUN, check_request, read_told
from calmix.pruning.distributed import everyone, once
from calmix.pruning.solvers.grids import SCALES
from calmix.pruning.work import draw_set
from calmix.recovery.blocks import recover_blocks
from calmix.recovery.distill import distill_model
from calmix.recovery.job import Job, RecoveryReport
from calmix.recovery.training import split_rows
from calmix.specs import How

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # what makes a folder of weights a model


def recover(
    pruned: str,
    against: str,
    request: Recovering,
    output: Path | str,
    **how: Any,
) -> RecoveryReport:
    """Train what pruning has left, on a calibration set, and write a checkpoint.

    Zeros of the linear maps stay exactly zero; embeddings and output head stay as they are.
    Rows held out of the set decide when to stop, and whose weights are kept. A distillation may
    run in several processes (`calmix.pruning.distributed`), which share a disk.

    Args:
        pruned: the model to recover, as `open_model` takes it.
        against: the dense model it was pruned from.
        request: what to do, from `calmix.recover_request`.
        output: the folder to write; it appears whole or not at all.
        **how: as in `calmix.specs.How`; the dtype is what to compute in, `bfloat16` or `float32`,
            `auto` for bfloat16 where it is fast.

    Raises:
        CalmixError: anything a user can mend, before an output is touched.
    """
    run = How.of(**how)
    job, trust = Job(request, Path(output), run), run.trust_remote_code
    work, finished = job.work, run.resume and (job.output / MANIFEST).is_file()

    def check() -> None:
        check_request([pruned, against], {job.output: request}, run)
        if not run.resume:  # whether there are enough rows; what they are drawn from may be gone
            rows = ask(request.calibration, **request.drawn()).draw.rows
            split_rows([""] * rows, request.batch, 0)

    def draw() -> CalibrationSet:
        if not work.resumes:
            size = ask(request.calibration, context=tokenizers[1].context, **request.drawn()).draw
            job.check_room(size.rows * size.length)
        return draw_set(
            [work], request.calibration, tokenizers[1],
            lambda: open_model(against, **job.opening | {"dtype": "auto"}), request.drawn(),
            writing=run.writing, note=run.note,
        )  # fmt: skip

    once(check)
    models = [StreamedModel(name, **job.opening) for name in (pruned, against)]
    try:
        job.take(*models)
        tokenizers = [open_tokenizer(one.name, trust_remote_code=trust) for one in models]
        if tokenizers[0].tokenizer_fingerprint != tokenizers[1].tokenizer_fingerprint:
            raise InputError(
                f"{pruned} has another tokenizer than {against}: it was not pruned from it"
            )
        asked = job.asked()
        if finished and (report := finished_report(job, asked)) is not None:
            return report
        work.claim(asked, resume=run.resume, overwrite=run.overwrite)
        try:
            calibration = once(draw)
            if work.resumes:
                once(lambda: job.check_room(calibration.ids.numel()))
            check_ids(pruned, job.pruned.model.get_input_embeddings(), calibration.ids)
            job.begin(calibration)
            run.started(calibration)
            if work.done:
                job.say(f"resuming after {work.done} {work.unit}")
            with reproducible(job.device):
                way = distill_model if request.method == "distill" else recover_blocks
                before, after, curve = way(job)
            report = RecoveryReport(
                request.method, request.epochs, request.lr, request.batch, job.plan.rows, job.seed,
                calibration.rows, calibration.length, job.rows.held_out, before, after,
                job.weights, job.zeros, curve, {"total": job.seconds}, job.quantised,
            )  # fmt: skip
            if job.main:
                _finish(job, asked, report)
            everyone(None)
        except BaseException as error:
            work.leave(error, job.say)
            raise
        return report
    finally:
        for one in models:
            one.close()


def _finish(job: Job, asked: dict[str, Any], report: RecoveryReport) -> None:
    """Write what stands beside the weights, and turn the work into the output."""
    place, pruned = job.work.checkpoint, job.pruned
    done = report.to_dict()
    run = run_record(done.pop("seconds")) | {"pruned": read_told(pruned.folder / RUN) or None}
    manifest = {
        "kind": "recovered checkpoint",
        "model": {"name": pruned.name, "sha256": asked["pruned"]},
        "against": {"name": job.dense.name, "sha256": asked["against"]},
        "dtype": asked["dtype"],
        "device": asked["device"],
        "processes": job.processes,
        "request": job.request.record(),
        "calibration": job.calibration.manifest,
        "recovery": done,
        "pruned": read_told(pruned.folder / MANIFEST) or None,
        "versions": versions() | asked["versions"],
        "request_sha256": sha256_json(asked),
    }
    kinds = (*BESIDE, "*.py") if job.run.trust_remote_code else BESIDE
    with disk_errors(place):
        for path in (path for kind in kinds for path in pruned.folder.glob(kind)):
            if path.name not in (MANIFEST, RUN) and not path.name.endswith(".index.json"):
                shutil.copyfile(path, place / path.name)
        if (scales := pruned.folder / SCALES).is_dir():
            shutil.copytree(scales, place / SCALES, dirs_exist_ok=True)
        write_index(place)
        hashed = {"files": file_hashes(place, without=(MANIFEST, RUN))}
        write_json(place / MANIFEST, sealed(manifest | hashed))
        write_json(place / RUN, run)
    job.work.complete()


def finished_report(job: Job, asked: dict[str, Any]) -> RecoveryReport | None:
    """Return the report of an output that an earlier run of the same request has finished."""
    manifest, run = (read_told(job.output / name) for name in (MANIFEST, RUN))
    if manifest.get("request_sha256") != sha256_json(asked):
        return None
    with suppress(KeyError, TypeError):
        report = RecoveryReport(**manifest["recovery"], seconds=run["seconds"])
        job.say(f"{job.output} was finished by an earlier run")
        job.work.remove_leftover()
        return report
    return None
