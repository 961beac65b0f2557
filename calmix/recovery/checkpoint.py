"""From a pruned checkpoint to a recovered one, with its inputs checked and the run recorded.

The output has the tensors and types of the pruned model. The run is recorded beside the weights as
for pruning: `calmix.json`, the same for the same inputs, and `calmix-run.json`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calmix.calibration.dataset import CalibrationSet, identified
from calmix.calibration.tokenizer import open_tokenizer
from calmix.errors import InputError, disk_errors
from calmix.files import copy_files, matching, sha256_json, write_json
from calmix.manifest import (
    MANIFEST,
    RUN,
    Input,
    deciding_versions,
    file_hashes,
    read_if_there,
    record,
    run_record,
)
from calmix.models.folder import BESIDE_WEIGHTS
from calmix.models.opening import check_ids, open_model
from calmix.models.shards import weight_dtype, write_index
from calmix.models.streaming import StreamedModel
from calmix.precision import dtype_name, reproducible
from calmix.pruning.checkpoint import check_request, finished_report
from calmix.pruning.requests import How, RecoverRequest
from calmix.pruning.solvers.grids import SCALES_FOLDER, replace_blocks
from calmix.pruning.work import draw_set
from calmix.recovery.blocks import recover_blocks
from calmix.recovery.distill import distill_model
from calmix.recovery.running import RecoveryRun
from calmix.recovery.training import split_rows
from calmix.shown import Shown


@dataclass(repr=False)
class RecoveryReport(Shown):
    """What a recovery did.

    `before` and `after` are the loss on the held-out rows (indices in `held_out`): mean KL per
    token in nats (distill), or the mean relative error per token over blocks (blocks). `curve` has
    the losses during training, a `TrainingState` or the report of `tune` for each block. Of the
    `weights` of the linear maps, `zeros` stay zero and `quantised` stay on their grid.
    """

    method: str
    epochs: int
    lr: float
    batch: int
    rows_at_once: int
    seed: int
    rows: int
    length: int
    held_out: list[int]
    before: float
    after: float
    weights: int
    zeros: int
    curve: Any
    seconds: dict[str, float] = field(default_factory=dict)
    quantised: int = 0

    def _line(self) -> str:
        return (
            f"{self.method}, loss of {len(self.held_out)} held-out rows (lower is better) "
            f"{self.before:.4f} before, {self.after:.4f} after"
        )

    def _rows(self) -> list[dict[str, Any]]:
        if self.method == "distill":
            return [{"step": step, "loss": loss} for step, loss in self.curve["held_out"]]
        return [{name: one[name] for name in ("block", "before", "after")} for one in self.curve]


def recover(
    pruned: str,
    against: str,
    request: RecoverRequest,
    output: Path | str,
    **how: Any,
) -> RecoveryReport:
    """Train the remaining weights of a pruned model on a calibration set, and write a checkpoint.

    Zeros of the linear maps stay exactly zero; embeddings and output head stay unchanged. Held-out
    rows of the set decide when to stop and which weights are kept.

    Args:
        pruned: the model to recover, as for `open_model`.
        against: the dense model it was pruned from.
        request: from `calmix.recover_request`.
        output: the folder to write, atomically.
        **how: as in `calmix.pruning.requests.How`; `dtype` is the compute type, `bfloat16` or
            `float32`, or `auto` for bfloat16 where it is fast.

    Raises:
        CalmixError: anything a user can fix, before an output is touched.
    """
    run = How.of(**how)
    job, trust = RecoveryRun(request, Path(output), run), run.trust_remote_code
    work = job.work

    def draw() -> CalibrationSet:
        if not work.resumes:
            size = request.drawing.draw
            job.check_room(size.rows * size.length)
        return draw_set(
            work,
            request,
            tokenizers[1],
            lambda: open_model(against, **job.opening | {"dtype": "auto"}),
            run,
        )

    check_request([pruned, against], job.output, request, run)
    if not run.resume:  # are there enough rows? A resumed run may lack the source files
        split_rows([""] * request.drawing.draw.rows, request.batch, 0)
    models = [StreamedModel(name, **job.opening) for name in (pruned, against)]
    try:
        job.take(*models)
        if models[0].files.sha256 == models[1].files.sha256:
            raise InputError(
                f"{pruned} and {against} are the same model, so there is nothing to recover: name "
                "the dense model with --against"
            )
        tokenizers = [open_tokenizer(one.name, trust_remote_code=trust) for one in models]
        if tokenizers[0].tokenizer_fingerprint != tokenizers[1].tokenizer_fingerprint:
            raise InputError(f"{pruned} was not pruned from {against}: their tokenizers differ")
        identity = {  # all that determines the bytes of the result, except the text
            "pruned": job.pruned.files.sha256,
            "against": job.dense.files.sha256,
            "tokenizer": tokenizers[0].identity,
            "dtype": job.opening["dtype"],
            "device": job.device.type,
            **request.record() | {"calibration": identified(request.calibration)},
            "versions": deciding_versions(),
        }
        earlier = finished_report(
            work, job.output, identity, run, "recovery", lambda part: RecoveryReport(**part)
        )
        if earlier is not None:
            return earlier
        work.claim(identity, resume=run.resume, overwrite=run.overwrite)
        try:
            calibration = draw()
            if work.resumes:
                job.check_room(calibration.ids.numel())
            check_ids(pruned, job.pruned.model.get_input_embeddings(), calibration.ids)
            job.begin(calibration)
            run.started(calibration)
            if work.done:
                run.note(f"resuming after {work.done} {work.unit}")
            with reproducible(job.device):
                train = distill_model if request.method == "distill" else recover_blocks
                before, after, curve = train(job)
            report = RecoveryReport(
                request.method,
                request.epochs,
                request.lr,
                request.batch,
                job.rows,
                job.seed,
                calibration.rows,
                calibration.length,
                job.held_out,
                before,
                after,
                job.weights,
                job.zeros,
                curve,
                {"total": time.perf_counter() - job.began},
                job.quantised,
            )
            _finish(job, identity, report)
        except BaseException as error:
            work.leave(error, run.note)
            raise
        return report
    finally:
        for one in models:
            one.close()


def _finish(job: RecoveryRun, identity: dict[str, Any], report: RecoveryReport) -> None:
    """Write the files beside the weights, and turn the work folder into the output."""
    folder, pruned = job.work.checkpoint, job.pruned
    done = report.to_dict()
    run = run_record(done.pop("seconds")) | {"pruned": read_if_there(pruned.folder / RUN) or None}
    with disk_errors(folder):
        copy_files(pruned.folder, folder, matching(pruned.folder, ("config.json", *BESIDE_WEIGHTS)))
        if (scales := pruned.folder / SCALES_FOLDER).is_dir():
            shutil.copytree(scales, folder / SCALES_FOLDER, dirs_exist_ok=True)
            replace_blocks(folder, job.encoded)
        write_index(folder)
        manifest = record(
            "recovered checkpoint",
            request=job.request.record(),
            inputs={
                "model": Input(pruned.name, identity["pruned"]),
                "against": Input(job.dense.name, identity["against"]),
            },
            files=file_hashes(folder, without=(MANIFEST, RUN)),
            dtype=identity["dtype"],
            device=identity["device"],
            trust_remote_code=job.opening["trust_remote_code"],
            stored_dtype=dtype_name(weight_dtype(pruned.places)),
            calibration=job.calibration.manifest,
            recovery=done,
            pruned=read_if_there(pruned.folder / MANIFEST) or None,
            request_sha256=sha256_json(identity),
        )
        write_json(folder / MANIFEST, manifest)
        write_json(folder / RUN, run)
        pruned.files.check()
    job.work.complete()
