"""From a pruned checkpoint to a recovered one, with its inputs checked and the run recorded.

The output has the tensors and types of the pruned model. The run is recorded beside the weights as
for pruning: `calmix.json`, the same for the same inputs, and `calmix-run.json`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.calibration.dataset import CalibrationSet, identified
from calmix.calibration.resolving import parse_calibration
from calmix.calibration.tokenizer import open_tokenizer
from calmix.errors import InputError, disk_errors
from calmix.evaluation.likelihood import close
from calmix.files import check_free, copy_files, matching, sha256_json, write_json
from calmix.machine import give_memory_back
from calmix.manifest import (
    MANIFEST,
    RUN,
    Input,
    deciding_versions,
    file_hashes,
    lineage,
    read_if_there,
    record,
    run_record,
)
from calmix.memory import budgeted, check_memory, device_memory, plan_recovery, token_bytes
from calmix.models.folder import BESIDE_WEIGHTS
from calmix.models.opening import check_ids, device_of, open_model
from calmix.models.shards import weight_dtype, write_index
from calmix.models.streaming import StreamedModel
from calmix.options import Recovering
from calmix.precision import dtype_name, reproducible, suited
from calmix.pruning.checkpoint import check_request, finished
from calmix.pruning.expert_pruning import experts_of
from calmix.pruning.solvers.grids import SCALES, read_blocks, read_grids, replace_blocks
from calmix.pruning.work import CHECKPOINT, WorkFolder, draw_set
from calmix.recovery.blocks import recover_blocks
from calmix.recovery.distill import distill_model
from calmix.recovery.training import Masters, rows_at_once, split_rows, trained_weights
from calmix.shown import Shown
from calmix.specs import How

DENSE_ZEROS = 0.01  # share of zeros below which a model counts as dense
UNRELATED = 0.9  # relative distance of embeddings beyond which models are unrelated
COMPARED_ROWS = 4096  # rows of the embeddings that are compared


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


class RecoveryRun:
    """A running recovery.

    Attributes:
        pruned, dense: the models, their blocks on disk.
        masked: names of parameters of the linear maps whose zeros stay (one may hold all experts);
            `weights` and `zeros` count those of the linear maps.
        grids: of the quantised linear maps, by name.
        encoded: GGML's blocks of the linear maps, by name; recovery by block leaves them alone.
        fixed: names of those whose grid is not stored (experts in one tensor, or a matrix stored
            transposed); they are not trained.
        calibration: the set; `training` and `held_out` are indices of its rows.
        rows, sparing: the memory plan, from `plan_recovery`.
    """

    def __init__(self, request: Recovering, output: Path, run: How) -> None:
        self.request, self.output, self.run = request, output, run
        self.device = device_of(run.device)
        dtype = run.dtype
        if dtype == "auto":
            dtype = dtype_name(suited(torch.bfloat16, self.device))
        if dtype not in ("bfloat16", "float32"):
            raise InputError(f"--dtype {dtype} cannot train: use bfloat16 or float32")
        self.opening = run.opening | {"dtype": dtype, "device": str(self.device)}
        self.work = WorkFolder(output, "steps" if request.method == "distill" else "blocks")

    def take(self, pruned: StreamedModel, dense: StreamedModel) -> None:
        """Set both models, or refuse the pair; the pruned one may lack experts."""
        self.pruned, self.dense = pruned, dense
        line = f"{pruned.name} was not pruned from {dense.name}"
        shapes, others = (
            {n: tuple(p.shape) for n, p in one.model.named_parameters()} for one in (pruned, dense)
        )
        experts, count = (experts_of(one.model.config) for one in (pruned, dense))
        for name in dict.fromkeys([*shapes, *others]):
            here, there = shapes.get(name), others.get(name)
            # ERNIE's bias has groups first.
            cut = there and ((experts, *there[1:]), (*there[:1], experts, *there[2:]))
            fewer = experts < count and (here is None or (cut and here in cut))
            if here != there and not fewer:
                raise InputError(
                    f"{line}: {name} is {here or 'none'} here, {there or 'none'} in the dense model"
                )
        embedded = pruned.model.get_input_embeddings().weight
        named = next(n for n, p in pruned.model.named_parameters() if p is embedded)
        ours, theirs = (one.stored(named)[:COMPARED_ROWS].float() for one in (pruned, dense))
        if not close(ours, theirs, UNRELATED):
            raise InputError(f"{line}: their embeddings are of different models")
        layers, models = pruned.blocks.layers, lineage(read_if_there(pruned.folder / MANIFEST))
        done: Mapping[str, Any] = next((one["pruning"] for one in models if "pruning" in one), {})
        names = {layer.parameter_name for layer in layers}
        grids = read_grids(pruned.folder, shapes)
        self.grids = {name: grid for name, grid in grids.items() if name in names}
        rounded = {one["name"] for one in done.get("layers", []) if one.get("bits") is not None}
        on_grid = {layer.parameter_name for layer in layers if layer.name in rounded}
        encoded = read_blocks(pruned.folder, shapes)
        trains = self.request.method == "distill"
        self.encoded = {name: one for name, one in encoded.items() if trains and name in on_grid}
        self.fixed = on_grid - self.grids.keys() - self.encoded.keys()
        # Zero is a level, not a mask, unless a sparse method has quantised what it kept.
        rated = done.get("options", {}).get("bits") == 0
        self.masked = names - self.grids.keys() if rated else names
        self.weights = sum(math.prod(shapes[name]) for name in names)
        self.zeros = sum(int((pruned.stored(name) == 0).sum()) for name in self.masked)
        self.quantised = sum(math.prod(shapes[name]) for name in self.grids.keys() | on_grid)
        if self.zeros < DENSE_ZEROS * self.weights and experts == count and not self.quantised:
            raise InputError(
                f"{pruned.name} is not sparse ({self.zeros / self.weights:.2%} of its linear maps' "
                "weights are zero): prune it first"
            )

    def begin(self, calibration: CalibrationSet) -> None:
        """Set the calibration set, hold rows out, plan the memory, and resume the clock."""
        self.calibration = calibration
        seed = calibration.manifest.get("seed")
        self.seed = seed if isinstance(seed, int) else 0
        sources, batch = calibration.sources, self.request.batch
        self.training, self.held_out = split_rows(sources, batch, self.seed)
        self.began = time.perf_counter() - self.work.state.get("seconds", 0.0)  # of earlier runs
        give_memory_back()
        limit, rows = self.run.max_memory, rows_at_once(self.request.batch, calibration.length)
        resident, most = budgeted(self.device, limit)
        if limit is None and self.device.type == "cpu":  # results do not depend on the free memory
            rows = rows[:1]
        if begun := self.work.state.get("rows_at_once"):
            rows = [begun]
        trained = trained_weights(self.pruned.model, self.request.method)
        self.rows, self.sparing, needed = plan_recovery(
            self.pruned, calibration.length, rows, most - resident, trained
        )
        free = device_memory(self.device)[1]
        self.run.note("recovery " + check_memory(needed, resident, limit, free))

    def check_room(self, tokens: int) -> None:
        """Refuse a recovery if the disk has no room for the files of this many tokens."""
        source = self.pruned
        needed = sum(place.size for place in source.places.values())
        width = source.model.get_output_embeddings().weight.shape[1]
        states = tokens * width * source.dtype.itemsize
        if trained := trained_weights(source.model, self.request.method):
            needed += states + 2 * (12 + 4) * trained
        else:
            needed += 2 * tokens * token_bytes(source.model, source.blocks)
        check_free(self.output, needed - self.work.bytes, "checkpoint and states take up to")

    def keep(self, done: int, **facts: Any) -> None:
        """Record the progress, unless a model has changed."""
        self.pruned.files.check()
        self.dense.files.check()
        seconds = time.perf_counter() - self.began
        self.work.keep(done=done, rows_at_once=self.rows, seconds=seconds, **facts)

    def masters(self, parameters: Mapping[str, torch.nn.Parameter]) -> Masters:
        """Return masters for parameters of the pruned model."""
        pruned, dense = self.pruned.stored, self.dense.stored
        return Masters(parameters, pruned, self.masked, self.grids, dense, self.encoded)

    def write(self, file: str, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a file of the result, trained tensors (by stored name) replacing pruned ones, and
        return it."""
        tensors = {name: self.pruned.read(name) for name in self.pruned.layout[file]}
        for name in tensors.keys() & trained:
            tensors[name] = trained[name].to(tensors[name].dtype)
        self.work.save(f"{CHECKPOINT}/{file}", tensors)
        return tensors


def recover(
    pruned: str,
    against: str,
    request: Recovering,
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
        **how: as in `calmix.specs.How`; `dtype` is the compute type, `bfloat16` or `float32`, or
            `auto` for bfloat16 where it is fast.

    Raises:
        CalmixError: anything a user can fix, before an output is touched.
    """
    run = How.of(**how)
    job, trust = RecoveryRun(request, Path(output), run), run.trust_remote_code
    work = job.work

    def draw() -> CalibrationSet:
        if not work.resumes:
            size = parse_calibration(
                request.calibration, context=tokenizers[1].context, **request.drawn()
            ).draw
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
        rows = parse_calibration(request.calibration, **request.drawn()).draw.rows
        split_rows([""] * rows, request.batch, 0)
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
        earlier = finished(
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
        if (scales := pruned.folder / SCALES).is_dir():
            shutil.copytree(scales, folder / SCALES, dirs_exist_ok=True)
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
