"""Prune a model block by block, to disk and in bounded memory, and resume an interrupted run.

The numbers are those of `calmix.pruning.engine`, which does the work; here is where weights come
from, and where they and the hidden states go. Only weights are kept for a later run: it takes the
calibration rows through the finished blocks once more, which gives the same hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from shutil import rmtree

from torch import Tensor

from calmix.models.streaming import StreamedModel
from calmix.pruning import distributed
from calmix.pruning.budget import Plan
from calmix.pruning.engine import Run, memory_errors
from calmix.pruning.report import PruneReport
from calmix.pruning.solvers.grids import SCALES, stored
from calmix.pruning.states import States
from calmix.pruning.work import CHECKPOINT, WorkFolder


def prune_streamed(
    source: StreamedModel,
    ids: Tensor | None,
    run: Run,
    work: WorkFolder,
    plan: Plan,
    progress: Callable[[int], None] = lambda done: None,
) -> PruneReport:
    """Prune a model into a work folder, from the first block that is not done.

    `progress` is called with the blocks that are done.
    """
    files = [(f"{CHECKPOINT}/{name}", names) for name, names in source.layout.items()]
    count, began = len(source.blocks), time.perf_counter()
    if work.done:
        run.report = PruneReport.from_json(work.kept["report"])
    began -= run.report.seconds.get("total", 0.0)
    later = run.embeddings is not None  # what is outside the blocks changes once they are done

    def save_rest() -> None:
        for name, names in files[count:]:
            if work.claimed and name not in work.kept.get("files", {}):
                work.save(name, source.rest(names, run.report.embeddings))

    if not later:
        save_rest()
    progress(work.done)
    done = [file for file, _ in files[: work.done]]
    unfinished = work.done < count or later
    for index in take_through(source, ids, run, work, plan, done) if unfinished else ():
        run.report.seconds["total"] = time.perf_counter() - began
        if work.claimed:
            work.save(files[index][0], source.weights(index))
            if run.grids:
                work.save(f"{CHECKPOINT}/{SCALES}/{index:05}", stored(run.grids))
        work.keep(done=index + 1, report=run.report.to_dict())
        progress(index + 1)
    if later:
        save_rest()
        if work.claimed:
            work.save(f"{CHECKPOINT}/{SCALES}/outside", stored(run.grids))
        source.drop_outside()
    run.report.seconds["total"] = time.perf_counter() - began
    return run.report


def take_through(
    source: StreamedModel,
    ids: Tensor | None,
    run: Run,
    work: WorkFolder,
    plan: Plan,
    done: list[str] | tuple[()] = (),
) -> Iterator[int]:
    """Take a run through all blocks; yield the number of each while its weights are there.

    `done` are the files of those that an earlier run has pruned. What is outside the blocks is
    there at the end if the run has changed it.
    """
    run.paused, run.expert_bytes = plan.paused, plan.expert_bytes
    folder = None
    if run.needs_ids:
        folder = work.scratch(f"states-{distributed.processes()[0]}")
        run.states = States(folder, source.device, plan.states)
        with memory_errors(run, source.device):
            source.fetch_outside()
            source.fetch(0)
            run.record(ids, plan.micro_tokens)
        source.drop_outside()
    for index in range(len(source.blocks)):
        if index >= len(done):
            with memory_errors(run, source.device):
                source.fetch(index, ahead=plan.overlap)
                run.block(index)
            yield index
        elif run.needs_ids:
            source.refill(index, work.load(done[index]))
            with memory_errors(run, source.device):
                run.replay(index)
        source.drop(index)
    if run.embeddings is not None:
        with memory_errors(run, source.device):
            source.fetch_outside(head=True)
            run.outside()
    if folder is not None:
        rmtree(folder, ignore_errors=True)
