"""Prune a model block by block, to disk and in bounded memory, so that it can go on later.

The numbers are those of `calmix.pruning.engine`, which does the work; here is where weights come
from, where they and the hidden states go, and what is kept of both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from torch import Tensor

from calmix.errors import InputError
from calmix.machine import device_memory, free_memory, tokens_at_once
from calmix.models.shards import ShardWriter
from calmix.models.streaming import WeightSource
from calmix.pruning import distributed
from calmix.pruning.allocation import DensePass
from calmix.pruning.budget import GIB, Plan, Sizes, make_plan
from calmix.pruning.engine import Patterns, Propagation, Run, check_ids, check_pattern
from calmix.pruning.gram import Statistic
from calmix.pruning.methods import Method
from calmix.pruning.old_states import KeptStates, Room
from calmix.pruning.old_work import WorkFolder
from calmix.pruning.report import PruneReport
from calmix.pruning.trace import token_bytes

FREE_SHARE = 0.9  # of the memory that is free, where no budget is given
WORKSPACE = GIB // 2  # that libraries take on an accelerator beside tensors, and what they load
KERNELS = GIB // 16  # that oneDNN's take on a CPU; the command line bounds their number
HOST_SHARE = 0.5  # of the host's that is free, for hidden states an accelerator has no room for


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a model is pruned to.

    Attributes:
        work: where the result and all it takes to go on lie.
        method: with its options.
        pattern, propagation: as for `calmix.pruning.engine.prune`.
        allocation: where a pattern by layer is from, for the report.
    """

    work: WorkFolder
    method: Method
    pattern: Patterns
    propagation: Propagation
    allocation: str | None = None


