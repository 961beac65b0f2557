"""From a pruned checkpoint to a recovered one: what goes in is checked, what was done is recorded.

The output has the tensors and types of the pruned model. What was done stands beside the weights
as for a pruning run: `calmix.json`, the same for the same inputs, and `calmix-run.json`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.calibration import CalibrationSet, ask, open_tokenizer
from calmix.errors import InputError, disk_errors
from calmix.evaluation.likelihood import close
from calmix.files import check_free, sha256_json, write_json
from calmix.machine import device_memory, give_memory_back
from calmix.manifest import deciding_versions, file_hashes, run_record, sealed, versions
from calmix.models import open_model
from calmix.models.opening import check_ids, device_of, fingerprint
from calmix.models.shards import write_index
from calmix.models.streaming import StreamedModel
from calmix.options import Recovering
from calmix.precision import dtype_name, reproducible, suited
from calmix.pruning.budget import GIB
from calmix.pruning.checkpoint import MANIFEST, RUN, check_request, read_told
from calmix.pruning.distributed import everyone, once, processes
from calmix.pruning.expert_pruning import experts_of
from calmix.pruning.solvers.grids import SCALES, read_grids
from calmix.pruning.work import CHECKPOINT, WorkFolder, draw_set
from calmix.recovery.blocks import recover_blocks
from calmix.recovery.distill import distill_model
from calmix.recovery.memory import check_memory, make_plan
from calmix.recovery.training import Masters, rows_at_once, split_rows, trained_names
from calmix.shown import Shown
from calmix.specs import How

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # what makes a folder of weights a model
ROOM = 0.8  # of the free memory, for the activations of all blocks at once
LEAST = 0.01  # share of zeros below which a model is not sparse
APART = 0.9  # relative distance of embeddings beyond which a model is another one
ROWS = 4096  # of the embeddings that are compared


@dataclass(repr=False)
class RecoveryReport(Shown):
    """What a recovery did.

    `before` and `after` are the loss of the held-out rows (their numbers in `held_out`): mean KL a
    token in nats (distill), or the mean relative error a token, over blocks (blocks). `curve` has
    the losses on the way, as `Progress` or as `tune` returns them of each block. Of the `weights`
    of the linear maps, `zeros` are and stay zero, and `quantised` stay on their grid.
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
        return (f"{self.method}, loss of {len(self.held_out)} held-out rows (lower is better) "
                f"{self.before:.4f} before, {self.after:.4f} after")  # fmt: skip

    def _rows(self) -> list[dict[str, Any]]:
        if self.method == "distill":
            return [{"step": step, "loss": loss} for step, loss in self.curve["held_out"]]
        return [{name: one[name] for name in ("block", "before", "after")} for one in self.curve]


