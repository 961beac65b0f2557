"""From a pruned checkpoint to a recovered one: what goes in is checked, kept and told.

The output has the files, tensors and types of the pruned model. What was done stands beside the
weights as for a prune: `calmix.json`, the same for the same inputs, and `calmix-run.json`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from calmix.calibration import CalibrationSet, OpenTokenizer, open_tokenizer, resolve
from calmix.calibration.resolving import needs_model
from calmix.capability.likelihood import decoder_and_head
from calmix.errors import CalmixError, DiskError, InputError, ModelError, disk_errors
from calmix.files import check_output_folder, real_place, sha256_json, write_json
from calmix.machine import free_memory, give_memory_back
from calmix.manifest import asked_record, file_hashes, request_record, run_record, sealed, versions
from calmix.models import find_blocks, open_model
from calmix.models.blocks import DecoderBlocks, experts_per_token
from calmix.models.opening import check_ids, device_of, fingerprint
from calmix.models.shards import Shards, ShardWriter
from calmix.models.streaming import NotStreamableError, StreamedModel
from calmix.precision import fast_half_precision
from calmix.pruning.budget import GIB
from calmix.pruning.states import KeptStates
from calmix.recovery.blocks import BlockReport, Stream, tune
from calmix.recovery.checks import (
    Pair,
    check_tokenizers,
    check_zeros,
    compare,
    same_head,
)
from calmix.recovery.distill import Progress, Settings, Student, distill, trained_names
from calmix.recovery.memory import Plan, Sizes, check_memory, make_plan
from calmix.recovery.training import (
    Masters,
    Rows,
    grouped,
    reproducible,
    rows_at_once,
    split_rows,
    steps_of,
)
from calmix.recovery.work import RecoveryFolder
from calmix.specs import RecoverRequest

MANIFEST, RUN = "calmix.json", "calmix-run.json"
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # what makes a folder of weights a model
SAVING = 20  # a distillation's state is kept whenever that takes less than 1/20 of the time
ROOM = 0.8  # of the free memory, for the activations of all blocks at once


@dataclass
class RecoveryReport:
    """What a recovery did.

    Attributes:
        method: `distill` or `blocks`.
        rows_at_once: rows that ran at a time in a process.
        rows, held_out: rows of the set, and the numbers of those that decided when to stop.
        before, after: loss of the held-out rows: mean KL a token in nats (distill), or the mean
            relative error a token, over blocks (blocks).
        weights, zeros: of the linear maps, and how many of them are and stay zero.
        curve: the losses on the way, in the terms of `Progress` or a `BlockReport` a block.
        seconds: by activity.
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

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)


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
    if job.main and not finished:
        check_output_folder(job.output, overwrite=overwrite)
    models = [
        streamed(n, str(job.dtype).removeprefix("torch."), str(job.device), trust_remote_code)
        for n in (pruned, against)
    ]
    try:
        for one in models:
            if real_place(one.folder) == real_place(job.output):
                raise InputError(f"{job.output} is {one.name} itself: name another output")
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
                _prepare_files(job)
            if started is not None:
                started(calibration)
            if job.goes_on:
                job.say(f"going on after {job.work.done} {job.work.unit}")
            with reproducible(job.device):
                report = job.run()
            if job.main:
                _finish(job, asked, report, called or pair.pruned.name)
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
        raise ModelError(
            f"{name} cannot be recovered: transformers converts its weights while it loads them "
            f"(first {error}), so that they cannot be told from the files"
        ) from error


