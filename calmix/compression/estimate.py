"""Memory and disk of a compression or pruning run, and what each stage works on, before it starts.

Time is not predicted: a run that has finished one unit of work shows its own pace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calmix.compression import plan
from calmix.compression.plan import CompressRequest, empty_model
from calmix.compression.run_stages import stages
from calmix.compression.stages import Draw, Export, Pack, Prune, Recover, Score, Stage
from calmix.evaluation.scores import SCORED_BYTES
from calmix.evaluation.tasks import suite_size
from calmix.files import check_free
from calmix.memory import BEHIND, PROGRAM, check_memory
from calmix.models.empty import EmptyModel
from calmix.models.opening import check_models, resolve_model
from calmix.models.shards import MOST_FILE_BYTES, weight_bytes
from calmix.options import BITS_METHOD, NONE, Recovering
from calmix.pruning.allocation import file_weights, planned_bytes
from calmix.pruning.checkpoint import planned
from calmix.pruning.requests import PruneRequest
from calmix.recovery.training import recovery_memory

SMALLER = 0.45  # packed size of a pruned model over its size


@dataclass(frozen=True)
class StageCost:
    """What a stage takes: what it works on, bytes of memory at peak, bytes left on disk.

    `tensors` are the bytes of all tensors in the GGUF file that its result can be exported to.
    """

    stage: str
    work: str
    memory: float
    disk: float
    command: str = ""
    tensors: int | None = None


def stage_costs(request: CompressRequest, listed: Sequence[Stage]) -> list[StageCost]:
    """Return the cost of each stage of a compression on this machine."""
    model = empty_model(request.model, "auto", request.device, request.trust_remote_code)
    rows, length = _drawn(request)
    tokens = f"{rows} rows of {length} tokens"
    costs = []
    for stage in listed:
        work, memory, disk = "", PROGRAM + model.bytes, 0.0
        match stage.request:
            case Draw() as draw:
                work, disk = tokens, 8.0 * rows * length
                memory = memory if draw.written else PROGRAM
            case Prune() as prune:
                work = tokens if rows else ""
                memory, disk = planned(
                    request.model,
                    prune.request,
                    rows,
                    length,
                    **request.how,
                    max_memory=request.most,
                )
            case Recover(request=recovery):
                work, disk = f"{recovery.epochs} x {tokens}", model.disk
                memory = _recovery_memory(model, recovery, length, request.most)
            case Pack():
                memory, disk = PROGRAM, SMALLER * model.disk
                if request.bits and plan.aim(request)["method"] == BITS_METHOD:
                    sizes = plan.pack_sizes(request)
                    disk = sizes(request.bits) if sizes else disk
            case Export(to="vllm"):
                disk = plan.checkpoint_bytes(request, request.bits or 0)
                memory = PROGRAM + min(disk, MOST_FILE_BYTES)
            case Export():
                memory = PROGRAM + 5 * model.weights  # the file is read back
                disk = plan.file_bytes(request)
                tensors = disk - plan.overhead(request.model, request.like)
                work = f"{8 * tensors / file_weights(model.model):.2f} bits per weight"
            case Score() as score:
                size = suite_size(score.scored)
                work = f"{'' if size.exact else 'about '}{size.items} items"
                disk = SCORED_BYTES * size.items
        costs.append(StageCost(stage.name, work, memory, disk, stage.command))
    return costs


def estimate_prune(
    name: str, request: PruneRequest, *, max_memory: int | None = None, **how: Any
) -> list[StageCost]:
    """Return the cost of pruning on this machine."""
    check_models(name, **how)
    model, costs, rows, length = EmptyModel(name, **how), list[StageCost](), 0, 0
    work = ""
    if request.calibration is not None:
        drawn = request.drawing
        rows, length = drawn.draw.rows, drawn.draw.length
        work = f"{rows} rows of {length} tokens"
        if drawn.written:
            memory = model.bytes + PROGRAM
            costs.append(StageCost("write the calibration set", work, memory, 0.0))
    cost = StageCost(
        "prune", work, *planned(name, request, rows, length, max_memory=max_memory, **how)
    )
    if request.method != NONE:
        cost = replace(cost, tensors=planned_bytes(request.target, model.model, model.blocks))
    return [*costs, cost]


def check_room(request: CompressRequest, out: Path) -> None:
    """Refuse a compression if its recovery exceeds `--max-memory` or its weights the disk."""
    left = [stage.request for stage in stages(request, out) if not stage.done]
    for one in left:
        if isinstance(one, Recover) and request.most is not None:
            model = empty_model(request.model, "auto", request.device, request.trust_remote_code)
            _recovery_memory(model, one.request, _drawn(request)[1], request.most)
    copies: float = sum(isinstance(one, (Prune, Recover)) for one in left)
    copies += SMALLER * any(isinstance(one, Pack) for one in left)
    size = weight_bytes(resolve_model(request.model))
    check_free(out, int(copies * size), "the checkpoints take")


def _drawn(request: CompressRequest) -> tuple[int, int]:
    """Return rows and length of the calibration set."""
    if request.imatrix is not None:
        return 0, 0
    if request.saved:
        draw = request.drawing.draw
        return draw.rows, draw.length
    return request.rows, request.length


def _recovery_memory(
    model: EmptyModel, request: Recovering, length: int, most: int | None
) -> float:
    """Return the bytes a recovery takes, with what pruning before it leaves; refuse more than
    `most`."""
    resident = int(PROGRAM + BEHIND)
    room = math.inf if most is None else most - resident
    memory = recovery_memory(model, request, length, room)
    check_memory(memory, resident, most, 0)
    return memory + resident