class Job:
    """A recovery at work, in each of the processes that share it.

    Attributes:
        pruned, dense: the models, their blocks on disk.
        masked: names in the pruned model of the linear maps whose zeros stay (one may be that of
            all experts); `weights` and `zeros` are how many they hold.
        grids: of the quantised linear maps, by name.
        fixed: names of those whose grid is not stored (experts in one tensor, or a matrix that lies
            transposed): they stay as they are.
        calibration: the set; `training` and `held_out` are numbers of its rows.
        plan: how it stays within the memory.
    """

    def __init__(self, request: Recovering, output: Path, run: How) -> None:
        self.request, self.output, self.run = request, output, run
        self.rank, self.processes = processes()
        self.main = self.rank == 0
        if self.processes > 1 and request.method == "blocks":
            raise InputError("recovery by blocks runs in one process: start it without a launcher")
        self.device = device_of(run.device)
        if request.batch % self.processes:
            raise InputError(
                f"--batch {request.batch} cannot be shared by {self.processes} processes"
            )
        self.type_name = run.dtype
        if run.dtype == "auto":
            self.type_name = dtype_name(suited(torch.bfloat16, self.device))
        if self.type_name not in ("bfloat16", "float32"):
            raise InputError(f"--dtype {run.dtype} cannot train: use bfloat16 or float32")
        self.dtype: torch.dtype = getattr(torch, self.type_name)
        self.opening = run.opening | {"dtype": self.type_name, "device": str(self.device)}
        self.say = run.note if self.main else How.note
        self.work = WorkFolder(output, "steps" if request.method == "distill" else "blocks")

    def open(self, name: str) -> Any:
        """Open a model whole, in what this computes in."""
        return open_model(name, **self.opening).model

    def take(self, pruned: StreamedModel, dense: StreamedModel) -> None:
        """Take both models, or refuse the pair; the pruned one may lack experts."""
        self.pruned, self.dense = pruned, dense
        line = f"{pruned.name} was not pruned from {dense.name}"
        own, other = ({n: tuple(p.shape) for n, p in one.model.named_parameters()}
                      for one in (pruned, dense))  # fmt: skip
        kept, count = (experts_of(one.model.config) for one in (pruned, dense))
        for name in dict.fromkeys([*own, *other]):
            here, there = own.get(name), other.get(name)
            fewer = kept < count and (here is None or (there and here == (kept, *there[1:])))
            if here != there and not fewer:
                raise InputError(
                    f"{line}: {name} is {here or 'none'}, and {there or 'none'} in the dense model"
                )
        embedded = pruned.model.get_input_embeddings().weight
        named = next(n for n, p in pruned.model.named_parameters() if p is embedded)
        ours, theirs = (one.stored(named)[:ROWS].float() for one in (pruned, dense))
        if not close(ours, theirs, APART):
            raise InputError(f"{line}: their embeddings are of different models")
        layers, told = pruned.blocks.layers, read_told(pruned.folder / MANIFEST)
        while told.get("pruned"):  # it was recovered before
            told = told["pruned"]
        done = told.get("pruning", {})
        names = {layer.parameter_name for layer in layers}
        self.grids = {n: grid for n, grid in read_grids(pruned.folder).items() if n in names}
        rounded = {one["name"] for one in done.get("layers", []) if one.get("bits") is not None}
        on_grid = {layer.parameter_name for layer in layers if layer.name in rounded}
        self.fixed = on_grid - self.grids.keys()
        rated = str(done.get("pattern")).endswith("bits")  # zero is a level there
        self.masked = names - self.grids.keys() if rated else names
        self.weights = sum(math.prod(own[name]) for name in names)
        self.zeros = sum(int((pruned.stored(name) == 0).sum()) for name in self.masked)
        self.quantised = sum(math.prod(own[name]) for name in self.grids.keys() | on_grid)
        if self.zeros < LEAST * self.weights and kept == count and not self.quantised:
            raise InputError(
                f"{pruned.name} is not sparse ({self.zeros / self.weights:.2%} of its linear maps' "
                "weights are zero): prune it first"
            )

    def begin(self, calibration: CalibrationSet) -> None:
        """Take the calibration set, hold rows out of it, decide what to spare to stay within the
        memory, and start the clock where it was left.

        What the process holds is rounded up to a quarter of a GiB, so that the same budget gives
        the same plan.
        """
        self.calibration = calibration
        seed = calibration.manifest.get("seed")
        self.seed = seed if isinstance(seed, int) else 0
        sources, batch = calibration.sources, self.request.batch
        self.training, self.held_out = split_rows(sources, batch, self.seed)
        self._began = time.perf_counter() - self.work.kept.get("seconds", 0.0)
        give_memory_back()
        held, free, _ = device_memory(self.device)
        rows = rows_at_once(self.request.batch // self.processes, calibration.length)
        if (most := self.run.max_memory) is None:
            rows, room = rows[:1], int(ROOM * free) // self.processes
        else:
            held = -(-held // (GIB // 4)) * (GIB // 4)
            room = most - held
        if begun := self.work.kept.get("rows_at_once"):
            rows = [begun]
        self.plan = make_plan(
            self.pruned, self.request.method, self.dtype, calibration.length, rows, room
        )
        self.say("recovery " + check_memory(self.plan.needed, held, most, free))

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return time.perf_counter() - self._began

    def check_room(self, tokens: int) -> None:
        """Refuse a recovery on so many tokens for whose files the disk has no room."""
        source = self.pruned
        needed = sum(place.size for place in source.shards.places.values())
        width = source.model.get_output_embeddings().weight.shape[1]
        states = tokens * width * self.dtype.itemsize
        if self.request.method == "distill":
            own = dict(source.model.named_parameters())
            trained = sum(own[n].numel() for n in trained_names(source.model))
            needed += states + 2 * (12 + 4) * trained
        else:
            needed += 2 * states
        check_free(self.output, needed - self.work.bytes, "checkpoint and states take up to")

    def keep(self, done: int, **facts: Any) -> None:
        """Make count what is done."""
        self.work.keep(done=done, rows_at_once=self.plan.rows, seconds=self.seconds, **facts)

    def masters(self, parameters: Mapping[str, torch.nn.Parameter]) -> Masters:
        """Return the masters of parameters of the pruned model."""
        source, masked = self.pruned.stored, self.masked.__contains__
        return Masters(parameters, source, masked, self.grids, self.dense.stored)

    def as_stored(self, masters: Masters, *, copy: bool = False) -> dict[str, Tensor]:
        """Return what masters stand for, in the types the pruned model is stored in."""
        return {
            name: masters.rounded(name).to(self.pruned.stored_dtype(name), copy=copy)
            for name in masters.values
        }

    def write(self, file: str, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a file of the result, and return it: what was trained, else the pruned tensors."""
        source = self.pruned
        made = source.shards.read(source.layout[file])
        for name, value in source.as_stored(trained).items():
            if name in made:
                made[name] = value.to(made[name].dtype)
        self.work.save(f"{CHECKPOINT}/{file}", made)
        return made


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
    work = job.work

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
        asked = {  # what decides the bytes of the result beside the text
            "pruned": fingerprint(job.pruned.folder),
            "against": fingerprint(job.dense.folder),
            "dtype": job.type_name,
            "device": job.device.type,
            "processes": job.processes,
            **request.record(),
            "versions": deciding_versions(),
        }
        done, told = (read_told(job.output / name) for name in (MANIFEST, RUN))
        with suppress(KeyError, TypeError):
            if run.resume and done["request_sha256"] == sha256_json(asked):
                report = RecoveryReport(**done["recovery"], seconds=told["seconds"])
                job.say(f"{job.output} was finished by an earlier run")
                work.remove_leftover()
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
                calibration.rows, calibration.length, job.held_out, before, after,
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
