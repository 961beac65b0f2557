"""Prune a model block by block, to disk and in bounded memory, and resume an interrupted run.

The numbers are those of `calmix.pruning.engine`, which does the work; here is where weights come
from, and where they and the hidden states go. Only weights are kept for a later run: it takes the
calibration rows through the finished blocks once more, which gives the same hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TypeVar

from torch import Tensor

from calmix.errors import SolverError
from calmix.machine import free_memory
from calmix.models.streaming import WeightSource
from calmix.pruning import distributed
from calmix.pruning.budget import Plan
from calmix.pruning.engine import Patterns, Propagation, Run, check_ids, check_pattern
from calmix.pruning.gram import Statistic
from calmix.pruning.methods import Method
from calmix.pruning.report import PruneReport
from calmix.pruning.solvers.grids import SCALES, stored
from calmix.pruning.states import States
from calmix.pruning.work import CHECKPOINT, WorkFolder

HOST_SHARE = 0.5  # of the host's free memory, for states an accelerator has no room for
Pass = TypeVar("Pass", bound=Run)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a model is pruned to: a work folder, a method, patterns as for `prune`, and how.

    `allocation` says where patterns by layer are from.
    """

    work: WorkFolder
    method: Method
    pattern: Patterns
    propagation: Propagation = "sequential"
    allocation: str | None = None


def prune_streamed(
    source: WeightSource,
    ids: Tensor | None,
    targets: Sequence[Target],
    plan: Plan,
    *,
    sources: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[PruneReport | SolverError]:
    """Prune a model into the targets' work folders, each from its first block that is not done.

    A block is read once and pruned for every target. What is the same for all is done once: the
    decoder's part before the blocks, and the statistic of the first input. Of several targets
    those that a method cannot solve end with its error, and the others go on.
    """
    blocks, layout = source.blocks, list(source.layout.items())
    began = time.perf_counter()
    shared: dict[tuple[type[Statistic], int], Tensor] = {}
    runs: list[Run] = []
    failed: dict[Run, SolverError] = {}
    for target in targets:
        check_pattern(blocks, target.pattern, target.method)
        run = Run(
            source.model, blocks, target.method, target.pattern, target.propagation,
            plan.paused, shared if len(targets) > 1 else None,
            expert_bytes=plan.expert_bytes, sources=sources,
        )  # fmt: skip
        run.report.allocation = target.allocation
        if target.work.done:
            run.report = PruneReport.from_json(target.work.kept["report"])
        runs.append(run)
    spent = max((run.report.seconds.get("total", 0.0) for run in runs), default=0.0)
    both = [(t, r) for t, r in zip(targets, runs, strict=True) if t.work.done < len(blocks)]
    calibrated = [(target, run) for target, run in both if run.needs_ids]
    if calibrated:
        _first_states(source, check_ids(ids, calibrated[0][1].method.name), plan, calibrated)
    for target, _ in both:
        for name, tensors in layout[len(blocks) :]:
            if target.work.claimed and _file(source, name) not in target.work.kept.get("files", {}):
                target.work.save(_file(source, name), source.rest(tensors))
    finished = sum(target.work.done for target in targets)
    if finished and progress is not None:
        progress(finished, len(runs) * len(blocks))
    for index in range(len(blocks)):
        name = _file(source, layout[index][0])
        left = [(target, run) for target, run in both
                if target.work.done <= index and run not in failed]  # fmt: skip
        replayed = [(target, run) for target, run in calibrated if target.work.done > index]
        if left:
            source.fetch(index, ahead=plan.overlap)
        own = {layer.parameter_id: layer.whole() for layer in blocks.prunables(index)}
        dense = {weight: weight.clone() for weight in own.values()} if len(left) > 1 else {}
        for target, run in left:
            for parameter, weight in dense.items():
                parameter.copy_(weight)
            try:
                run.block(index)
            except SolverError as error:
                if len(failed) == len(runs) - 1:
                    raise
                failed[run] = error
                continue
            run.report.seconds["total"] = spent + time.perf_counter() - began
            if target.work.claimed:
                target.work.save(name, source.weights(index))
                if run.grids:
                    target.work.save(f"{CHECKPOINT}/{SCALES}/{index:05}", stored(run.grids))
            target.work.keep(done=index + 1, report=run.report.to_json())
            finished += 1
            if progress is not None:
                progress(finished, len(runs) * len(blocks))
        own.clear()  # one block lives at a time
        dense.clear()
        for target, run in replayed:
            source.refill(index, target.work.load(name))
            run.replay(index)
        shared.clear()
        source.drop(index)
    for run in runs:
        run.report.seconds["total"] = spent + time.perf_counter() - began
    return [failed.get(run, run.report) for run in runs]


def _file(source: WeightSource, name: str) -> str:
    """Return where a file lies in the work folder: in the checkpoint if it is one of its own."""
    return f"{CHECKPOINT if source.in_place else 'blocks'}/{name}"


def pass_through(
    source: WeightSource, ids: Tensor, look: Pass, work: WorkFolder, plan: Plan
) -> Pass:
    """Take a run that changes nothing through all blocks, its hidden states in a work folder."""
    folder = _states(source, ids, [(work, look)], plan)
    source.fetch_outside()
    source.fetch(0)
    for number, hidden in look.record(ids, plan.micro_tokens):
        look.states[number] = hidden
    source.drop_outside()
    for index in range(len(source.blocks)):
        source.fetch(index, ahead=plan.overlap)
        look.block(index)
        source.drop(index)
    rmtree(folder, ignore_errors=True)
    return look


def _first_states(
    source: WeightSource, ids: Tensor, plan: Plan, at: Sequence[tuple[Target, Run]]
) -> None:
    """Record what the decoder hands to its blocks, and give each run its first hidden states."""
    _states(source, ids, [(target.work, run) for target, run in at], plan)
    source.fetch_outside()
    source.fetch(0)
    (_, first), *others = at
    for number, hidden in first.record(ids, plan.micro_tokens):
        for _, run in at:
            run.states[number] = hidden
    for _, run in others:
        run.recorded_by(first)
    source.drop_outside()


def _states(
    source: WeightSource, ids: Tensor, at: Sequence[tuple[WorkFolder, Run]], plan: Plan
) -> Path:
    """Give runs empty hidden states that share the room there is; return the last one's folder."""
    distributed.own_rows(ids)  # too few are refused before there is a folder of one's own
    host = 0
    if source.device.type in ("cuda", "xpu"):
        host = int(HOST_SHARE * free_memory()) // distributed.here() // len(at)
    for work, run in at:
        folder = work.scratch(f"states-{distributed.processes()[0]}")
        run.states = States(folder, source.device, plan.states // len(at), host)
    return folder
