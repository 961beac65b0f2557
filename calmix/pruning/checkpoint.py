"""From a request to a pruned checkpoint on disk: plain dense safetensors that load anywhere.

Nothing about sparsity goes into config.json (inference engines refuse models that carry such
keys). What was done stands beside the weights: `calmix.json`, the same for the same inputs, and
`calmix-run.json`, which holds date and seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import CalibrationSet, open_tokenizer, resolve
from calmix.calibration.resolving import needs_model
from calmix.calibration.tokenizer import OpenTokenizer
from calmix.errors import CalmixError, DiskError, InputError, ModelError, disk_errors
from calmix.files import atomic_folder, check_output_folder, real_place, sha256_json, write_json
from calmix.manifest import file_hashes, request_record, run_record, sealed, versions
from calmix.models import OpenModel, open_model
from calmix.models.opening import fingerprint, quiet_transformers
from calmix.models.streaming import NotStreamableError, StreamedModel, stored_types
from calmix.pruning.engine import LayerReport, PruneReport, prune
from calmix.pruning.patterns import Pattern, Unstructured, parse_pattern
from calmix.pruning.streamed import Target, plan_for, prepare_files, prune_streamed
from calmix.pruning.work import WorkFolder
from calmix.specs import DAMPING, PruneRequest

# Of models of images or sound, opened as models of text.
PROCESSOR_FILES = ("*processor_config.json", "chat_template.*")
MANIFEST, RUN = "calmix.json", "calmix-run.json"


def prune_checkpoints(
    name: str,
    targets: Mapping[Path, PruneRequest],
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    started: Callable[[CalibrationSet | None], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[PruneReport]:
    """Draw a model's calibration set, prune the model block by block and write checkpoints.

    Weights come from disk and go back one block at a time. What is done is kept beside each
    output, so that an interrupted prune goes on with `resume`.

    Args:
        name: the model, as `open_model` takes it.
        targets: what to do, from `prune_request`, by the folder to write; each folder appears
            whole or not at all. All that calibrate do so on one set, the first one's.
        overwrite: replace what is there, and an interrupted run's work.
        resume: go on with an interrupted run of the same request, if there is one.
        max_memory: bytes the process may hold; None for what is free.
        started: called once the calibration set is ready.
        progress: called with (blocks done, blocks), those of all targets.
        writing, note: as for `calmix.calibration.resolve`.

    Returns:
        A report for each target, in order.

    Raises:
        CalmixError: anything a user can mend, before an output is touched.
    """
    jobs = [Job(output, request) for output, request in targets.items()]
    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    say = note or (lambda line: None)
    for job in jobs:
        if not (resume and job.finished):
            check_output_folder(job.output, overwrite=overwrite)
    try:
        streamed = StreamedModel(name, **how)
    except NotStreamableError as error:
        if max_memory is not None or resume:
            option = "--max-memory" if max_memory is not None else "--resume"
            raise InputError(
                f"{name} cannot be pruned block by block, because transformers converts its "
                f"weights while it loads them (first {error}): leave out {option}"
            ) from error
        return _prune_whole(name, jobs, how, started, progress, writing, note)
    try:
        for job in jobs:
            job.identify(streamed)
            if resume and job.recover():
                say(f"{job.output} was finished by an earlier run")
        left = [job for job in jobs if job.report is None]
        try:
            for job in left:
                job.goes_on = job.work.claim(job.asked, resume=resume, overwrite=overwrite)
            tokenizer = open_tokenizer(name, trust_remote_code=trust_remote_code)
            calibration = _calibration(left, name, tokenizer, how, writing, note)
            _check_vocabulary(streamed, calibration)
            ids = None if calibration is None else calibration.ids
            plan = plan_for(streamed, ids, left, budget=max_memory)
            _check_space(streamed, left, ids)
            for job in left:
                prepare_files(streamed, job.work)
            if left and started is not None:
                started(calibration)
            for job in left:
                if job.goes_on:
                    say(f"going on after {job.work.done} of {len(streamed.blocks)} blocks")
            reports = prune_streamed(streamed, ids, left, plan, progress=progress)
            for job, report in zip(left, reports, strict=True):
                job.report = report
                _finish(streamed, tokenizer, job, calibration)
        except BaseException as error:
            for job in left:
                kept = job.work.claimed and _leave(job, error)
                if kept and not isinstance(error, CalmixError):
                    say(f"{job.work.done} blocks are kept in {job.work.path}: --resume goes on")
            raise
    finally:
        streamed.close()
    return [job.report for job in jobs if job.report is not None]


class Job(Target):
    """One target, with its output and how far it is.

    Attributes:
        asked: what decides the bytes of the result, as far as it is known before the draw.
        goes_on: whether there is earlier work to go on with.
        report: set when it is finished.
    """

    def __init__(self, output: Path, request: PruneRequest) -> None:
        pattern: Pattern
        if request.pattern is not None:
            pattern = parse_pattern(request.pattern)
        else:
            assert request.sparsity is not None
            pattern = Unstructured(request.sparsity)
        super().__init__(
            WorkFolder(output),
            request.method,
            pattern,
            request.propagation or "sequential",
            request.damping or DAMPING,
        )
        self.output = output
        self.request = request
        self.asked: dict[str, Any] = {}
        self.goes_on = False
        self.report: PruneReport | None = None

    @property
    def finished(self) -> bool:
        """Whether a checkpoint of calmix stands at the output, of whatever request."""
        return (self.output / MANIFEST).is_file()

    def identify(self, streamed: StreamedModel) -> None:
        """Set `asked`."""
        asked = asdict(self.request)
        own = asked["draw"].pop("own", None)
        if own is not None:
            asked["draw"]["sources"] = sha256_json(repr(sorted(own.items())))
        self.asked = {
            "model": fingerprint(streamed.folder),
            "dtype": str(streamed.dtype).removeprefix("torch."),
            "device": streamed.device.type,
            **asked,
            "versions": versions(),
        }

    def recover(self) -> bool:
        """Take the report of an output that an earlier run of the same request has finished."""
        try:
            manifest = json.loads((self.output / MANIFEST).read_text(encoding="utf-8"))
            if manifest["request_sha256"] != sha256_json(self.asked):
                return False
            run = json.loads((self.output / RUN).read_text(encoding="utf-8"))
            done = manifest["pruning"]
            self.report = PruneReport(
                done["method"], done["pattern"], done["propagation"], done["tokens"],
                [LayerReport(**layer) for layer in done["layers"]], run["seconds"],
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.work.remove_leftover()
        return True


def _calibration(
    jobs: Sequence[Job],
    name: str,
    tokenizer: OpenTokenizer,
    how: dict[str, Any],
    writing: Callable[[str, int, int], None] | None,
    note: Callable[[str], None] | None,
) -> CalibrationSet | None:
    """Return the set the targets share, from the work of one that goes on or drawn, and keep it."""
    calibrated = [job for job in jobs if job.request.calibration is not None]
    if not calibrated:
        return None
    kept = next((job for job in calibrated if job.goes_on), None)
    if kept is not None:
        made = kept.work.calibration()
    else:
        made = _draw(calibrated[0].request, name, tokenizer, how, writing, note)
    for job in calibrated:
        if not job.goes_on:
            job.work.keep_calibration(made)
    return made


def _draw(
    request: PruneRequest,
    name: str,
    tokenizer: OpenTokenizer,
    options: dict[str, Any],
    writing: Callable[[str, int, int], None] | None,
    note: Callable[[str], None] | None,
) -> CalibrationSet:
    """Draw the calibration set; the model is opened whole only where its text needs it."""
    assert request.calibration is not None
    whole = needs_model(request.calibration, request.draw.get("select"))
    opened = open_model(name, **options) if whole else tokenizer
    return resolve(request.calibration, opened, writing=writing, note=note, **request.draw)


def _check_vocabulary(
    source: OpenModel | StreamedModel, calibration: CalibrationSet | None
) -> None:
    """Refuse ids the model has no embedding for."""
    known = source.model.get_input_embeddings().weight.shape[0]
    if calibration is not None and (most := int(calibration.ids.max())) >= known:
        raise ModelError(
            f"{source.name} has no usable tokenizer: it gives id {most}, and the model has "
            f"embeddings for {known}"
        )


def _leave(job: Job, error: BaseException) -> bool:
    """Keep the work that a later run can go on with, and nothing else; return whether it stays.

    A mistake would meet the same end again; a full disk, an interrupt or a defect need not. What
    an earlier run has left is kept whatever happens.
    """
    work = job.work
    work.settle()
    again = isinstance(error, DiskError) or not isinstance(error, CalmixError)
    stays = job.goes_on or (work.done > 0 and again)
    if stays:
        work.close()
    else:
        work.abandon()
    return stays


def _manifest(
    name: str,
    model_sha256: str,
    dtype: torch.dtype,
    device: str,
    report: PruneReport,
    calibration: CalibrationSet | None,
    request: PruneRequest | None,
    trusted: bool,
) -> tuple[dict[str, Any], dict[str, float]]:
    done = report.to_json()
    seconds = done.pop("seconds")
    manifest: dict[str, Any] = {
        "kind": "pruned checkpoint",
        "model": {"name": name, "sha256": model_sha256},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "trust_remote_code": trusted,
        "request": None if request is None else request_record(request),
        "calibration": None if calibration is None else calibration.manifest,
        "pruning": done,
        "versions": versions(),
    }
    return manifest, seconds


def _write_beside(
    folder: Path,
    source: OpenModel | StreamedModel,
    manifest: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Write code and processor files that came with the model, the manifest and the run record."""
    for kind in PROCESSOR_FILES:
        for path in source.folder.glob(kind):
            if not (folder / path.name).exists():
                shutil.copy(path, folder / path.name)
    if source.trust_remote_code:
        for code in source.folder.glob("*.py"):
            shutil.copy(code, folder / code.name)
    hashed = {"files": file_hashes(folder, without=(MANIFEST, RUN))}
    write_json(folder / MANIFEST, sealed(manifest | hashed))
    write_json(folder / RUN, run)


