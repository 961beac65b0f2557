"""From a request to a pruned checkpoint on disk: plain dense safetensors that load anywhere.

Nothing about sparsity goes into config.json (inference engines refuse models that carry such
keys). What was done stands beside the weights: `calmix.json`, the same for the same inputs, and
`calmix-run.json`, which holds date and seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import CalibrationSet, open_tokenizer, resolve
from calmix.calibration.resolving import needs_model
from calmix.calibration.tokenizer import OpenTokenizer
from calmix.errors import CalmixError, InputError, disk_errors
from calmix.files import atomic_folder, check_output_folder, sha256_json, write_json
from calmix.manifest import run_record, versions
from calmix.models import OpenModel, open_model
from calmix.models.opening import fingerprint, quiet_transformers
from calmix.models.streaming import NotStreamableError, StreamedModel, stored_types
from calmix.pruning.engine import LayerReport, PruneReport, prune
from calmix.pruning.patterns import Pattern, Unstructured, parse_pattern
from calmix.pruning.streamed import plan_for, prepare_files, prune_streamed
from calmix.pruning.work import WorkFolder
from calmix.specs import DAMPING, PruneRequest

MANIFEST, RUN = "calmix.json", "calmix-run.json"


def prune_checkpoint(
    name: str,
    output: Path,
    request: PruneRequest,
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
) -> PruneReport:
    """Draw a model's calibration set, prune the model block by block and write the checkpoint.

    Weights come from disk and go back one block at a time. What is done is kept beside the
    output, so that an interrupted prune goes on with `resume`.

    Args:
        name: the model, as `open_model` takes it.
        output: folder to write; it appears whole or not at all.
        request: what to do, from `prune_request`.
        overwrite: replace what is at `output`, and an interrupted run's work.
        resume: go on with an interrupted run of the same request, if there is one.
        max_memory: bytes the process may hold; None for what is free.
        started: called once the calibration set is ready.
        progress: called with (blocks done, blocks).
        writing, note: as for `calmix.calibration.resolve`.

    Raises:
        CalmixError: anything a user can mend, before `output` is touched.
    """
    pattern: Pattern
    if request.pattern is not None:
        pattern = parse_pattern(request.pattern)
    else:
        assert request.sparsity is not None
        pattern = Unstructured(request.sparsity)
    options: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    maybe_finished = resume and (output / MANIFEST).is_file()
    if not maybe_finished:
        check_output_folder(output, overwrite=overwrite)
    say = note or (lambda line: None)
    try:
        streamed = StreamedModel(name, **options)
    except NotStreamableError as error:
        if max_memory is not None or resume:
            option = "--max-memory" if max_memory is not None else "--resume"
            raise InputError(
                f"{name} cannot be pruned block by block, because transformers converts its "
                f"weights while it loads them (first {error}): leave out {option}"
            ) from error
        return _prune_whole(
            name, output, request, pattern, options, started, progress, writing, note
        )
    try:
        asked = _identity(streamed, request)
        if maybe_finished:
            if (report := _finished(output, asked)) is not None:
                say(f"{output} was finished by an earlier run")
                WorkFolder(output).remove_leftover()
                return report
            check_output_folder(output, overwrite=overwrite)
        work = WorkFolder(output)
        goes_on = work.claim(asked, resume=resume, overwrite=overwrite)
        try:
            tokenizer = open_tokenizer(name, trust_remote_code=trust_remote_code)
            calibration = None
            if request.calibration is not None:
                if goes_on:
                    calibration = work.calibration()
                else:
                    calibration = _draw(request, name, tokenizer, options, writing, note)
                    work.keep_calibration(calibration)
            ids = None if calibration is None else calibration.ids
            propagation = request.propagation or "sequential"
            plan = plan_for(
                streamed, ids, method=request.method, propagation=propagation, budget=max_memory
            )
            _check_space(streamed, work, ids)
            prepare_files(streamed, work)
            if started is not None:
                started(calibration)
            if goes_on:
                say(f"going on after {work.done} of {len(streamed.blocks)} blocks")
            report = prune_streamed(
                streamed,
                ids,
                work,
                plan,
                method=request.method,
                pattern=pattern,
                propagation=propagation,
                damping=request.damping or DAMPING,
                progress=progress,
            )
            _finish(streamed, tokenizer, work, asked, report, calibration)
        except BaseException as error:
            _leave(work, error)
            raise
        return report
    finally:
        streamed.close()


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


def _identity(streamed: StreamedModel, request: PruneRequest) -> dict[str, Any]:
    """Return what decides the bytes of the result, as far as it is known before the draw."""
    asked = asdict(request)
    own = asked["draw"].pop("own", None)
    if own is not None:
        asked["draw"]["sources"] = sha256_json(repr(sorted(own.items())))
    return {
        "model": fingerprint(streamed.folder),
        "dtype": str(streamed.dtype).removeprefix("torch."),
        "device": streamed.device.type,
        **asked,
        "versions": versions(),
    }


def _finished(output: Path, asked: dict[str, Any]) -> PruneReport | None:
    """Return the report of an output if an earlier run of the same request has finished it."""
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        seconds = json.loads((output / RUN).read_text(encoding="utf-8"))["seconds"]
        held = manifest["request_sha256"]
        done = manifest["pruning"]
        report = PruneReport(
            done["method"], done["pattern"], done["propagation"], done["tokens"],
            [LayerReport(**layer) for layer in done["layers"]], seconds,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{output} exists and holds something else: name another output"
        ) from error
    if held != sha256_json(asked):
        raise InputError(
            f"{output} is the finished result of another request: name another output, or use "
            "--overwrite without --resume"
        )
    return report


def _leave(work: WorkFolder, error: BaseException) -> None:
    """Keep the work that a later run can go on with, and nothing else.

    A mistake would meet the same end again; a full disk, an interrupt or a defect need not.
    """
    disk = "no space left" in str(error) or "cannot write" in str(error)
    if work.done and (disk or not isinstance(error, CalmixError)):
        work.close()
    else:
        work.abandon()


def _manifest(
    name: str,
    model_sha256: str,
    dtype: torch.dtype,
    device: str,
    report: PruneReport,
    calibration: CalibrationSet | None,
) -> tuple[dict[str, Any], dict[str, float]]:
    done = report.to_json()
    seconds = done.pop("seconds")
    manifest: dict[str, Any] = {
        "kind": "pruned checkpoint",
        "model": {"name": name, "sha256": model_sha256},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "calibration": None if calibration is None else calibration.manifest,
        "pruning": done,
        "versions": versions(),
    }
    return manifest, seconds


def _finish(
    streamed: StreamedModel,
    tokenizer: OpenTokenizer,
    work: WorkFolder,
    asked: dict[str, Any],
    report: PruneReport,
    calibration: CalibrationSet | None,
) -> None:
    """Write all that stands beside the weights, and turn the work into the output."""
    manifest, seconds = _manifest(
        streamed.name, asked["model"], streamed.dtype, streamed.device.type, report, calibration
    )
    manifest["request_sha256"] = sha256_json(asked)
    model, folder = streamed.model, work.checkpoint
    assert work.writer is not None
    with disk_errors(work.path), quiet_transformers():
        work.writer.write_index()
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(streamed.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.tokenizer.save_pretrained(folder)
        if streamed.trust_remote_code:
            for code in streamed.folder.glob("*.py"):
                shutil.copy(code, folder / code.name)
        write_json(folder / MANIFEST, manifest)
        write_json(folder / RUN, run_record(seconds))
    work.complete()


def _prune_whole(
    name: str,
    output: Path,
    request: PruneRequest,
    pattern: Pattern,
    options: dict[str, Any],
    started: Callable[[CalibrationSet | None], None] | None,
    progress: Callable[[int, int], None] | None,
    writing: Callable[[str, int, int], None] | None,
    note: Callable[[str], None] | None,
) -> PruneReport:
    """Prune a model that transformers has to load as a whole."""
    opened = open_model(name, **options)
    check_space(opened, output)
    calibration = None
    if request.calibration is not None:
        calibration = resolve(
            request.calibration, opened, writing=writing, note=note, **request.draw
        )
    if started is not None:
        started(calibration)
    report = prune(
        opened.model,
        None if calibration is None else calibration.ids,
        method=request.method,
        pattern=pattern,
        propagation=request.propagation or "sequential",
        damping=request.damping or DAMPING,
        progress=progress,
    )
    write_checkpoint(opened, output, report, calibration)
    return report


def write_checkpoint(
    opened: OpenModel, output: Path, report: PruneReport, calibration: CalibrationSet | None
) -> None:
    """Write model, tokenizer, manifest and run record to a folder, whole or not at all."""
    model = opened.model
    manifest, seconds = _manifest(
        opened.name, opened.fingerprint, model.dtype, model.device.type, report, calibration
    )
    with atomic_folder(output) as folder, quiet_transformers():
        model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
        if opened.trust_remote_code:
            for code in opened.folder.glob("*.py"):
                shutil.copy(code, folder / code.name)
        write_json(folder / MANIFEST, manifest)
        write_json(folder / RUN, run_record(seconds))


def check_space(opened: OpenModel, output: Path) -> None:
    """Refuse before the work starts if the checkpoint will not fit on the disk.

    Raises:
        InputError: less is free than the weights take.
    """
    needed = sum(p.numel() * p.element_size() for p in opened.model.parameters())
    _check_free(output, needed, "the checkpoint takes")


def _check_space(streamed: StreamedModel, work: WorkFolder, ids: torch.Tensor | None) -> None:
    """Refuse before the work starts if checkpoint and hidden states will not fit on the disk."""
    files = stored_types(streamed).values()
    needed = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for tensors in files
        for dtype, shape in tensors.values()
    )
    what = "the checkpoint takes"
    if ids is not None:
        config = streamed.model.config.get_text_config(decoder=True)
        width = getattr(config, "hidden_size", 0)
        needed += 2 * ids.numel() * width * streamed.dtype.itemsize
        what = "the checkpoint and hidden states take"
    held = sum(p.stat().st_blocks * 512 for p in work.path.rglob("*") if p.is_file())
    _check_free(work.output, needed - held, what)


def _check_free(output: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise InputError(
            f"no space left for {output}: {what} {needed / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free"
        )
