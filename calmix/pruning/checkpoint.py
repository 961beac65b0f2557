"""From a request to a pruned checkpoint on disk: plain dense safetensors that load anywhere.

Nothing about sparsity goes into config.json (inference engines refuse models that carry such
keys). What was done stands beside the weights: `calmix.json`, the same for the same inputs, and
`calmix-run.json`, which holds date and seconds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import (
    Asked,
    CalibrationSet,
    OpenTokenizer,
    ask,
    open_tokenizer,
    resolve,
    saved_set,
)
from calmix.errors import (
    CalmixError,
    DeviceMemoryError,
    DiskError,
    InputError,
    ModelError,
    disk_errors,
)
from calmix.files import atomic_folder, check_free, check_output_folder, sha256_json, write_json
from calmix.manifest import (
    asked_record,
    deciding_versions,
    file_hashes,
    request_record,
    run_record,
    sealed,
    versions,
)
from calmix.models import OpenModel, open_model
from calmix.models.opening import check_ids, check_models, fingerprint, quiet_transformers
from calmix.models.streaming import NotStreamableError, StreamedModel, WeightSource, WholeModel
from calmix.pruning import distributed
from calmix.pruning.allocation import SPREAD, from_shares, looker
from calmix.pruning.budget import Plan
from calmix.pruning.engine import Patterns, check_pattern, with_room
from calmix.pruning.expert_pruning import ScorePass, chosen_experts, unscored, write_dropped
from calmix.pruning.methods import Look, get_method
from calmix.pruning.old_states import FILES
from calmix.pruning.old_work import WorkFolder
from calmix.pruning.patterns import Unstructured, as_pattern
from calmix.pruning.report import Dropped, PruneReport
from calmix.pruning.streamed import (
    Target,
    look_streamed,
    pass_through,
    plan_for,
    prepare_files,
    prune_streamed,
)
from calmix.pruning.trace import token_bytes
from calmix.specs import NONE, PruneRequest, RecoverRequest

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
    checkpoint_every: float | None = None,
    started: Callable[[CalibrationSet | None], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[PruneReport]:
    """Draw a model's calibration set, prune the model block by block and write checkpoints.

    Weights come from disk and go back one block at a time. What is done is kept beside each
    output, so that an interrupted prune goes on with `resume`. Of several processes
    (`calmix.pruning.distributed`) the first one draws, writes and tells.

    Args:
        name: the model, as `open_model` takes it.
        targets: what to do, from `prune_request`, by the folder to write; each folder appears
            whole or not at all. All that calibrate do so on one set, the first one's.
        overwrite: replace what is there, and an interrupted run's work.
        resume: go on with an interrupted run of the same request, if there is one.
        max_memory: bytes the process may hold; None for what is free.
        checkpoint_every: seconds that an interruption may cost, 0 for a block at most; None for
            what `WorkFolder` does.
        started: called once the calibration set is ready.
        progress: called with (blocks done, blocks), those of all targets.
        writing, note: as for `calmix.calibration.resolve`.

    Returns:
        A report for each target, in order.

    Raises:
        CalmixError: anything a user can mend, before an output is touched.
    """
    began = time.perf_counter()
    leads = distributed.processes()[0] == 0
    say = note if note is not None and leads else (lambda line: None)

    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    distributed.host_group()
    distributed.once(
        lambda: check_request(name, targets, resume=resume, overwrite=overwrite, **how)
    )
    source = _open(name, max_memory, dtype, device, trust_remote_code)
    try:
        names = {(r.only, r.skip, r.drop_experts, r.method == NONE) for r in targets.values()}
        if len(names) > 1:
            raise InputError("--only, --skip and --drop-experts are the same for all targets")
        only, skip, _, drops_alone = names.pop()
        source.blocks = source.blocks.select(only, skip)
        jobs = [
            _job(output, request, source, checkpoint_every) for output, request in targets.items()
        ]
        done = distributed.once(lambda: {j.output: _finished(j) for j in jobs} if resume else {})
        reports = {output: report for output, report in done.items() if report is not None}
        for output in reports:
            say(f"{output} was finished by an earlier run")
        left = [job for job in jobs if job.output not in reports]
        works = [job.work for job in left]
        try:
            for job in left:
                job.work.goes_on = distributed.once(
                    partial(job.work.claim, job.asked, resume=resume, overwrite=overwrite)
                )
            tokenizer = open_tokenizer(name, trust_remote_code=trust_remote_code)
            looked = [looker(job.allocation) for job in left if job.allocation in SPREAD]

            def planned_for(ids: torch.Tensor | None) -> Plan:
                plan = _agreed(plan_for(source, ids, left, budget=max_memory, beside=looked))
                distributed.once(partial(_check_space, source, left, ids, plan))
                return plan

            drops = any(job.request.drop_experts is not None for job in left)  # it gets smaller
            if left and not drops and not any(work.goes_on for work in works):
                planned_for(_undrawn(left))
            calibration = distributed.once(
                lambda: _calibration(left, source, tokenizer, dtype, device, writing, note)
            )
            ids = None if calibration is None else calibration.ids
            if ids is not None:
                check_ids(name, source.model.get_input_embeddings(), ids)
            dropped: list[Dropped] = []
            if drops:
                assert ids is not None
                source, dropped = _dropped(source, ids, left, max_memory, say)
            plan = planned_for(ids)
            for work in works:
                prepare_files(source, work)
            if left and leads and started is not None:
                started(calibration)
            for work in works:
                if work.upgraded:
                    say(work.upgraded)
                if work.goes_on and not drops_alone:
                    say(f"going on after {work.done} of {len(source.blocks)} blocks")
            if drops_alone:
                made = [_dropped_alone(job, ids, began) for job in left]
            else:
                count, length = (1, 1) if ids is None else ids.shape
                named = () if calibration is None else calibration.sources

                def pruned(rows: int) -> list[PruneReport]:
                    own = replace(plan, micro_tokens=rows * length)
                    jobs = _allocated(source, ids, left, own)
                    return prune_streamed(source, ids, jobs, own, sources=named, progress=progress)

                made = with_room(
                    pruned, min(count, plan.micro_tokens // length), source.device,
                    partial(_undone, source, works), say,
                )  # fmt: skip
            for job, report in zip(left, made, strict=True):
                report.dropped = dropped
                if leads:
                    _finish(source, tokenizer, job, report, calibration)
                reports[job.output] = report
        except BaseException as error:
            for work in works:
                kept = work.claimed and _leave(work, error)
                if kept and not _is_mistake(error):
                    what = f"{work.done} blocks" if work.done else "the experts' scores"
                    say(f"{what} are kept in {work.path}: --resume goes on")
            raise
    finally:
        source.close()
    return [reports[job.output] for job in jobs]


def check_request(
    name: str,
    targets: Mapping[Path, PruneRequest],
    recovery: RecoverRequest | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    **how: Any,
) -> Asked | None:
    """Refuse what can be known to go wrong before a model is fetched or text is drawn.

    Args:
        recovery: of each target.
        **how: as `check_models` takes it.
        name, targets, resume, overwrite: as for `prune_checkpoints`.

    Returns:
        the calibration set; None without one, or where an earlier run may have drawn it.

    Raises:
        CalmixError: as `prune_checkpoints`.
    """
    request, asked = _calibrated(targets.values()) or recovery, None
    inputs: list[object] = [name]
    if request is not None:
        inputs.append(saved_set(request.calibration))
        if not resume:
            asked = ask(str(request.calibration), **request.draw)
            inputs += asked.files
    for output in targets:
        finished = resume and (output / MANIFEST).is_file()
        check_output_folder(output, inputs=inputs, overwrite=overwrite or finished)
    check_models(name, **how)
    return asked


def _calibrated(requests: Iterable[PruneRequest]) -> PruneRequest | None:
    """Return the request whose calibration set all share."""
    return next((request for request in requests if request.calibration is not None), None)


def _undrawn(jobs: Sequence[Job]) -> torch.Tensor | None:
    """Return ids without values, as many as the calibration set will have."""
    if (request := _calibrated(job.request for job in jobs)) is None:
        return None
    asked = ask(str(request.calibration), **request.draw)
    return torch.empty(asked.draw.rows, asked.draw.length, dtype=torch.int64, device="meta")


def planned(
    name: str,
    targets: Mapping[Path, PruneRequest],
    rows: int,
    length: int,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    max_memory: int | None = None,
) -> tuple[int, int]:
    """Return the bytes a prune will hold at its peak, and those of each checkpoint, unpruned.

    Nothing is written, and only headers are read, unless the model must be opened whole.

    Args:
        rows, length: of the calibration set; 0 without one.
        name, targets, dtype, device, trust_remote_code, max_memory: as for `prune_checkpoints`.

    Raises:
        CalmixError: as `prune_checkpoints`, as far as it can be known.
    """
    source = _open(name, max_memory, dtype, device, trust_remote_code)
    try:
        first = next(iter(targets.values()))
        source.blocks = source.blocks.select(first.only, first.skip)
        jobs = [_job(output, request, source) for output, request in targets.items()]
        looked = [looker(job.allocation) for job in jobs if job.allocation in SPREAD]
        if first.drop_experts is not None:
            looked.append(ScorePass(source.model, source.blocks).method)
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta") if rows else None
        plan = plan_for(source, ids, jobs, budget=max_memory, beside=looked)
        return plan.needed, _checkpoint_bytes(source)
    finally:
        source.close()


def _undone(source: WeightSource, works: Sequence[WorkFolder]) -> bool:
    """Make all as it was before any block; unless one counts as done, which is not thrown away."""
    for work in works:
        work.wait()
        work.states = None
    if any(work.done for work in works):
        return False
    source.reset()
    return True


def _agreed(plan: Plan) -> Plan:
    """Return what every process has the memory for: all gather for the same experts at a time."""
    plans = distributed.everyone(plan)
    return Plan(
        micro_tokens=min(one.micro_tokens for one in plans),
        paused=min((one.paused for one in plans if one.paused is not None), default=None),
        overlap=all(one.overlap for one in plans),
        needed=max(one.needed for one in plans),
        expert_bytes=min(one.expert_bytes for one in plans),
        states=min(one.states for one in plans),
    )


def _open(
    name: str, max_memory: int | None, dtype: str, device: str, trust_remote_code: bool
) -> WeightSource:
    """Open a model block by block if its files allow it, else as a whole."""
    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    try:
        return StreamedModel(name, **how)
    except NotStreamableError as error:
        if max_memory is not None:
            raise InputError(
                f"{name} cannot be pruned block by block, because {error}: leave out --max-memory"
            ) from error
        return WholeModel(name, **how)


def _dropped(
    source: WeightSource,
    ids: torch.Tensor,
    jobs: Sequence[Job],
    max_memory: int | None,
    say: Callable[[str], None],
) -> tuple[StreamedModel, list[Dropped]]:
    """Return the model without the experts that count least, in the first job's work folder.

    Raises:
        ModelError: the architecture's experts cannot be dropped.
        InputError: it has none, or too few would be left.
    """
    request, work = jobs[0].request, jobs[0].work
    share = request.drop_experts
    assert share is not None
    blocks = source.blocks.select()
    if not any(blocks.mixtures(index) for index in range(len(blocks))):
        raise InputError("--drop-experts has no effect: this model has no experts")
    if not isinstance(source, StreamedModel):
        raise ModelError("--drop-experts needs a model that can be read block by block")
    dropped = distributed.once(lambda: next((d for job in jobs if (d := job.work.dropped())), []))
    if not dropped:
        chosen_experts(source.model, {m.name: [0.0] * m.count for i in range(len(blocks))
                                      for m in blocks.mixtures(i)}, share)  # fmt: skip

        def scored(rows: int) -> dict[str, list[float]]:
            look = ScorePass(source.model, blocks)
            own = replace(plan, micro_tokens=rows * ids.shape[1])
            return pass_through(source, ids, look, work, own).scores

        beside = [ScorePass(source.model, blocks).method]
        plan = _agreed(plan_for(source, ids, [], budget=max_memory, beside=beside))
        rows = min(len(ids), plan.micro_tokens // ids.shape[1])
        scores = with_room(scored, rows, source.device, partial(_undone, source, []), say)
        dropped = distributed.once(lambda: chosen_experts(source.model, scores, share))
    if lost := unscored(source):
        names = ", ".join(sorted(layer.strip(".") for layer in lost))
        say(f"{names}: left out, as it predicts further tokens with experts that nobody scored")
    # Where nothing is pruned it is the result.
    folder = work.checkpoint if request.method == NONE else work.path / "dropped"

    def write() -> None:
        for job in jobs:
            job.work.keep_dropped(dropped)
        write_dropped(source, dropped, folder)

    distributed.once(write)
    try:
        made = StreamedModel(
            str(folder), dtype=str(source.dtype).removeprefix("torch."),
            device=str(source.device), trust_remote_code=source.trust_remote_code,
        )  # fmt: skip
    except NotStreamableError as error:
        raise ModelError(f"--drop-experts does not work with this architecture: {error}") from error
    source.close()
    made.name, made.folder = source.name, source.folder
    made.blocks = made.blocks.select(source.blocks.only, source.blocks.skip)
    return made, dropped


def _dropped_alone(job: Job, ids: torch.Tensor | None, began: float) -> PruneReport:
    """Return the report of a job whose experts have gone, and nothing else."""
    assert ids is not None
    report = PruneReport("reap", "none", None, ids.numel(), rows=len(ids))
    report.seconds = {"total": time.perf_counter() - began}
    return report


@dataclass(frozen=True, kw_only=True)
class Job(Target):
    """One target with its output.

    Attributes:
        request: as it was asked for.
        asked: what decides the bytes of the result, as far as it is known before the draw.
    """

    output: Path
    request: PruneRequest
    asked: dict[str, Any]


def _job(
    output: Path,
    request: PruneRequest,
    source: WeightSource,
    checkpoint_every: float | None = None,
) -> Job:
    """Return what a request means for a model; a look at the model may decide its pattern yet."""
    # Where only experts are dropped these are not looked at.
    drops = request.method == NONE
    method = Look() if drops else get_method(request.method, **request.options)
    pattern: Patterns = Unstructured(0.5)
    if request.method == NONE:
        pass
    elif request.pattern is not None:
        pattern = as_pattern(request.pattern)
    else:
        assert request.sparsity is not None
        pattern = Unstructured(request.sparsity)
    allocation = request.allocation
    if isinstance(allocation, dict):
        assert request.sparsity is not None
        pattern = from_shares(allocation, source.blocks, request.sparsity, method)
        allocation = "given"
    check_pattern(source.blocks, pattern)
    return Job(
        work=WorkFolder(output, checkpoint_every, *distributed.processes()),
        method=method, pattern=pattern, allocation=allocation,
        propagation=request.propagation or "sequential", output=output, request=request,
        asked=asked_of(request, source),
    )  # fmt: skip


def asked_of(request: PruneRequest, source: WeightSource) -> dict[str, Any]:
    """Return what decides the bytes of a result, as far as it is known before the draw."""
    return {
        "model": distributed.once(partial(fingerprint, source.folder)),
        "dtype": str(source.dtype).removeprefix("torch."),
        "device": source.device.type,
        "processes": distributed.processes()[
            1
        ],  # their shares decide in which order sums are taken
        **asked_record(request),
        "only": list(request.only),
        "skip": list(request.skip),
        "versions": deciding_versions(),
    }


def _finished(job: Job) -> PruneReport | None:
    """Return the report of an output that an earlier run of the same request has finished."""
    try:
        manifest = json.loads((job.output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["request_sha256"] != sha256_json(job.asked):
            return None
        run = json.loads((job.output / RUN).read_text(encoding="utf-8"))
        report = told_report(manifest, run)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    job.work.remove_leftover()
    return report


def told_report(manifest: Mapping[str, Any], run: Mapping[str, Any]) -> PruneReport:
    """Return the report that a manifest and its run record tell."""
    done = manifest["pruning"]
    report = PruneReport(
        done["method"], done["pattern"], done["propagation"], done["tokens"],
        done["options"], done["allocation"], done["rows"], done["rows_at_once"],
        seconds=run["seconds"],
    )  # fmt: skip
    report.restore(done)
    return report


def _allocated(
    source: WeightSource, ids: torch.Tensor | None, jobs: Sequence[Job], plan: Plan
) -> list[Job]:
    """Return jobs with patterns by layer where a look at the dense model decides them, or did."""
    kept = {job.output: job.work.allocation() for job in jobs if job.allocation in SPREAD}
    for by in SPREAD:
        asking = [job for job in jobs if job.allocation == by and kept[job.output] is None]
        if asking:
            assert ids is not None
            shares = sorted({job.request.sparsity or 0.0 for job in asking})
            look = look_streamed(source, ids, by, shares, asking[0].work, plan)
            for job in asking:
                found = look.patterns(job.request.sparsity or 0.0, job.method)
                job.work.keep_allocation(found)
                kept[job.output] = found
    return [replace(job, pattern=kept.get(job.output) or job.pattern) for job in jobs]


def _calibration(
    jobs: Sequence[Job],
    source: WeightSource,
    tokenizer: OpenTokenizer,
    dtype: str,
    device: str,
    writing: Callable[[str, int, int], None] | None,
    note: Callable[[str], None] | None,
) -> CalibrationSet | None:
    """Return the set the targets share, from the work of one that goes on or drawn, and keep it.

    The model is opened whole only where its text needs it.
    """
    calibrated = [job for job in jobs if job.request.calibration is not None]
    if not calibrated:
        return None
    kept = next((job.work for job in calibrated if job.work.goes_on), None)
    if kept is not None:
        made = kept.calibration()
    else:
        request = calibrated[0].request
        assert request.calibration is not None
        opened: OpenModel | OpenTokenizer = tokenizer
        asked = ask(request.calibration, context=tokenizer.context, **request.draw)
        if asked.runs_model:
            opened = source.opened or open_model(
                source.name, dtype=dtype, device=device, trust_remote_code=source.trust_remote_code
            )
        made = resolve(request.calibration, opened, writing=writing, note=note, **request.draw)
    for job in calibrated:
        if not job.work.goes_on:
            job.work.keep_calibration(made)
    return made


def _is_mistake(error: BaseException) -> bool:
    return isinstance(error, CalmixError) and not isinstance(error, distributed.PeerError)


def _leave(work: WorkFolder, error: BaseException) -> bool:
    """Keep the work that a later run can go on with, and nothing else; return whether it stays.

    A mistake would meet the same end again; a full disk, an interrupt, a defect or another
    process's end need not. What an earlier run has left is kept whatever happens.
    """
    work.settle()
    again = isinstance(error, DiskError | DeviceMemoryError) or not _is_mistake(error)
    stays = work.goes_on or (work.begun and again)
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
    source: OpenModel | WeightSource,
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
    source: WeightSource,
    tokenizer: OpenTokenizer,
    job: Job,
    report: PruneReport,
    calibration: CalibrationSet | None,
) -> None:
    """Write all that stands beside the weights, and turn the work into the output."""
    manifest, seconds = _manifest(
        source.name,
        job.asked["model"],
        source.dtype,
        source.device.type,
        report,
        calibration if job.request.calibration is not None else None,
        job.request,
        source.trust_remote_code,
    )
    manifest["request_sha256"] = sha256_json(job.asked)
    work = job.work
    assert work.writer is not None
    with disk_errors(work.path), quiet_transformers():
        source.save(work.writer, work.checkpoint)
        tokenizer.tokenizer.save_pretrained(work.checkpoint)
        run = run_record(seconds) | {"batch": work.batch, "processes": work.processes}
        _write_beside(work.checkpoint, source, manifest, run)
    work.complete()


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
    check_free(output, needed, "the checkpoint takes")


def _check_space(
    source: WeightSource, jobs: Sequence[Job], ids: torch.Tensor | None, plan: Plan
) -> None:
    """Refuse before the work starts if checkpoints and hidden states will not fit on the disk."""
    weights = _checkpoint_bytes(source)
    states = 0
    if ids is not None:
        states = ids.numel() * token_bytes(source.model, source.blocks)
        stay = plan.states * distributed.processes()[1] >= len(jobs) * states
        states *= FILES - stay  # one more is read where they do not stay in memory
    for job in jobs:
        what = "the checkpoint takes" if ids is None else "checkpoint and hidden states take"
        held = sum(p.stat().st_blocks * 512 for p in job.work.path.rglob("*") if p.is_file())
        check_free(job.work.output, len(jobs) * (weights + states) - held, what)


def _checkpoint_bytes(source: WeightSource) -> int:
    return sum(
        torch.Size(shape).numel() * dtype.itemsize
        for tensors in source.files().values()
        for dtype, shape in tensors.values()
    )
