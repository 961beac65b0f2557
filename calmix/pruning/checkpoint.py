"""From a request to a pruned checkpoint on disk: plain dense safetensors that load anywhere.

config.json has no sparsity keys, because inference engines refuse them. The run is recorded beside
the weights: `calmix.json`, the same for the same inputs, and `calmix-run.json` with date and
timings.

Weights are read from disk and written back one block at a time; hidden states are kept on the
device, or in files if there is no room.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from calmix.calibration.dataset import CalibrationSet, identified, saved_set
from calmix.calibration.tokenizer import open_tokenizer
from calmix.errors import DiskError, InputError, ModelError, disk_errors
from calmix.evaluation.distance import texts_hash
from calmix.files import (
    cached_sha256,
    check_free,
    check_output_folder,
    check_unlocked,
    copy_files,
    matching,
    sha256_json,
    write_json,
)
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
from calmix.memory import Plan, plan_pruning
from calmix.models.folder import BESIDE_WEIGHTS, save_tokenizer
from calmix.models.loading import quiet_transformers
from calmix.models.opening import cached_result, check_ids, check_models, open_model
from calmix.models.shards import write_file
from calmix.models.streaming import StreamedModel
from calmix.options import BITS_METHOD, NONE
from calmix.precision import dtype_name
from calmix.pruning.allocation import check_mixed, loss_pass
from calmix.pruning.engine import (
    BACKWARD,
    Patterns,
    Run,
    check_pattern,
    check_run,
    memory_errors,
)
from calmix.pruning.expert_pruning import ScorePass, chosen_experts, unscored, write_dropped
from calmix.pruning.held_out import held_out_rows, widest_to_move
from calmix.pruning.methods import Look, Method, get_method
from calmix.pruning.patterns import Mixed, Recipe, as_pattern
from calmix.pruning.report import Dropped, PruneReport
from calmix.pruning.requests import How, PruneRequest, RecoverRequest
from calmix.pruning.solvers.grids import SCALES_FOLDER, stored
from calmix.pruning.token_weights import token_weights
from calmix.pruning.work import CHECKPOINT, States, WorkFolder, draw_set

R = TypeVar("R")
COSTS = "token-weights.safetensors"
COSTS_VERSION = 1  # raised when costs change, so that cached ones are not reused


def prune_checkpoint(name: str, output: Path, request: PruneRequest, **how: Any) -> PruneReport:
    """Draw a model's calibration set, prune the model block by block and write a checkpoint.

    Weights are read and written one block at a time. Finished blocks are kept beside the output, so
    that an interrupted run can be resumed.

    Args:
        name: the model, as for `open_model`.
        output: the folder, written atomically.
        request: from `prune_request`.
        **how: as in `calmix.pruning.requests.How`.
    """
    run = How.of(**how)
    check_request([name], output, request, run)
    job = _Pruning(name, output, request, run)
    try:
        report = finished_report(
            job.work, output, job.identity, run, "pruning", PruneReport.from_json
        )
        return job.prune() if report is None else report
    except BaseException as error:
        job.work.leave(error, run.note)
        raise
    finally:
        job.source.close()


def check_request(
    names: Sequence[str], output: Path, request: PruneRequest | RecoverRequest, run: How
) -> None:
    """Refuse what is known to fail before models are fetched or text is drawn."""
    inputs: list[object] = [*names]
    if request.calibration is not None:
        inputs.append(saved_set(request.calibration))
        if not run.resume:
            inputs += request.drawing.files
    check_unlocked(output)
    finished = run.resume and (output / MANIFEST).is_file()
    check_output_folder(output, inputs=inputs, overwrite=run.overwrite or finished)
    check_models(*names, **run.opening)


def planned(
    name: str, request: PruneRequest, rows: int, length: int, **how: Any
) -> tuple[int, int]:
    """Return the peak memory of pruning and the size of an unpruned checkpoint, in bytes.

    Nothing is written, and only headers are read. `rows` and `length` are those of the calibration
    set, 0 without one; the rest as for `prune_checkpoint`.
    """
    job = _Pruning(name, Path("pruned"), request, How.of(**how))
    return max(plan.needed for plan in job.plans((rows, length))), job.checkpoint_bytes


class _Pruning:
    """A call of `prune_checkpoint`."""

    def __init__(self, name: str, output: Path, request: PruneRequest, run: How) -> None:
        self.run, self.began = run, time.perf_counter()
        self.weighed = 0  # blocks run to weigh tokens, for the progress
        self.output, self.work = output, WorkFolder(output)
        self.request, self.method = request, request.chosen
        self.drops_alone = request.method == NONE
        self.source = source = StreamedModel(name, **run.opening)
        source.blocks = source.blocks.select(request.only, request.skip)
        self.pattern: Patterns = request.target
        if isinstance(request.target, Recipe):
            self.pattern = request.target.types(source.model, source.blocks)
        check_pattern(source.blocks, self.pattern, self.method)
        if isinstance(request.target, Mixed):
            check_mixed(request.target, source.model, source.blocks, self.method)
        check_run(self.engine())
        self.tokenizer = open_tokenizer(source.name, trust_remote_code=source.trust_remote_code)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The request: all that determines the output's bytes, except the text drawn."""
        source, request, file = self.source, self.request, self.method.importance_file
        dense_targets = self.method.has_dense_targets(request.statistics)
        return {
            "model": source.files.sha256,  # reads the whole model
            "tokenizer": self.tokenizer.identity,
            "dtype": dtype_name(source.dtype),
            "device": source.device.type,
            **request.record() | {"calibration": identified(request.calibration)},
            **({"targets": "dense"} if dense_targets else {}),
            **({"imatrix": cached_sha256(Path(file))} if file else {}),
            "versions": deciding_versions(),
        }

    def engine(self) -> Run:
        """Return the run of the engine; types that were chosen replace the pattern."""
        types, request = self.work.state.get("allocation") or {}, self.request
        by_layer = {name: as_pattern(kind) for name, kind in types.items()}
        run = Run(
            self.source.model,
            self.source.blocks,
            self.method,
            by_layer or self.pattern,
            request.propagation or "sequential",
            embeddings=request.embeddings,
        )
        run.report.pattern = request.pattern or run.report.pattern
        run.robust = self.weighs
        return run

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint in bytes."""
        files, places = self.source.layout.values(), self.source.places
        return sum(places[name].size for names in files for name in names)

    @property
    def weighs(self) -> bool:
        """Whether tokens are weighted by what their errors cost."""
        return self.method.is_robust(self.request.statistics)

    def plan(self, shape: Sequence[int], method: Method | None = None) -> Plan:
        """Return the memory plan of pruning, or of a pass over the dense model with a `method`."""
        run, how = self.engine(), dict[str, Any]()
        if method is None:
            how["sequential"] = run.propagation == "sequential"
            how["rows_at_once"] = self.work.state.get("report", {}).get("rows_at_once", 0)
            if run.has_dense_targets and held_out_rows(shape[0]):
                how["followed"] = widest_to_move(math.prod(shape))
        else:
            how["backward"] = self.weighs
        if self.request.mixed or run.outer:
            how["outer"] = get_method(BITS_METHOD), method or self.method
        return plan_pruning(
            self.source, shape, method or self.method, budget=self.run.max_memory, **how
        )

    def plans(self, shape: Sequence[int]) -> list[Plan]:
        """Return the memory plans of pruning and of the passes before it."""
        dense = self.request.drop_experts is not None or self.request.mixed or self.weighs
        return [self.plan(shape), *([self.plan(shape, Look())] if dense else [])]

    def check_room(self, shape: Sequence[int]) -> None:
        """Refuse a run for which memory or disk space is too small."""
        states = max(plan.files for plan in self.plans(shape))
        what = "checkpoint and hidden states take" if states else "the checkpoint takes"
        check_free(self.output, self.checkpoint_bytes + states - self.work.bytes, what)

    def draw(self) -> CalibrationSet:
        """Return the set of resumed work, or draw and save it."""
        drawn = draw_set(
            self.work,
            self.request,
            self.tokenizer,
            lambda: open_model(self.source.name, **self.run.opening),
            self.run,
        )
        check_ids(self.source.name, self.source.model.get_input_embeddings(), drawn.ids)
        return drawn

    def prune(self) -> PruneReport:
        """Prune, write the output, and return the report."""
        run, work, request = self.run, self.work, self.request
        work.claim(self.identity, resume=run.resume, overwrite=run.overwrite)
        share = request.drop_experts
        if share is None and not work.resumes:  # else the model will shrink, or the set is known
            shape = 0, 0
            if request.calibration is not None:
                shape = request.drawing.draw.rows, request.drawing.draw.length
            self.check_room(shape)
        self.drawn = None if request.calibration is None else self.draw()
        ids = torch.empty(0, 0) if self.drawn is None else self.drawn.ids
        dropped = [] if share is None else self._drop(ids, share)
        self.check_room(ids.shape)
        run.started(self.drawn)
        costs = self._token_weights(ids)
        if request.mixed and "allocation" not in work.state:
            self._allocate(ids, costs)
        report = self._pruned(ids, costs)
        report.dropped = dropped
        self._finish(report)
        return report

    def _pruned(self, ids: Tensor, costs: Mapping[str, Tensor]) -> PruneReport:
        """Prune; the files beside the weights are written later."""
        work, count = self.work, len(self.source.blocks)
        if self.drops_alone:
            report = PruneReport("reap", "none", None, ids.numel(), rows=len(ids))
            report.seconds = {"total": time.perf_counter() - self.began}
            return report
        if work.resumes:
            self.run.note(f"resuming after {work.done} of {count} blocks")
        run = self.engine()
        run.sources = () if self.drawn is None else self.drawn.sources
        if self.weighs:
            run.weigh(costs)
        return prune_streamed(
            self.source,
            ids,
            run,
            work,
            self.plan(ids.shape),
            lambda done: self.run.progress(self.weighed + done, self.weighed + count),
        )

    def _observe(self, run: Run, ids: Tensor) -> None:
        """Run a pass that changes nothing through all blocks."""
        plan = self.plan(ids.shape, run.method)
        for _ in take_through(self.source, ids, run, self.work, plan):
            pass

    def _drop(self, ids: Tensor, share: float) -> list[Dropped]:
        """Score the experts and replace the source by the model without the lowest-scoring ones."""
        source, work = self.source, self.work
        blocks = source.blocks.select()
        mixtures = [one for index in range(len(blocks)) for one in blocks.mixtures(index)]
        if not mixtures:
            raise InputError("--drop-experts has no effect: this model has no experts")
        dropped = [Dropped(**one) for one in work.state.get("dropped", ())]
        if not dropped:
            config, none = source.model.config, {one.name: [0.0] * one.count for one in mixtures}
            chosen_experts(config, none, share)  # errors come before the scoring pass
            self._observe(scored := ScorePass(source.model, blocks), ids)
            dropped = chosen_experts(config, scored.scores, share)
        if lost := unscored(source):
            names = ", ".join(sorted(layer.strip(".") for layer in lost))
            self.run.note(f"{names}: left out (multi-token prediction with unscored experts)")
        # If nothing is pruned, it is the result.
        folder = work.checkpoint if self.drops_alone else work.path / "scratch" / "dropped"
        work.keep(dropped=[asdict(mixture) for mixture in dropped])
        write_dropped(source, dropped, folder)
        dtype = dtype_name(source.dtype)
        smaller = StreamedModel(str(folder), **self.run.opening | {"dtype": dtype})
        source.close()
        smaller.name, smaller.folder, smaller.files = source.name, source.folder, source.files
        smaller.blocks = smaller.blocks.select(source.blocks.only, source.blocks.skip)
        self.source = smaller
        return dropped

    def _allocate(self, ids: Tensor, costs: Mapping[str, Tensor]) -> None:
        """Choose and keep types or bits by layer."""
        dense = loss_pass(self.source.model, self.source.blocks, self.method)
        if self.weighs:
            dense.weigh(costs, power=1)
        self._observe(dense, ids)
        patterns = dense.patterns(self.request.target).items()
        self.work.keep(allocation={name: str(one) for name, one in patterns})

    def _token_weights(self, ids: Tensor) -> dict[str, Tensor]:
        """Return what errors cost at every token, from resumed work, the cache or a pass over the
        dense model; empty if it is not asked for, or the model has no gradient."""
        work = self.work
        if not self.weighs:
            return {}
        if COSTS in work.state.get("files", {}):
            return work.load(COSTS)
        plan = self.plan(ids.shape, Look())
        cached, costs = self._cached_costs(ids, plan), None
        with suppress(OSError, SafetensorError):  # missing or damaged
            costs = load(cached.read_bytes())
        if costs is None:
            self.run.note("weighing tokens: the dense model runs forward and backward")
            self.weighed = len(self.source.blocks)
            costs = self._backward(ids, plan)
            if costs:
                with suppress(DiskError):  # full or read-only
                    write_file(cached, costs)
        if not work.state.get("done"):
            work.save(COSTS, costs)
        return costs

    def _cached_costs(self, ids: Tensor, plan: Plan) -> Path:
        """Return the cache path of the costs for a set: other methods and sizes have the same."""
        source, layers = self.source, [layer.name for layer in self.source.blocks.layers]
        experts = self.request.drop_experts  # with the set, it decides which are left
        about = texts_hash({"calibration": ids}), layers, experts, plan.micro_tokens, COSTS_VERSION
        files = [self.identity["model"]]
        path = cached_result("token-weights", files, source.dtype, source.device, *about)
        return path.with_suffix(".safetensors")

    def _backward(self, ids: Tensor, plan: Plan) -> dict[str, Tensor]:
        source, folder = self.source, self.work.scratch("backward")

        @contextmanager
        def loaded(index: int | None) -> Iterator[None]:
            if index is None:
                source.fetch_outside(head=True)
                yield
                source.drop_outside()
            else:
                source.fetch(index)
                yield
                source.drop(index)

        try:
            return token_weights(
                source.model,
                source.blocks,
                ids,
                device=source.device,
                rows_at_once=max(1, plan.micro_tokens // ids.shape[1] // BACKWARD),
                loaded=loaded,
                states=lambda: States(folder, source.device, plan.states),
                progress=lambda done, total: self.run.progress(
                    self.weighed * done // total, 2 * self.weighed
                ),
            )
        except ModelError as error:
            self.run.note(f"tokens count alike, because {error}")
            return {}
        finally:
            source.reset()
            shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, report: PruneReport) -> None:
        """Write the files beside the weights, and turn the work folder into the output."""
        source, work = self.source, self.work
        with disk_errors(work.path), quiet_transformers():
            if not self.drops_alone:
                source.save_config(work.checkpoint)
            save_tokenizer(self.tokenizer.tokenizer, source.folder, work.checkpoint)
            self._write_beside(report)
            source.files.check()
        work.complete()

    def _write_beside(self, report: PruneReport) -> None:
        """Copy the model's other files, and write the manifest and the run record."""
        source, folder = self.source, self.work.checkpoint
        others = matching(source.folder, BESIDE_WEIGHTS)
        copy_files(source.folder, folder, (name for name in others if not (folder / name).exists()))
        done, files = report.to_dict(), file_hashes(folder, without=(MANIFEST, RUN))
        self.work.check(files)
        run = run_record(done.pop("seconds")) | {"batch": report.rows_at_once}
        manifest = record(
            "pruned checkpoint",
            request=self.request.record(),
            inputs={"model": Input(source.name, self.identity["model"])},
            files=files,
            dtype=self.identity["dtype"],
            stored_dtype=dtype_name(source.stored_dtype),
            device=self.identity["device"],
            trust_remote_code=source.trust_remote_code,
            calibration=None if self.drawn is None else self.drawn.manifest,
            pruning=done,
            request_sha256=sha256_json(self.identity),
        )
        write_json(folder / MANIFEST, manifest)
        write_json(folder / RUN, run)