def plan_for(
    source: WeightSource,
    ids: Tensor | None,
    targets: Sequence[Target],
    *,
    budget: int | None,
    beside: Sequence[Method] = (),
) -> Plan:
    """Return how a prune stays within a budget, or within what is free now.

    Args:
        source: the model.
        ids: calibration ids, None if no target needs them.
        targets: what is to be done.
        budget: bytes of each process; None for what is free, of which a CPU may take more.
        beside: what else looks at the model.

    Raises:
        InputError: the budget cannot hold one block at work, with micro-batches of the size that
            earlier work had, or earlier works of several targets had other sizes.
    """
    blocks = source.blocks
    accelerator = source.device.type != "cpu"
    rows, length = (0, 0) if ids is None else ids.shape
    rows = -(-rows // distributed.processes()[1])
    largest = max(range(len(blocks)), key=source.block_bytes)
    pruned = [index for index in range(len(blocks)) if blocks.prunables(index)]
    layers = blocks.prunables(max(pruned, key=source.block_bytes))
    inside = [layer for layer in layers if layer.expert is not None]
    one = {layer.mixture: layer.expert for layer in inside}
    sizes = Sizes(
        block_bytes=source.block_bytes(largest),
        copies=(len(targets) > 1) + source.merges,
        outside_bytes=source.outside_bytes if rows else 0,
        layers=[layer.shape for layer in layers if layer.expert is None],
        experts=[layer.shape for layer in inside if layer.expert == one[layer.mixture]],
        expert_count=max((layer.expert or 0 for layer in inside), default=-1) + 1,
        hidden=token_bytes(source.model, blocks) // source.dtype.itemsize if rows else 0,
        rows=rows,
        length=length,
        value_bytes=source.dtype.itemsize,
        methods=[target.method for target in targets] + list(beside),
        accelerator=accelerator,
    )
    held, free, total = device_memory(source.device)
    swaps = total is None
    if swaps:  # memory that processes here share, as they do not a device
        free //= distributed.here()
    room = held + int(FREE_SHARE * free) if budget is None else budget
    held += KERNELS if swaps else WORKSPACE
    sequential = bool(beside) or any(
        t.propagation == "sequential" and t.method.needs for t in targets
    )
    earlier = {target.work.batch for target in targets} - {0}
    if len(earlier) > 1:
        counts = " and ".join(map(str, sorted(earlier)))
        raise InputError(
            f"the interrupted runs had micro-batches of {counts} rows, because their "
            "--max-memory differed: resume them one by one"
        )
    goes_on = bool(earlier)
    at_once = earlier.pop() * length if goes_on else tokens_at_once(source.device)
    # Earlier work goes on with the micro-batch it had. On a CPU it is the same whatever happens to
    # be free, so that no number depends on the moment; what does not fit is swapped.
    fixed = goes_on or (budget is None and swaps)
    try:
        return make_plan(sizes, room, held, at_once, sequential=sequential, fixed=fixed)
    except InputError:
        if budget is not None or not swaps:
            raise
    whole = make_plan(sizes, 2**62, held, at_once, sequential=sequential, fixed=True)
    return Plan(whole.micro_tokens, 0 if sequential else None, False, whole.needed)


def room_for(source: WeightSource, plan: Plan, runs: int = 1) -> Room:
    """Return what the hidden states of one of several runs may take."""
    host = 0
    if source.device.type in ("cuda", "xpu"):
        host = int(HOST_SHARE * free_memory()) // distributed.here()
    return Room(plan.states // runs, host // runs)


def prepare_files(source: WeightSource, work: WorkFolder) -> None:
    """Make the files of the result at full size, or find those of an earlier run.

    Of several processes the first one does.

    Raises:
        InputError: the disk has no room.
    """
    if not work.leads:
        return
    folder = work.checkpoint if source.in_place else work.path / "blocks"
    work.writer = ShardWriter(folder, source.files())


def prune_streamed(
    source: WeightSource,
    ids: Tensor | None,
    targets: Sequence[Target],
    plan: Plan,
    *,
    sources: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[PruneReport]:
    """Prune a model into the targets' work folders, each from its first block that is not done.

    A block is read once and pruned for every target. What is exactly the same for all is done
    once: the decoder's part before the blocks, and the statistic of the first input.

    Args:
        source: the model.
        ids: calibration ids, None if no target needs them.
        targets: their work folders are claimed, with their files made.
        plan: of memory.
        sources: of each calibration row, for the report.
        progress: called with (blocks done, blocks) of all targets, at the start too if some are.

    Raises:
        ModelError, InputError, SolverError: as `calmix.pruning.engine.prune`.
        InputError: the disk is full; what is done stays.
    """
    blocks = source.blocks
    began = time.perf_counter()
    shared: dict[tuple[type[Statistic], int], Tensor] = {}
    runs: list[Run] = []
    for target in targets:
        check_pattern(blocks, target.pattern)
        run = Run(
            source.model, blocks, target.method, target.pattern, target.propagation,
            plan.paused, shared if len(targets) > 1 else None,
            expert_bytes=plan.expert_bytes, sources=sources,
        )  # fmt: skip
        run.report.allocation = target.allocation
        runs.append(run)
    done = [target.work.restore(run.report) for target, run in zip(targets, runs, strict=True)]
    spent = max((run.report.seconds.get("total", 0.0) for run in runs), default=0.0)
    calibrated = [i for i, run in enumerate(runs) if run.needs_ids]
    if calibrated:
        _first_states(
            source, check_ids(ids, targets[calibrated[0]].method.name), plan,
            [(runs[i], targets[i].work, done[i]) for i in calibrated],
        )  # fmt: skip
    for target, first in zip(targets, done, strict=True):
        if not first and target.work.writer is not None:
            source.copy_others(target.work.writer)
    finished = sum(done)
    if finished and progress is not None:
        progress(finished, len(runs) * len(blocks))
    for index in range(min(done, default=len(blocks)), len(blocks)):
        source.fetch(index, ahead=plan.overlap)
        dense = _copies(source, index) if len(runs) > 1 else {}
        for number, (target, run) in enumerate(zip(targets, runs, strict=True)):
            if done[number] > index:
                continue
            for parameter, weight in dense.items():
                parameter.copy_(weight)
            run.block(index)
            run.report.seconds["total"] = spent + time.perf_counter() - began
            target.work.finish_block(
                index, source.weights(index, copy=len(runs) > 1), run.report, run.written,
                overlap=plan.overlap, last=index + 1 == len(blocks),
            )  # fmt: skip
            finished += 1
            if progress is not None:
                progress(finished, len(runs) * len(blocks))
        shared.clear()
        source.drop(index)
    for target, run in zip(targets, runs, strict=True):
        target.work.wait()
        run.report.seconds["total"] = spent + time.perf_counter() - began
    return [run.report for run in runs]


Pass = TypeVar("Pass", bound=Run)


def look_streamed(
    source: WeightSource,
    ids: Tensor,
    by: str,
    sparsities: Sequence[float],
    work: WorkFolder,
    plan: Plan,
) -> DensePass:
    """Take a pass over the dense model, its hidden states beside those of a target to be.

    Args:
        source, ids, plan: as for `prune_streamed`.
        by, sparsities: as for `DensePass`.
        work: a claimed work folder.
    """
    look = DensePass(source.model, source.blocks, by, sparsities, plan.paused)
    look.expert_bytes = plan.expert_bytes
    return pass_through(source, ids, look, work, plan)


def pass_through(
    source: WeightSource, ids: Tensor, look: Pass, work: WorkFolder, plan: Plan
) -> Pass:
    """Take a run that changes nothing through all blocks, its hidden states in a work folder."""
    blocks, batches = source.blocks, _batches(ids, plan)
    source.fetch_outside()
    source.fetch(0)
    with TemporaryDirectory(dir=work.path) as folder:
        states = KeptStates(Path(folder), batches, source.device, room_for(source, plan))
        look.states = states
        for number, hidden in look.record(ids, plan.micro_tokens):
            states[number] = hidden
        source.drop_outside()
        for index in range(len(blocks)):
            states.turn()
            source.fetch(index, ahead=plan.overlap)
            look.block(index)
            source.drop(index)
    return look


def _batches(ids: Tensor, plan: Plan) -> list[int]:
    """Return the rows of this process's micro-batches."""
    own = distributed.own_rows(ids)
    return [len(batch) for batch in own.split(max(1, plan.micro_tokens // ids.shape[1]))]


def _copies(source: WeightSource, index: int) -> dict[Tensor, Tensor]:
    """Return a copy of every weight of a block that pruning changes."""
    own = {layer.parameter_id: layer.whole() for layer in source.blocks.prunables(index)}
    return {weight: weight.clone() for weight in own.values()}


def _first_states(
    source: WeightSource, ids: Tensor, plan: Plan, at: Sequence[tuple[Run, WorkFolder, int]]
) -> None:
    """Record what the decoder hands to its blocks; give each run that begins its first states."""
    source.fetch_outside()
    source.fetch(0)
    batches, room = _batches(ids, plan), room_for(source, plan, len(at))
    first, others = at[0][0], [run for run, _, _ in at[1:]]
    for run, work, _ in at:
        run.states = work.make_states(batches, source.device, room)
    for number, hidden in first.record(ids, plan.micro_tokens):
        for run, _, done in at:
            if not done:
                run.states[number] = hidden
    for run in others:
        run.recorded_by(first)
    for run, work, done in at:
        assert work.states is not None
        if not done:
            work.states.turn()
        work.restore_written(run.written)
    source.drop_outside()
    if all(done for _, _, done in at):
        source.drop(0)
