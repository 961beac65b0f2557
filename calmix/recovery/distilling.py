"""Recovery of the whole model at once, kept in a work folder: the edge of distill.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from calmix.errors import disk_errors
from calmix.evaluation.likelihood import decoder_and_head
from calmix.models import find_blocks
from calmix.pruning.old_states import Entry, KeptStates
from calmix.recovery.checks import same_head
from calmix.recovery.distill import Progress, Settings, Student, distill
from calmix.recovery.job import Job
from calmix.recovery.output import as_stored, copy_others, put
from calmix.recovery.training import Masters, grouped, steps_of

SAVING = 20  # a state is kept whenever that takes less than 1/20 of the time


class _Keeper:
    """Keeps a distillation's weights and states in its work folder."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job = job
        self._saved, self._took = time.monotonic(), 0.0
        self._counted = _names(progress)

    def best(self, masters: Masters, step: int) -> None:
        """Write the weights as they will be in the result."""
        kept = as_stored(self._job, masters)
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
            job.count(told | {"dense": job.dense})
            work.keep_only(*self._counted)
        self._saved = time.monotonic()
        self._took = self._saved - began


def _names(progress: Progress) -> tuple[str, str]:
    """Return what the state and the best weights of so far are called in the work folder."""
    return f"state-{progress.done}", f"best-{progress.best}"


def distill_model(job: Job, kept: dict[str, Any]) -> tuple[float, float, Any]:
    """Distill the whole model; return the held-out loss before and after, and on the way.

    Args:
        job: what to do, with its work folder.
        kept: how far an earlier run has come; empty if it begins.
    """
    request, work, pair, accelerator = job.request, job.work, job.pair, job.accelerator
    ids = job.calibration.ids
    settings = Settings(request.epochs, request.lr, request.batch, job.plan.rows, job.seed)
    steps = len(steps_of(len(job.rows.training), request.batch, request.epochs, job.seed))
    shared = same_head(pair)
    states, dense_head = _dense_states(job, shared, kept.get("dense", {}))
    job.dense = {str(number): entry for number, entry in states.entries[states.side].items()}
    model = job.whole(pair.pruned.name)
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
        copy_others(job, best)
        put(job, best)
    losses = dict(progress.held_out)
    curve = asdict(progress) | {"shared_head": shared}
    return losses[0], losses[progress.best], curve


def _dense_states(job: Job, shared: bool, entries: Mapping[str, Entry]) -> tuple[KeptStates, Any]:
    """Return what the dense model's head sees of every row, and that head if it is another one.

    `entries` are an earlier run's, which left the states.

    It lies in a file, in the type computed in; each process makes its share.
    """
    pair, work, ids = job.pair, job.work, job.calibration.ids
    folder = work.path / "dense"
    if job.main:
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
    job.wait()
    states = KeptStates(folder, [1] * len(ids), job.device)
    own_head = None
    if not (job.goes_on and shared):
        began = time.perf_counter()
        decoder, head = decoder_and_head(job.whole(pair.dense.name))
        own_head = None if shared else head
        rank = job.accelerator.process_index
        own = list(range(rank, len(ids), job.processes)) if not job.goes_on else []
        for part in grouped(own, job.plan.rows):
            with torch.inference_mode():
                hidden = decoder(input_ids=ids[part].to(job.device), use_cache=False)[0]
            for row, value in zip(part, hidden, strict=True):
                states[row] = value[None]
        states.sync(1)
        entries = entries or job.gathered({str(n): e for n, e in states.entries[1].items()})
        job.seconds["dense"] = time.perf_counter() - began
    states.restore(entries, 1)
    return states, own_head