def prune_streamed(
    source: StreamedModel,
    ids: Tensor | None,
    run: Run,
    work: WorkFolder,
    plan: Plan,
    progress: Callable[[int], None] = lambda done: None,
) -> PruneReport:
    """Prune a model into a work folder, starting at the first unfinished block.

    The result equals that of pruning in memory. Only weights are kept for a resumed run, which runs
    the calibration rows through the finished blocks again and gets the same hidden states.
    `progress` is called with the number of finished blocks.
    """
    files, count, run.types = source.layout, len(source.blocks), source.types
    shards = [f"{CHECKPOINT}/{file}" for file in files]
    if work.done:
        run.report = PruneReport.from_json(work.state["report"])
    began = time.perf_counter() - run.report.seconds.get("total", 0.0)
    progress(work.done)
    if work.done < count or run.outer:
        for index in take_through(source, ids, run, work, plan, shards[: work.done]):
            run.report.seconds["total"] = time.perf_counter() - began
            source.files.check()  # before the block counts as done
            work.save(shards[index], source.weights(index))
            if run.report.grids:
                work.save(f"{CHECKPOINT}/{SCALES_FOLDER}/{index:05}", stored(run.report.grids))
            run.report.grids.clear()
            work.keep(done=index + 1, report=run.report.to_dict())
            progress(index + 1)
    changed = {f"{one.name}.weight" for one in run.report.outer}
    for shard, names in list(zip(shards, files.values(), strict=True))[count:]:
        work.save(shard, source.rest(names, changed))
    if run.outer:
        work.save(f"{CHECKPOINT}/{SCALES_FOLDER}/outside", stored(run.report.grids))
    source.drop_outside()
    run.report.seconds["total"] = time.perf_counter() - began
    return run.report


