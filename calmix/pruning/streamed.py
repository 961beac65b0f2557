"""Prune a model block by block from disk to disk, in bounded memory, so that it can go on later.

The numbers are those of `calmix.pruning.engine`, which does the work; here is where weights come
from, where they and the hidden states go, and what is kept of both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from calmix.models.shards import ShardWriter
from calmix.models.streaming import StreamedModel, other_tensors, stored_types
from calmix.pruning.budget import Plan, Sizes, make_plan
from calmix.pruning.engine import (
    MICRO_TOKENS,
    Propagation,
    PruneReport,
    Run,
    check_ids,
    check_pattern,
)
from calmix.pruning.methods import METHODS
from calmix.pruning.patterns import Pattern
from calmix.pruning.work import WorkFolder

FREE_SHARE = 0.9  # of the memory that is free, where no budget is given


def plan_for(
    streamed: StreamedModel,
    ids: Tensor | None,
    *,
    method: str,
    propagation: Propagation,
    budget: int | None,
) -> Plan:
    """Return how a prune stays within a budget, or within what is free now.

    Args:
        streamed: the model, nothing of it read yet.
        ids: calibration ids, None for a method that needs none.
        budget: bytes; None for what is free, which is never refused.

    Raises:
        InputError: the budget cannot hold one block at work.
    """
    blocks = streamed.blocks
    rows, length = (0, 0) if ids is None else ids.shape
    config = streamed.model.config.get_text_config(decoder=True)
    layers = [layer.shape for layer in blocks.prunables(0)]
    sizes = Sizes(
        block_bytes=max(streamed.block_bytes(index) for index in range(len(blocks))),
        outside_bytes=streamed.outside_bytes if rows else 0,
        layers=layers,
        hidden=getattr(config, "hidden_size", None) or max(columns for _, columns in layers),
        rows=rows,
        length=length,
        value_bytes=streamed.dtype.itemsize,
        statistic=METHODS[method].statistic,
    )
    if streamed.device.type == "cuda":
        held = torch.cuda.memory_allocated(streamed.device)
        free = torch.cuda.mem_get_info(streamed.device)[0]
    else:
        held = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available
    sequential = propagation == "sequential" and METHODS[method].statistic != "none"
    if budget is not None:
        return make_plan(sizes, budget, held, MICRO_TOKENS, sequential=sequential)
    # Without a budget the micro-batch stays what it is, so that no number depends on the moment.
    whole = make_plan(sizes, 2**62, held, MICRO_TOKENS, sequential=sequential)
    with contextlib.suppress(Exception):
        fitted = make_plan(
            sizes, held + int(FREE_SHARE * free), held, MICRO_TOKENS, sequential=sequential
        )
        if fitted.micro_tokens == whole.micro_tokens:
            return fitted
    return Plan(whole.micro_tokens, 0 if sequential else None, False, whole.needed)


def prepare_files(streamed: StreamedModel, work: WorkFolder) -> None:
    """Make the files of the result at full size, or find those of an earlier run.

    Raises:
        InputError: the disk has no room.
    """
    work.writer = ShardWriter(work.checkpoint, stored_types(streamed))


def prune_streamed(
    streamed: StreamedModel,
    ids: Tensor | None,
    work: WorkFolder,
    plan: Plan,
    *,
    method: str,
    pattern: Pattern,
    propagation: Propagation,
    damping: float,
    progress: Callable[[int, int], None] | None = None,
) -> PruneReport:
    """Prune a model into its work folder, from the first block that is not done.

    Args:
        streamed: the model, nothing of it read yet.
        ids: calibration ids, None for a method that needs none.
        work: claimed, with its files made.
        plan: of memory.
        progress: called with (blocks done, blocks), at the start too if some are done.

    Raises:
        ModelError, InputError, SolverError: as `calmix.pruning.engine.prune`.
        InputError: the disk is full; what is done stays.
    """
    blocks = streamed.blocks
    check_pattern(blocks, pattern)
    began = time.perf_counter()
    run = Run(streamed.model, blocks, method, pattern, propagation, damping, plan.paused)
    done = work.restore(run.report)
    spent = run.report.seconds.pop("total", 0.0)
    if done and progress is not None:
        progress(done, len(blocks))
    if run.needs_ids:
        ids = check_ids(ids, method)
        _first_states(streamed, run, ids, work, plan, done)
    elif not done:
        streamed.fetch(0, ahead=plan.overlap)
    if not done:
        _copy_others(streamed, work)
    assert work.writer is not None
    for index in range(done, len(blocks)):
        if index:
            streamed.fetch(index, ahead=plan.overlap)
        run.block(index)
        run.report.seconds["total"] = spent + time.perf_counter() - began
        work.finish_block(index, streamed.drop(index), run.report, overlap=plan.overlap)
        if progress is not None:
            progress(index + 1, len(blocks))
    work.wait()
    run.report.seconds["total"] = spent + time.perf_counter() - began
    return run.report


def _first_states(
    streamed: StreamedModel, run: Run, ids: Tensor, work: WorkFolder, plan: Plan, done: int
) -> None:
    """Record what the decoder hands to its blocks, and where nothing is done the first states."""
    streamed.fetch_outside()
    streamed.fetch(0, ahead=plan.overlap and not done)
    batches = [len(batch) for batch in ids.split(max(1, plan.micro_tokens // ids.shape[1]))]
    for number, hidden in run.record(ids, plan.micro_tokens):
        if not number:
            states = work.make_states(batches, hidden, done)
            run.states = states
            states.turn()  # the first are written to the side that is read first
        if not done:
            states[number] = hidden
    states.turn()
    streamed.drop_outside()
    if done:
        streamed.drop(0)


def _copy_others(streamed: StreamedModel, work: WorkFolder) -> None:
    """Copy what belongs to no block, one tensor at a time."""
    assert work.writer is not None
    for name in other_tensors(streamed):
        work.writer.write(streamed.shards.read([name]))
