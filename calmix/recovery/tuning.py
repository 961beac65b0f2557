"""Recovery of one block after the other, out of files and into them: the edge of blocks.py."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from calmix.errors import disk_errors
from calmix.models.shards import Shards
from calmix.models.streaming import StreamedModel
from calmix.pruning.old_states import KeptStates
from calmix.recovery.blocks import BlockReport, Stream, tune
from calmix.recovery.job import Job
from calmix.recovery.output import as_stored, copy_others, put
from calmix.recovery.training import Masters, grouped, rows_at_once


def tune_blocks(job: Job, kept: dict[str, Any]) -> tuple[float, float, Any]:
    """Recover block by block; return the mean error a token before and after, and by block.

    Args:
        job: what to do, with its work folder.
        kept: how far an earlier run has come; empty if it begins.
    """
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
        copy_others(job, inside)
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
            put(job, weights)
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
    best.update(as_stored(job, masters, copy=True))


def _stream(job: Job, streamed: StreamedModel, groups: Sequence[Sequence[int]]) -> Stream:
    """Return a model's stream before its first block, its states in files."""
    folder = job.work.path / ("dense" if streamed is job.pair.dense else "pruned")
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    streamed.fetch_outside()
    streamed.fetch(0)
    stream = Stream(streamed.model, streamed.blocks)
    stream.states = KeptStates(folder, [len(group) for group in groups], streamed.device)
    for number, hidden in enumerate(stream.record(job.calibration.ids, groups)):
        stream.states[number] = hidden
    stream.states.turn()
    streamed.drop_outside()
    return stream
