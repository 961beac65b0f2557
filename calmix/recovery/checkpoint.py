"""From a pruned checkpoint to a recovered one: what goes in is checked, kept and told.

The output has the files, tensors and types of the pruned model. What was done stands beside the
weights as for a prune: `calmix.json`, the same for the same inputs, and `calmix-run.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from calmix.calibration import (
    CalibrationSet,
    OpenTokenizer,
    ask,
    open_tokenizer,
    resolve,
    saved_set,
)
from calmix.errors import CalmixError, DiskError, ModelError
from calmix.files import check_output_folder
from calmix.models import open_model
from calmix.models.opening import check_ids, check_models, fingerprint
from calmix.models.streaming import NotStreamableError, StreamedModel
from calmix.precision import reproducible
from calmix.pruning.checkpoint import MANIFEST
from calmix.recovery.checks import check_tokenizers, compare
from calmix.recovery.distilling import distill_model
from calmix.recovery.job import Job, RecoveryReport
from calmix.recovery.output import check_room, finish, finished_report, prepare_files
from calmix.recovery.sizes import sizes_of
from calmix.recovery.training import split_rows
from calmix.recovery.tuning import tune_blocks
from calmix.specs import RecoverRequest


def recover(
    pruned: str,
    against: str,
    request: RecoverRequest,
    output: Path | str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    started: Callable[[CalibrationSet], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    drawn: CalibrationSet | None = None,
    called: str | None = None,
) -> RecoveryReport:
    """Train what a prune has left, on a calibration set, and write a checkpoint.

    Zeros of the linear maps stay exactly zero; embeddings and output head stay as they are.
    Rows held out of the set decide when to stop, and whose weights are kept. A distillation may
    run in several processes, started by `accelerate launch` or `torchrun`, which share a disk.

    Args:
        pruned: the model to recover, as `open_model` takes it.
        against: the dense model it was pruned from.
        request: what to do, from `calmix.specs.recover_request`.
        output: the folder to write; it appears whole or not at all.
        dtype: what to compute in: `bfloat16` or `float32`; `auto`: bfloat16 where it is fast.
        overwrite, resume: as for a prune.
        max_memory: bytes the process may hold; what is needed is told before the work starts.
        started: called once the calibration set is ready.
        progress: called with steps or blocks done, their number and the latest loss.
        writing, note: as for `calmix.calibration.resolve`.
        drawn: the calibration set that is asked for, if it is there already.
        called: what the manifest calls the pruned model, if not `pruned`.

    Raises:
        CalmixError: anything a user can mend, before an output is touched.
    """
    job = Job(
        request, Path(output), {"trust_remote_code": trust_remote_code}, dtype, device,
        max_memory, progress or (lambda done, total, loss: None), note or (lambda line: None),
    )  # fmt: skip
    finished = resume and (job.output / MANIFEST).is_file()

    def check() -> None:
        inputs: list[object] = [pruned, against, saved_set(request.calibration)]
        if drawn is None and not resume:  # else what it was drawn from may be gone
            made_of = ask(request.calibration, **request.draw)
            split_rows([""] * made_of.draw.rows, request.batch, 0)  # whether there are enough
            inputs += made_of.files
        check_output_folder(job.output, inputs=inputs, overwrite=overwrite or finished)
        check_models(pruned, against, trust_remote_code=trust_remote_code)

    job.together(check)
    models = [
        streamed(n, job.type_name, str(job.device), trust_remote_code) for n in (pruned, against)
    ]
    try:
        tokenizers = [open_tokenizer(m.name, trust_remote_code=trust_remote_code) for m in models]
        job.pair = pair = compare(*models)
        check_tokenizers(*tokenizers)
        if job.processes > 1 and any(
            one.experts is not None
            for index in range(len(pair.pruned.blocks))
            for one in pair.pruned.blocks.mixtures(index)
        ):  # one that no token of a process reaches would keep the others waiting
            raise ModelError(
                f"{pruned} has experts that are modules of their own, which are recovered in one "
                "process: start it without a launcher"
            )
        asked = job.asked(*(fingerprint(one.folder) for one in models))
        if finished and (report := finished_report(job, asked)) is not None:
            return report
        try:
            job.goes_on = job.together(
                lambda: job.work.claim(asked, resume=resume, overwrite=overwrite)
            )
            calibration = job.together(lambda: _calibration(job, tokenizers[1], drawn, writing))
            embeddings = pair.pruned.model.get_input_embeddings()
            check_ids(pair.pruned.name, embeddings, calibration.ids)
            job.take(calibration)
            job.check_memory(sizes_of(pair.pruned, request.method, job.dtype), calibration.length)
            if job.main:
                prepare_files(job)
            if started is not None:
                started(calibration)
            if job.work.upgraded:
                job.say(job.work.upgraded)
            if job.goes_on:
                job.say(f"going on after {job.work.done} {job.work.unit}")
            with reproducible(job.device):
                report = job.run(distill_model if request.method == "distill" else tune_blocks)
            if job.main:
                finish(job, asked, report, called or pair.pruned.name)
            job.wait()
        except BaseException as error:
            if job.work.claimed:
                _leave(job, error)
            raise
        return report
    finally:
        for one in models:
            one.close()


def streamed(name: str, dtype: str, device: str, trust_remote_code: bool) -> StreamedModel:
    """Open a model block by block, as it has to be for a recovery.

    Raises:
        ModelError: it cannot be opened so.
    """
    try:
        return StreamedModel(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except NotStreamableError as error:
        raise ModelError(f"{name} cannot be recovered, because {error}") from error


def _calibration(
    job: Job,
    tokenizer: OpenTokenizer,
    drawn: CalibrationSet | None,
    writing: Callable[[str, int, int], None] | None,
) -> CalibrationSet:
    """Return the set of the work that goes on, or draw it; what a model writes, the dense does."""
    request, kept = job.request, job.work.calibration() if job.goes_on else drawn
    if kept is not None:
        check_room(job, kept.ids.numel())
        if not job.goes_on:
            job.work.keep_calibration(kept)
        return kept
    asked = ask(request.calibration, context=tokenizer.context, **request.draw)
    check_room(job, asked.draw.rows * asked.draw.length)
    name = job.pair.dense.name
    opened = open_model(name, device=str(job.device), **job.how) if asked.runs_model else tokenizer
    made = resolve(request.calibration, opened, writing=writing, note=job.say, **request.draw)
    job.work.keep_calibration(made)
    return made


def _leave(job: Job, error: BaseException) -> None:
    """Keep the work that a later run can go on with, and nothing else.

    A mistake would meet the same end again; a full disk, an interrupt or a defect need not. What
    an earlier run has left is kept whatever happens.
    """
    work = job.work
    again = isinstance(error, DiskError) or not isinstance(error, CalmixError)
    if not (job.goes_on or (work.done > 0 and again)):
        work.abandon()
        return
    work.close()
    if not isinstance(error, CalmixError):
        job.say(f"{work.done} {work.unit} are kept in {work.path}: --resume goes on")