def take_through(
    source: StreamedModel,
    ids: Tensor | None,
    run: Run,
    work: WorkFolder,
    plan: Plan,
    done: Sequence[str] = (),
) -> Iterator[int]:
    """Run through all blocks; yield the index of each while its weights are in memory.

    `done` are the files of blocks pruned by an earlier run. The weights outside the blocks are in
    memory at the end if the run has changed them.
    """
    run.paused, run.expert_bytes = plan.paused, plan.expert_bytes
    with memory_errors(run, source.device):
        if run.needs_ids:
            folder = work.scratch("states")
            run.states = States(folder, source.device, plan.states)
            source.fetch_outside()
            source.fetch(0)
            run.record(ids, plan.micro_tokens)
            source.drop_outside()
        for index in range(len(source.blocks)):
            if index >= len(done):
                source.fetch(index, ahead=plan.overlap)
                run.block(index)
                yield index
            elif run.needs_ids:
                if run.method.dense_inputs or run.follows_dense:
                    source.fetch(index)
                    run.run_dense(index)
                if not run.method.dense_inputs:
                    source.refill(index, work.load(done[index]))
                run.replay(index)
            source.drop(index)
        if run.outer:
            source.fetch_outside(head=True)
            run.outside()
    if run.needs_ids:
        shutil.rmtree(folder, ignore_errors=True)


def finished_report(
    work: WorkFolder,
    output: Path,
    identity: Mapping[str, Any],
    run: How,
    part: str,
    report_of: Callable[[dict[str, Any]], R],
) -> R | None:
    """Return the report of an output that an earlier run of the same request finished, made from a
    part of its manifest; None unless the run resumes and the output has all its files."""
    manifest, run_file = (read_if_there(output / name) for name in (MANIFEST, RUN))
    with suppress(KeyError, TypeError):
        whole = run.resume and all((output / name).is_file() for name in manifest["files"])
        if whole and manifest["request_sha256"] == sha256_json(identity):
            report = report_of(manifest[part] | {"seconds": run_file["seconds"]})
            work.remove_leftover()
            run.note(f"{output} was finished by an earlier run")
            return report
    return None