def _finish(
    streamed: StreamedModel,
    tokenizer: OpenTokenizer,
    job: Job,
    calibration: CalibrationSet | None,
) -> None:
    """Write all that stands beside the weights, and turn the work into the output."""
    assert job.report is not None
    manifest, seconds = _manifest(
        streamed.name,
        job.asked["model"],
        streamed.dtype,
        streamed.device.type,
        job.report,
        calibration if job.request.calibration is not None else None,
        job.request,
        streamed.trust_remote_code,
    )
    manifest["request_sha256"] = sha256_json(job.asked)
    model, work, folder = streamed.model, job.work, job.work.checkpoint
    assert work.writer is not None
    with disk_errors(work.path), quiet_transformers():
        work.writer.write_index()
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(streamed.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.tokenizer.save_pretrained(folder)
        run = run_record(seconds) | {"batch": work.batch}
        _write_beside(folder, streamed, manifest, run)
    work.complete()


def _prune_whole(
    name: str,
    jobs: Sequence[Job],
    how: dict[str, Any],
    started: Callable[[CalibrationSet | None], None] | None,
    progress: Callable[[int, int], None] | None,
    writing: Callable[[str, int, int], None] | None,
    note: Callable[[str], None] | None,
) -> list[PruneReport]:
    """Prune a model that transformers has to load as a whole, once for each target."""
    calibration: CalibrationSet | None = None
    reports = []
    for number, job in enumerate(jobs):
        opened = open_model(name, **how)
        check_space(opened, job.output)
        request = job.request
        if calibration is None and request.calibration is not None:
            calibration = resolve(
                request.calibration, opened, writing=writing, note=note, **request.draw
            )
        _check_vocabulary(opened, calibration)
        if not number and started is not None:
            started(calibration)
        calibrated = None if request.calibration is None else calibration

        def tick(done: int, blocks: int, before: int = number) -> None:
            if progress is not None:
                progress(before * blocks + done, len(jobs) * blocks)

        report = prune(
            opened.model,
            None if calibrated is None else calibrated.ids,
            method=job.method,
            pattern=job.pattern,
            propagation=job.propagation,
            damping=job.damping,
            progress=tick,
        )
        write_checkpoint(opened, job.output, report, calibrated, request)
        reports.append(report)
    return reports


def write_checkpoint(
    opened: OpenModel,
    output: Path,
    report: PruneReport,
    calibration: CalibrationSet | None,
    request: PruneRequest | None = None,
) -> None:
    """Write model, tokenizer, manifest and run record to a folder, whole or not at all."""
    model = opened.model
    manifest, seconds = _manifest(
        opened.name, opened.fingerprint, model.dtype, model.device.type, report, calibration,
        request, opened.trust_remote_code,
    )  # fmt: skip
    with atomic_folder(output) as folder, quiet_transformers():
        model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
        _write_beside(folder, opened, manifest, run_record(seconds))


def check_space(opened: OpenModel, output: Path) -> None:
    """Refuse before the work starts if the checkpoint will not fit on the disk.

    Raises:
        InputError: less is free than the weights take.
    """
    needed = sum(p.numel() * p.element_size() for p in opened.model.parameters())
    _check_free(real_place(output), needed, "the checkpoint takes")


def _check_space(streamed: StreamedModel, jobs: Sequence[Job], ids: torch.Tensor | None) -> None:
    """Refuse before the work starts if checkpoints and hidden states will not fit on the disk."""
    files = stored_types(streamed).values()
    weights = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for tensors in files
        for dtype, shape in tensors.values()
    )
    states = 0
    if ids is not None:
        config = streamed.model.config.get_text_config(decoder=True)
        states = 2 * ids.numel() * getattr(config, "hidden_size", 0) * streamed.dtype.itemsize
    for job in jobs:
        what = "the checkpoint takes" if ids is None else "checkpoint and hidden states take"
        held = sum(p.stat().st_blocks * 512 for p in job.work.path.rglob("*") if p.is_file())
        _check_free(job.work.output, len(jobs) * (weights + states) - held, what)


def _check_free(output: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise DiskError(
            f"no space left for {output}: {what} {needed / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free"
        )
