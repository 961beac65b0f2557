"""From a request to a pruned checkpoint on disk: plain dense safetensors that load anywhere.

Nothing about sparsity goes into config.json (inference engines refuse models that carry such
keys). What was done stands beside the weights: `calmix.json`, the same for the same inputs, and
`calmix-run.json`, which holds date and seconds.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.calibration import (
    CalibrationSet,
    OpenTokenizer,
    ask,
    open_tokenizer,
    resolve,
    saved_set,
)
from calmix.errors import InputError, ModelError, SolverError, disk_errors
from calmix.files import (
    atomic_folder,
    check_free,
    check_output_folder,
    read_object,
    sha256_json,
    write_json,
)
from calmix.manifest import (
    deciding_versions,
    file_hashes,
    run_record,
    sealed,
    versions,
)
from calmix.models import OpenModel, open_model
from calmix.models.opening import check_ids, check_models, fingerprint, quiet_transformers
from calmix.models.streaming import NotStreamableError, StreamedModel, WeightSource, WholeModel
from calmix.precision import dtype_name
from calmix.pruning import distributed
from calmix.pruning.allocation import SPREAD, DensePass, from_shares, looker
from calmix.pruning.budget import Plan, plan_for
from calmix.pruning.engine import Patterns, check_pattern, with_room
from calmix.pruning.expert_pruning import ScorePass, chosen_experts, unscored, write_dropped
from calmix.pruning.methods import Method
from calmix.pruning.patterns import Unstructured
from calmix.pruning.report import Dropped, PruneReport
from calmix.pruning.streamed import Target, pass_through, prune_streamed
from calmix.pruning.trace import token_bytes
from calmix.pruning.work import WorkFolder
from calmix.specs import NONE, How, PruneRequest

# Of models of images or sound, opened as models of text.
PROCESSOR_FILES = ("*processor_config.json", "chat_template.*")
MANIFEST, RUN = "calmix.json", "calmix-run.json"


def prune_checkpoints(
    name: str, targets: Mapping[Path, PruneRequest], **how: Any
) -> list[PruneReport]:
    """Draw a model's calibration set, prune the model block by block and write checkpoints.

    Weights come from disk and go back one block at a time. Finished blocks are kept beside each
    output, so that an interrupted run can be resumed. Of several processes
    (`calmix.pruning.distributed`) the first one draws, writes and reports.

    Args:
        name: the model, as `open_model` takes it.
        targets: what to do, from `prune_request`, by the folder to write; each folder appears
            whole or not at all. All that calibrate do so on one set, the first one's.
        **how: as in `calmix.specs.How`.

    Returns:
        A report for each target, in order.
    """
    run = How.of(**how)
    if distributed.processes()[0] != 0:
        run = replace(run, note=How.note, started=How.started)
    distributed.once(lambda: check_request(name, targets, run))
    work = _Pruning(name, targets, run)
    try:
        done = distributed.once(work.finished) if run.resume else {}
        for output in done:
            run.note(f"{output} was finished by an earlier run")
        work.jobs = [job for job in work.jobs if job.output not in done]
        try:
            if work.jobs:
                work.claim()
                work.draw()
                done |= work.prune()
        except BaseException as error:
            for job in work.jobs:
                if job.work.claimed and job.work.leave(error):
                    what = f"{job.work.done} blocks" if job.work.done else "the experts' scores"
                    run.note(f"{what} are kept in {job.work.path}: resume with --resume")
            raise
    finally:
        work.source.close()
    return [done[output] for output in targets]


def check_request(name: str, targets: Mapping[Path, PruneRequest], run: How) -> None:
    """Refuse what can be known to go wrong before a model is fetched or text is drawn."""
    calibrated = (request for request in targets.values() if request.calibration is not None)
    request = next(calibrated, None)
    inputs: list[object] = [name]
    if request is not None:
        inputs.append(saved_set(request.calibration))
        if not run.resume:
            inputs += ask(str(request.calibration), **request.drawn()).files
    for output in targets:
        finished = run.resume and (output / MANIFEST).is_file()
        check_output_folder(output, inputs=inputs, overwrite=run.overwrite or finished)
    check_models(name, **run.opening)


def planned(
    name: str, targets: Mapping[Path, PruneRequest], rows: int, length: int, **how: Any
) -> tuple[int, int]:
    """Return the bytes that pruning will hold at its peak, and those of a checkpoint, unpruned.

    Nothing is written, and only headers are read, unless the model must be opened whole. Rows and
    length are of the calibration set, 0 without one; the others as for `prune_checkpoints`.
    """
    work = _Pruning(name, targets, How.of(**how))
    try:
        return work.plan((rows, length)).needed, work.checkpoint_bytes
    finally:
        work.source.close()


@dataclass(frozen=True, kw_only=True)
class Job(Target):
    """One target with its output; `asked` decides its bytes, as far as it is known by then."""

    output: Path
    request: PruneRequest
    asked: dict[str, Any]


class _Pruning:
    """A call of `prune_checkpoints`: the model, the targets and what they share."""

    def __init__(self, name: str, targets: Mapping[Path, PruneRequest], run: How) -> None:
        self.run, self.say = run, run.note
        self.began = time.perf_counter()
        self.drawn: CalibrationSet | None = None
        self.source: WeightSource
        try:
            self.source = StreamedModel(name, **run.opening)
        except NotStreamableError as error:
            if run.max_memory is not None:
                raise InputError(
                    f"{name} cannot be pruned block by block, because {error}: leave out "
                    "--max-memory"
                ) from error
            self.source = WholeModel(name, **run.opening)
        try:
            alike = {(r.only, r.skip, r.drop_experts, r.method == NONE) for r in targets.values()}
            if len(alike) > 1:
                raise InputError("--only, --skip and --drop-experts are the same for all targets")
            only, skip, self.share, self.drops_alone = alike.pop()
            self.source.blocks = self.source.blocks.select(only, skip)
            self.jobs = [_job(output, request, self.source) for output, request in targets.items()]
        except BaseException:
            self.source.close()
            raise

    @property
    def works(self) -> list[WorkFolder]:
        return [job.work for job in self.jobs]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint."""
        source = self.source
        if isinstance(source, WholeModel):
            return sum(p.nbytes for p in source.model.parameters())
        rest = [name for names in list(source.layout.values())[len(source.blocks) :]
                for name in names]  # fmt: skip
        blocks = sum(map(source.block_bytes, range(len(source.blocks))))
        return blocks + sum(source.shards.places[name].size for name in rest)

    def finished(self) -> dict[Path, PruneReport]:
        """Return the reports of outputs that an earlier run of the same requests has finished."""
        found = {}
        for job in self.jobs:
            told = [read_told(job.output / name) for name in (MANIFEST, RUN)]
            with suppress(KeyError, TypeError):
                if told[0]["request_sha256"] == sha256_json(job.asked):
                    found[job.output] = told_report(*told)
                    job.work.remove_leftover(job.asked)
        return found

    def claim(self) -> None:
        """Take the work folders, and refuse what there is no room for."""
        how = {"resume": self.run.resume, "overwrite": self.run.overwrite}

        def take(job: Job) -> tuple[dict[str, Any], bool]:
            return job.work.claim(job.asked, **how), job.work.resumes

        for job in self.jobs:
            job.work.kept, job.work.resumes = distributed.once(partial(take, job))
        resumed = any(work.resumes for work in self.works)
        if self.share is None and not resumed:  # else it gets smaller, or its set is known
            calibrated = [job.request for job in self.jobs if job.request.calibration is not None]
            shape = 0, 0
            if calibrated:
                asked = ask(str(calibrated[0].calibration), **calibrated[0].drawn())
                shape = asked.draw.rows, asked.draw.length
            self.checked_plan(shape)

    def plan(self, shape: tuple[int, int], *beside: Method) -> Plan:
        """Return how to stay within the memory that every process has."""
        looks = [looker(job.allocation) for job in self.jobs if job.allocation in SPREAD]
        looks += beside
        if self.share is not None and not beside:
            looks.append(ScorePass(self.source.model, self.source.blocks).method)
        jobs = [] if beside else self.jobs
        reports = [work.kept.get("report", {}) for work in self.works]
        earlier = {report.get("rows_at_once", 0) for report in reports} - {0}
        if len(earlier) > 1:
            counts = " and ".join(map(str, sorted(earlier)))
            raise InputError(
                f"the interrupted runs had micro-batches of {counts} rows, because their "
                "--max-memory differed: resume them one by one"
            )
        plans = distributed.everyone(
            plan_for(
                self.source, shape, [job.method for job in jobs] + looks,
                budget=self.run.max_memory, sequential=bool(looks)
                or any(job.propagation == "sequential" and job.method.needs for job in jobs),
                targets=len(jobs), rows_at_once=max(earlier, default=0),
            )
        )  # fmt: skip
        return Plan(
            micro_tokens=min(one.micro_tokens for one in plans),
            paused=min((one.paused for one in plans if one.paused is not None), default=None),
            overlap=all(one.overlap for one in plans),
            needed=max(one.needed for one in plans),
            expert_bytes=min(one.expert_bytes for one in plans),
            states=min(one.states for one in plans),
        )

    def checked_plan(self, shape: tuple[int, int]) -> Plan:
        """Return the plan, and refuse what the disk has no room for."""
        plan = self.plan(shape)
        tokens = shape[0] * shape[1]
        states = tokens and tokens * token_bytes(self.source.model, self.source.blocks)
        if plan.states * distributed.processes()[1] >= len(self.jobs) * states:
            states = 0
        what = "the checkpoint takes" if not tokens else "checkpoint and hidden states take"
        needed = len(self.jobs) * (self.checkpoint_bytes + states)

        first = self.works[0].output
        distributed.once(
            lambda: check_free(first, needed - sum(one.bytes for one in self.works), what)
        )
        return plan

    def draw(self) -> None:
        """Take the set the targets share from work that is resumed, or draw it, and keep it."""
        trusted = self.source.trust_remote_code
        self.tokenizer = open_tokenizer(self.source.name, trust_remote_code=trusted)
        calibrated = [job for job in self.jobs if job.request.calibration is not None]
        if calibrated:
            self.drawn = distributed.once(lambda: self._drawn(calibrated))
            embeddings = self.source.model.get_input_embeddings()
            check_ids(self.source.name, embeddings, self.drawn.ids)

    def _drawn(self, calibrated: Sequence[Job]) -> CalibrationSet:
        kept = next((job.work for job in calibrated if job.work.resumes), None)
        if kept is not None:
            made = kept.calibration()
        else:
            request = calibrated[0].request
            assert request.calibration is not None
            opened: OpenModel | OpenTokenizer = self.tokenizer
            asked = ask(request.calibration, context=self.tokenizer.context, **request.drawn())
            if asked.runs_model:
                opened = self.source.opened or open_model(self.source.name, **self.run.opening)
            how = {"writing": self.run.writing, "note": self.run.note, **request.drawn()}
            made = resolve(request.calibration, opened, **how)
        for job in calibrated:
            if not job.work.resumes:
                job.work.keep_calibration(made)
        return made

    def prune(self) -> dict[Path, PruneReport]:
        """Do the work and write the outputs; return their reports."""
        ids = None if self.drawn is None else self.drawn.ids
        dropped: list[Dropped] = []
        if self.share is not None:
            assert ids is not None
            dropped = self._drop(ids)
        shape = (0, 0) if ids is None else (len(ids), ids.shape[1])
        plan = self.checked_plan(shape)
        self.run.started(self.drawn)
        for work in self.works:
            if work.upgraded:
                self.say(work.upgraded)
            if work.resumes and not self.drops_alone:
                self.say(f"resuming after {work.done} of {len(self.source.blocks)} blocks")
        if self.drops_alone:
            assert ids is not None
            seconds = {"total": time.perf_counter() - self.began}
            reports: list[PruneReport | SolverError] = [
                PruneReport("reap", "none", None, ids.numel(), rows=len(ids), seconds=seconds)
                for _ in self.jobs
            ]
        else:
            named = () if self.drawn is None else self.drawn.sources

            def pruned(own: Plan) -> list[PruneReport | SolverError]:
                jobs, tick = self._allocated(ids, own), self.run.progress
                return prune_streamed(self.source, ids, jobs, own, sources=named, progress=tick)

            reports = self._with_room(pruned, plan, shape)
        done = {}
        for job, report in zip(self.jobs, reports, strict=True):
            if isinstance(report, SolverError):
                continue
            report.dropped = dropped
            if distributed.processes()[0] == 0:
                self._finish(job, report)
            done[job.output] = report
        for job, report in zip(self.jobs, reports, strict=True):
            if isinstance(report, SolverError):
                raise SolverError(f"{job.output}: {report}; all others are done") from report
        return done

    def _with_room(self, act: Callable[[Plan], Any], plan: Plan, shape: tuple[int, int]) -> Any:
        """Act on a plan; where a device has no room for its micro-batch, on smaller ones."""
        rows, length = shape if shape[0] else (1, 1)

        def undone() -> bool:
            if any(work.done for work in self.works):
                return False
            self.source.reset()
            return True

        return with_room(
            lambda count: act(replace(plan, micro_tokens=count * length)),
            min(rows, plan.micro_tokens // length), self.source.device, undone, self.say,
        )  # fmt: skip

    def _drop(self, ids: Tensor) -> list[Dropped]:
        """Score the experts and let the model without those that count least be the source."""
        source, work, share = self.source, self.works[0], self.share
        assert share is not None
        blocks = source.blocks.select()
        mixtures = [one for index in range(len(blocks)) for one in blocks.mixtures(index)]
        if not mixtures:
            raise InputError("--drop-experts has no effect: this model has no experts")
        if not isinstance(source, StreamedModel):
            raise ModelError("--drop-experts needs a model that can be read block by block")
        kept: list[dict[str, Any]]
        kept = next((one.kept["dropped"] for one in self.works if "dropped" in one.kept), [])
        dropped = [Dropped(**one) for one in kept]
        if not dropped:
            chosen_experts(source.model, {one.name: [0.0] * one.count for one in mixtures}, share)

            def scored(own: Plan) -> dict[str, list[float]]:
                look = ScorePass(source.model, blocks)
                return pass_through(source, ids, look, work, own).scores

            shape = len(ids), ids.shape[1]
            plan = self.plan(shape, ScorePass(source.model, blocks).method)
            scores = self._with_room(scored, plan, shape)
            dropped = chosen_experts(source.model, scores, share)
        if lost := unscored(source):
            names = ", ".join(sorted(layer.strip(".") for layer in lost))
            self.say(f"{names}: left out, as it predicts further tokens with unscored experts")
        # Where nothing is pruned it is the result.
        folder = work.checkpoint if self.drops_alone else work.path / "scratch" / "dropped"
        for one in self.works:
            one.keep(dropped=[asdict(mixture) for mixture in dropped])
        distributed.once(partial(write_dropped, source, dropped, folder))
        try:
            made = StreamedModel(
                str(folder), dtype=dtype_name(source.dtype),
                device=str(source.device), trust_remote_code=source.trust_remote_code,
            )  # fmt: skip
        except NotStreamableError as error:
            raise ModelError(
                f"--drop-experts does not work with this architecture: {error}"
            ) from error
        source.close()
        made.name, made.folder = source.name, source.folder
        made.blocks = made.blocks.select(source.blocks.only, source.blocks.skip)
        self.source = made
        return dropped

    def _allocated(self, ids: Tensor | None, plan: Plan) -> list[Job]:
        """Return jobs with patterns by layer where a look at the dense model decides them."""
        for by in SPREAD:
            asking = [
                j for j in self.jobs if j.allocation == by and "allocation" not in j.work.kept
            ]
            if not asking:
                continue
            assert ids is not None
            shares = sorted({job.request.sparsity or 0.0 for job in asking})
            look = DensePass(self.source.model, self.source.blocks, by, shares, plan.paused)
            look.expert_bytes = plan.expert_bytes
            pass_through(self.source, ids, look, asking[0].work, plan)
            for job in asking:
                found = look.patterns(job.request.sparsity or 0.0, job.method)
                job.work.keep(allocation={name: one.sparsity for name, one in found.items()})
        made = []
        for job in self.jobs:
            kept = job.work.kept.get("allocation") or {}
            patterns = {name: Unstructured(share) for name, share in kept.items()}
            made.append(replace(job, pattern=patterns or job.pattern))
        return made

    def _finish(self, job: Job, report: PruneReport) -> None:
        """Write all that stands beside the weights, and turn the work into the output."""
        source, work = self.source, job.work
        drawn = self.drawn if job.request.calibration is not None else None
        manifest, seconds = _manifest(
            source.name, job.asked["model"], source.dtype, source.device.type, report, drawn,
            job.request, source.trust_remote_code,
        )  # fmt: skip
        manifest["request_sha256"] = sha256_json(job.asked)
        with disk_errors(work.path), quiet_transformers():
            if not self.drops_alone:
                source.save_config(work.checkpoint, work.path / "blocks")
            self.tokenizer.tokenizer.save_pretrained(work.checkpoint)
            run = run_record(seconds) | {
                "batch": report.rows_at_once, "processes": distributed.processes()[1],
            }  # fmt: skip
            work.check(_write_beside(work.checkpoint, source, manifest, run))
        work.complete()


def _job(output: Path, request: PruneRequest, source: WeightSource) -> Job:
    """Return what a request means for a model; a look at the model may decide its pattern yet."""
    method, allocation = request.chosen, request.allocation
    pattern: Patterns = request.target
    if isinstance(allocation, dict):
        assert request.sparsity is not None
        pattern = from_shares(allocation, source.blocks, request.sparsity, method)
        allocation = "given"
    check_pattern(source.blocks, pattern, method)
    return Job(
        work=WorkFolder(output), method=method, pattern=pattern, allocation=allocation,
        propagation=request.propagation or "sequential", output=output, request=request,
        asked=asked_of(request, source),
    )  # fmt: skip


def asked_of(request: PruneRequest, source: WeightSource) -> dict[str, Any]:
    """Return what decides the bytes of a result, as far as it is known before the draw."""
    return {
        "model": distributed.once(partial(fingerprint, source.folder)),
        "dtype": dtype_name(source.dtype),
        "device": source.device.type,
        # Their shares of the rows decide in which order sums are taken.
        "processes": distributed.processes()[1],
        **request.record(),
        "versions": deciding_versions(),
    }


def read_told(path: Path) -> dict[str, Any]:
    """Return what a manifest or run record holds; {} where there is none."""
    try:
        return read_object(path, "")
    except InputError:
        return {}


def told_report(manifest: Mapping[str, Any], run: Mapping[str, Any]) -> PruneReport:
    """Return the report that a manifest and its run record hold."""
    return PruneReport.from_json(manifest["pruning"] | {"seconds": run["seconds"]})


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
        "dtype": dtype_name(dtype),
        "device": device,
        "trust_remote_code": trusted,
        "request": None if request is None else request.record(),
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
) -> dict[str, str]:
    """Write code and processor files that came with the model, the manifest and the run record;
    return the files' hashes."""
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
    return hashed["files"]


def write_checkpoint(
    opened: OpenModel, output: Path, report: PruneReport, calibration: CalibrationSet | None
) -> None:
    """Write model, tokenizer, manifest and run record to a folder, whole or not at all."""
    model = opened.model
    check_free(output, sum(p.nbytes for p in model.parameters()), "the checkpoint takes")
    manifest, seconds = _manifest(
        opened.name, opened.fingerprint, model.dtype, model.device.type, report, calibration,
        None, opened.trust_remote_code,
    )  # fmt: skip
    with atomic_folder(output) as folder, quiet_transformers():
        model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
        _write_beside(folder, opened, manifest, run_record(seconds))