class Job:
    """A recovery at work: what is asked for, what it has, and the processes that share it."""

    pair: Pair
    calibration: CalibrationSet
    rows: Rows
    plan: Plan

    def __init__(
        self,
        request: RecoverRequest,
        output: Path,
        how: dict[str, Any],
        dtype: str,
        device: str,
        max_memory: int | None,
        progress: Callable[[int, int, str], None],
        say: Callable[[str], None],
    ) -> None:
        self.request, self.output, self.how = request, output, how
        self.max_memory, self.progress = max_memory, progress
        self.accelerator: Any = None
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if launched and request.method == "blocks":
            raise InputError("recovery by blocks runs in one process: start it without a launcher")
        if launched and device not in ("auto", "cpu"):
            raise InputError(
                "--device has no effect under a launcher, which gives each process its"
            )
        self.device = device_of(device)
        if request.method == "distill":
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
            if launched:
                self.device = self.accelerator.device
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            if plugin is not None and plugin.fsdp_version != 2:
                raise InputError("only version 2 of FSDP can be used: set fsdp_version to 2")
        self.processes = self.accelerator.num_processes if self.accelerator else 1
        if request.batch % self.processes:
            raise InputError(
                f"--batch {request.batch} cannot be shared by {self.processes} processes"
            )
        self.dtype = _compute_type(dtype, self.device)
        self.main = self.accelerator is None or self.accelerator.is_main_process
        self.say = say if self.main else (lambda line: None)
        self.work = RecoveryFolder(output, "steps" if request.method == "distill" else "blocks")
        self.goes_on = False
        self.seconds: dict[str, float] = {}
        self.dense_sums: dict[int, int] = {}

    def asked(self, pruned: str, against: str) -> dict[str, Any]:
        """Return what decides the bytes of the result, as far as it is known before the draw.

        Args:
            pruned, against: hashes of both models' files.
        """
        return {
            "pruned": pruned,
            "against": against,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "processes": self.processes,
            **asked_record(self.request),
            "versions": _versions(),
        }

    def together(self, act: Callable[[], Any]) -> Any:
        """Let the main process act, and return what came of it, or raise it, in all."""
        if self.processes == 1:
            return act()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = act()
            except CalmixError as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.processes > 1:
            self.accelerator.wait_for_everyone()

    def take(self, calibration: CalibrationSet) -> None:
        """Take the calibration set, and hold rows out of it."""
        self.calibration = calibration
        seed = calibration.manifest.get("seed")
        self.seed = seed if isinstance(seed, int) else 0
        self.rows = split_rows(calibration.sources, self.request.batch, self.seed)

    def check_memory(self, sizes: Sizes, length: int, more: int = 0) -> None:
        """Tell what memory is needed, and decide what to spare to stay within it.

        What the process holds is rounded up to a quarter of a GiB, so that the same budget gives
        the same plan.

        Args:
            sizes: from `sizes_of`.
            length: of a row.
            more: bytes the process will hold beside what it holds now.

        Raises:
            InputError: more is needed than the user allows.
        """
        give_memory_back()
        if self.device.type == "cuda":
            held = torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            held, free = psutil.Process().memory_info().rss, free_memory()
        held += more
        rows = rows_at_once(self.request.batch // self.processes, length)
        room = int(ROOM * free) // self.processes
        if self.max_memory is None:
            rows = rows[:1]
        else:
            held = -(-held // (GIB // 4)) * (GIB // 4)
            room = self.max_memory - held
        if self.goes_on and (begun := self.work.progress().get("rows_at_once")):
            rows = [begun]
        self.plan = make_plan(self.request.method, sizes, length, rows, room)
        self.say("recovery " + check_memory(self.plan.needed, held, self.max_memory, free))

    def count(self, progress: Mapping[str, Any]) -> None:
        """Write how far the work is."""
        seconds = {"rows_at_once": self.plan.rows, "seconds": self.clock()}
        self.work.count({**progress, **seconds})

    def run(self) -> RecoveryReport:
        """Do the work, from where an earlier run has left it."""
        began = time.perf_counter()
        kept = self.work.progress() if self.goes_on else {}
        before = kept.get("seconds", {})
        self.seconds = {key: float(value) for key, value in before.items()}
        self._began = began - self.seconds.get("total", 0.0)
        first, last, curve = (_distill if self.request.method == "distill" else _blocks)(self, kept)
        self.clock()
        request = self.request
        return RecoveryReport(
            request.method, request.epochs, request.lr, request.batch, self.plan.rows, self.seed,
            self.calibration.rows, self.calibration.length, self.rows.held_out.tolist(),
            first, last, self.pair.weights, self.pair.zeros, curve, dict(self.seconds),
        )  # fmt: skip

    def clock(self) -> dict[str, float]:
        """Return the seconds so far."""
        self.seconds["total"] = time.perf_counter() - self._began
        return dict(self.seconds)


def sizes_of(model: StreamedModel, method: str, dtype: torch.dtype) -> Sizes:
    """Return what decides the memory of a recovery of a model, computed with in `dtype`."""
    config = model.model.config.get_text_config(decoder=True)
    largest = max(range(len(model.blocks)), key=model.block_bytes)
    own = model.parameters
    inside = sum(p.numel() for p in model.blocks.blocks[largest].parameters())
    everything = sum(own[n].numel() for n in trained_names(model.model, model.blocks))
    head = model.model.get_output_embeddings().weight
    return Sizes(
        weights=sum(p.numel() for p in own.values()),
        trained=everything if method == "distill" else inside,
        outside=model.outside_bytes // model.dtype.itemsize,
        blocks=len(model.blocks),
        hidden=getattr(config, "hidden_size", None) or head.shape[1],
        widths=widths_of(model.blocks, largest, experts_per_token(config)),
        vocabulary=head.shape[0],
        tokens=0,
        value_bytes=dtype.itemsize,
    )


def widths_of(found: DecoderBlocks, index: int, chosen: int) -> int:
    """Return the inputs and outputs, together, of the linear maps of a block a token goes through.

    Args:
        found: the blocks.
        index: which.
        chosen: experts a token is sent to.
    """
    layers = found.prunables(index)
    each: dict[str | None, int] = {}
    for layer in layers:
        each[layer.mixture] = max(each.get(layer.mixture, 0), (layer.expert or 0) + 1)
    return sum(
        sum(layer.shape) * (1 if layer.expert is None else min(chosen, each[layer.mixture]))
        for layer in layers
        if not layer.expert
    )


def _compute_type(name: str, device: torch.device) -> torch.dtype:
    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name == "auto":
        fast = device.type != "cpu" or fast_half_precision(torch.bfloat16)
        return torch.bfloat16 if fast else torch.float32
    if name not in types:
        raise InputError(f"--dtype {name} cannot train: use bfloat16 or float32")
    return types[name]


def _versions() -> dict[str, str]:
    return versions() | {"accelerate": importlib.metadata.version("accelerate")}


def _calibration(
    job: Job,
    tokenizer: OpenTokenizer,
    drawn: CalibrationSet | None,
    writing: Callable[[str, int, int], None] | None,
) -> CalibrationSet:
    """Return the set of the work that goes on, or draw it; what a model writes, the dense does."""
    if job.goes_on:
        return job.work.calibration()
    if drawn is not None:
        job.work.keep_calibration(drawn)
        return drawn
    request = job.request
    whole = needs_model(request.calibration, request.draw.get("select"))
    name = job.pair.dense.name
    opened = open_model(name, device=str(job.device), **job.how) if whole else tokenizer
    made = resolve(request.calibration, opened, writing=writing, note=job.say, **request.draw)
    job.work.keep_calibration(made)
    return made


def _prepare_files(job: Job) -> None:
    """Check the room on the disk, and make the files of the result at full size."""
    work, places = job.work, job.pair.pruned.shards.places
    files: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        files.setdefault(place.file, {})[name] = (place.dtype, place.shape)
    needed = sum(place.size for place in places.values())
    model = job.pair.pruned.model
    width = model.get_output_embeddings().weight.shape[1]
    states = job.calibration.ids.numel() * width * job.dtype.itemsize
    if job.request.method == "distill":
        own = dict(model.named_parameters())
        trained = sum(own[n].numel() for n in trained_names(model, job.pair.pruned.blocks))
        needed += states + 2 * (12 + 4) * trained
    else:
        needed += 4 * states
    held = sum(p.stat().st_blocks * 512 for p in work.path.rglob("*") if p.is_file())
    free = shutil.disk_usage(work.path).free
    if free < needed - held:
        raise DiskError(
            f"no space left for {job.output}: checkpoint and states take up to "
            f"{(needed - held) / 1e6:.0f} MB and {free / 1e6:.0f} MB are free"
        )
    work.writer = ShardWriter(work.checkpoint, files)


# Distillation


class _Keeper:
    """Keeps a distillation's weights and states in its work folder."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._saved, self._took = time.monotonic(), 0.0
        self._counted = _names(progress)

    def best(self, masters: Masters, step: int) -> None:
        """Write the weights as they will be in the result."""
        kept = _as_stored(self._job, masters)
        if self._job.main:
            self._job.work.save(f"best-{step}", kept)
            self._job.work.keep_only(f"best-{step}", *self._counted)

    def reached(self, masters: Masters, progress: Progress) -> None:
        """Write masters and moments, if the last time is long enough ago, and count the steps."""
        job, work = self._job, self._job.work
        over = progress.stopped or progress.done == progress.steps
        began = time.monotonic()
        due = job.together(lambda: not over and began - self._saved >= SAVING * self._took)
        if not due:
            return
        self._counted = _names(progress)
        work.save(f"{self._counted[0]}/{job.accelerator.process_index}", masters.state())
        job.wait()
        if job.main:
            told = {"done": progress.done, "run": asdict(progress)}
            job.count(told | {"dense": {str(n): s for n, s in job.dense_sums.items()}})
            work.keep_only(*self._counted)
        self._saved = time.monotonic()
        self._took = self._saved - began


def _names(progress: Progress) -> tuple[str, str]:
    """Return what the state and the best weights of so far are called in the work folder."""
    return f"state-{progress.done}", f"best-{progress.best}"


def _distill(job: Job, kept: dict[str, Any]) -> tuple[float, float, Any]:
    request, work, pair, accelerator = job.request, job.work, job.pair, job.accelerator
    ids = job.calibration.ids
    settings = Settings(request.epochs, request.lr, request.batch, job.plan.rows, job.seed)
    steps = len(steps_of(len(job.rows.training), request.batch, request.epochs, job.seed))
    shared = same_head(pair)
    states, dense_head = _dense_states(job, shared, kept.get("dense", {}))
    job.dense_sums = states.sums[states.side]
    type_name = str(job.dtype).removeprefix("torch.")
    model = open_model(pair.pruned.name, dtype=type_name, device=str(job.device), **job.how).model
    student: Any = Student(model, find_blocks(model), dense_head, recompute=job.plan.sparing)
    if getattr(accelerator, "is_fsdp2", False):
        # Accelerate shards a model only together with an optimiser; ours comes after.
        held = [p for p in student.parameters() if p.requires_grad]
        student, _ = accelerator.prepare(student, torch.optim.SGD(held, lr=0.0))
    else:
        student = accelerator.prepare_model(student, device_placement=job.processes > 1)
    trained = {
        name.removeprefix("module.").removeprefix("model."): p
        for name, p in student.named_parameters()
        if p.requires_grad
    }
    masters = Masters(trained, pair.stored, lambda name: name in pair.masked)
    progress = Progress(steps)
    if kept:
        run = kept["run"] | {"held_out": [(at, loss) for at, loss in kept["run"]["held_out"]]}
        progress = Progress(**run)
        rank = accelerator.process_index
        masters.restore(work.load(f"{_names(progress)[0]}/{rank}"), progress.done)

    def tick(now: Progress) -> None:
        job.progress(now.done, now.steps, f"KL {now.held_out[-1][1]:.4f}")

    began = time.perf_counter()
    distill(
        student, masters, ids, lambda rows: torch.cat([states[row] for row in rows]), job.rows,
        settings, accelerator, _Keeper(job, progress), progress=progress, tick=tick,
    )  # fmt: skip
    job.seconds["steps"] = job.seconds.get("steps", 0.0) + time.perf_counter() - began
    if job.main:
        best = work.load(_names(progress)[1]) if progress.best else {}
        _copy(job, best)
        _put(job, best)
    losses = dict(progress.held_out)
    curve = asdict(progress) | {"shared_head": shared}
    return losses[0], losses[progress.best], curve


def _dense_states(job: Job, shared: bool, sums: Mapping[str, int]) -> tuple[KeptStates, Any]:
    """Return what the dense model's head sees of every row, and that head if it is another one.

    `sums` are an earlier run's, which left the states.

    It lies in a file, in the type computed in; each process makes its share.
    """
    pair, work, ids = job.pair, job.work, job.calibration.ids
    folder = work.path / "dense"
    width = pair.dense.model.get_output_embeddings().weight.shape[1]
    like = torch.empty(1, ids.shape[1], width, dtype=job.dtype, device=job.device)
    if job.main:
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
    job.wait()
    states = KeptStates(folder, [1] * len(ids), like)
    own_head = None
    if not (job.goes_on and shared):
        began = time.perf_counter()
        type_name = str(job.dtype).removeprefix("torch.")
        model = open_model(
            pair.dense.name, dtype=type_name, device=str(job.device), **job.how
        ).model
        decoder, head = decoder_and_head(model)
        own_head = None if shared else head
        rank = job.accelerator.process_index
        own = list(range(rank, len(ids), job.processes)) if not job.goes_on else []
        for part in grouped(own, job.plan.rows):
            with torch.inference_mode():
                hidden = decoder(input_ids=ids[part].to(job.device), use_cache=False)[0]
            for row, value in zip(part, hidden, strict=True):
                states[row] = value[None]
        states.sync(1)
        job.wait()
        job.seconds["dense"] = time.perf_counter() - began
    states.restore(sums, 1)
    return states, own_head


# Block by block


def _blocks(job: Job, kept: dict[str, Any]) -> tuple[float, float, Any]:
    request, work, pair = job.request, job.work, job.pair
    ids, found = job.calibration.ids, job.pair.pruned.blocks
    ahead = not job.plan.sparing
    together = rows_at_once(request.batch, ids.shape[1])[0]  # in steps, whatever runs at a time
    groups: list[list[int]] = []
    numbers: list[list[int]] = []
    for rows in (*grouped(job.rows.training.tolist(), together), job.rows.held_out.tolist()):
        parts = grouped(rows, job.plan.rows)
        numbers.append(list(range(len(groups), len(groups) + len(parts))))
        groups += parts
    reports = [BlockReport(**report) for report in kept.get("blocks", [])]
    began = time.perf_counter()
    dense, pruned = (_stream(job, m, groups) for m in (pair.dense, pair.pruned))
    assert work.writer is not None
    work.writer.check(kept.get("weights", {}))
    if not reports:
        inside = {n for i in range(len(found)) for n in pair.pruned.block_names(i)}
        _copy(job, inside)
    made = Shards(work.checkpoint)
    for index in range(len(found)):
        pair.dense.fetch(index, ahead=ahead)
        dense.advance(index)
        pair.dense.drop(index)
        pair.pruned.fetch(index, ahead=ahead)
        prefix = f"{found.name}.{index}."
        own = {prefix + name: p for name, p in found.blocks[index].named_parameters()}
        if index < len(reports):  # an earlier run's: only the streams are made again
            weights = {name: pair.pruned.stored(name, made) for name in own}
        else:
            for parameter in own.values():
                parameter.requires_grad_(True)
            masters = Masters(own, pair.stored, lambda name: name in pair.masked)
            best: dict[str, Tensor] = {}
            report = tune(
                pruned, index, masters, dense.states, numbers[:-1], numbers[-1],
                [len(group) * ids.shape[1] for group in groups],
                at_once=request.batch // together, epochs=request.epochs, lr=request.lr,
                seed=job.seed, keep=functools.partial(_keep, job, masters, best),
            )  # fmt: skip
            reports.append(report)
            for parameter in own.values():
                parameter.requires_grad_(False)
            del masters
            weights = best or {name: pair.stored(name) for name in own}
            _put(job, weights)
            work.writer.sync()
            told = [asdict(report) for report in reports]
            job.count({"done": index + 1, "blocks": told, "weights": work.writer.sums})
        for name, parameter in own.items():
            parameter.data.copy_(weights[name])
        del weights
        pruned.advance(index)
        del own
        pair.pruned.drop(index)
        job.progress(index + 1, len(found), f"error {reports[index].after:.4f}")
    job.seconds["blocks"] = job.seconds.get("blocks", 0.0) + time.perf_counter() - began
    first = sum(report.before for report in reports) / len(reports)
    last = sum(report.after for report in reports) / len(reports)
    return first, last, [asdict(report) for report in reports]


def _keep(job: Job, masters: Masters, best: dict[str, Tensor]) -> None:
    """Put what the masters are now in place of what was best, in the types it is written in."""
    best.clear()
    best.update(_as_stored(job, masters, copy=True))


def _stream(job: Job, streamed: StreamedModel, groups: Sequence[Sequence[int]]) -> Stream:
    """Return a model's stream before its first block, its states in files."""
    folder = job.work.path / ("dense" if streamed is job.pair.dense else "pruned")
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    streamed.fetch_outside()
    streamed.fetch(0)
    stream = Stream(streamed.model, streamed.blocks)
    for number, hidden in enumerate(stream.record(job.calibration.ids, groups)):
        if not number:
            sizes = [len(group) for group in groups]
            stream.states = KeptStates(folder, sizes, hidden)
        stream.states[number] = hidden
    stream.states.turn()
    streamed.drop_outside()
    return stream


# What is written


def _as_stored(job: Job, masters: Masters, *, copy: bool = False) -> dict[str, Tensor]:
    """Return masters whole, by name, in the types the pruned model is stored in."""
    kept = {}
    for name, value in masters.full():
        if job.main:
            kept[name] = value.to(job.pair.pruned.stored_dtype(name), copy=copy)
    return kept


def _put(job: Job, tensors: Mapping[str, Tensor]) -> None:
    """Write trained weights to their places; every zero must still be one."""
    assert job.work.writer is not None
    for name, value in tensors.items():
        if name in job.pair.masked:
            check_zeros(job.pair, name, value)
        job.work.writer.write(job.pair.pruned.as_stored({name: value}))


def _copy(job: Job, but: Collection[str]) -> None:
    """Copy the pruned model's tensors, but those of some parameters, one at a time."""
    assert job.work.writer is not None
    shards = job.pair.pruned.shards
    left = {stored for name in but for stored in job.pair.pruned.stored_names(name)}
    for name in shards.places:
        if name not in left:
            job.work.writer.write(shards.read([name]))


def _finish(job: Job, asked: dict[str, Any], report: RecoveryReport, called: str) -> None:
    """Write all that stands beside the weights, and turn the work into the output."""
    work, pruned = job.work, job.pair.pruned
    told = report.to_json()
    seconds = told.pop("seconds")
    manifest = {
        "kind": "recovered checkpoint",
        "model": {"name": called, "sha256": asked["pruned"]},
        "against": {"name": job.pair.dense.name, "sha256": asked["against"]},
        "dtype": asked["dtype"],
        "device": asked["device"],
        "processes": job.processes,
        "request": request_record(job.request),
        "calibration": job.calibration.manifest,
        "recovery": told,
        "pruned": _told(pruned.folder / MANIFEST),
        "versions": asked["versions"],
        "request_sha256": sha256_json(asked),
    }
    assert work.writer is not None
    kinds = (*BESIDE, "*.py") if job.how["trust_remote_code"] else BESIDE
    with disk_errors(work.path):
        work.writer.write_index()
        for path in (path for kind in kinds for path in pruned.folder.glob(kind)):
            if path.name not in (MANIFEST, RUN) and not path.name.endswith(".index.json"):
                shutil.copyfile(path, work.checkpoint / path.name)
        hashed = {"files": file_hashes(work.checkpoint, without=(MANIFEST, RUN))}
        write_json(work.checkpoint / MANIFEST, sealed(manifest | hashed))
        run = run_record(seconds) | {"pruned": _told(pruned.folder / RUN)}
        write_json(work.checkpoint / RUN, run)
    work.complete()


def _told(path: Path) -> Any:
    """Return what the pruned model's manifest or run record holds; None if it has none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finished_report(job: Job, asked: dict[str, Any]) -> RecoveryReport | None:
    """Return the report of an output that an earlier run of the same request has finished."""
    try:
        manifest = json.loads((job.output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["request_sha256"] != sha256_json(asked):
            return None
        run = json.loads((job.output / RUN).read_text(encoding="utf-8"))
        report = RecoveryReport(**manifest["recovery"], seconds=run["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    job.say(f"{job.output} was finished by an earlier run")
    job.work.remove_leftover()
    return report


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
