"""Memory and disk of a compression or pruning run, and what each stage works on, before it starts.

Time is not predicted: a run that has finished one unit of work shows its own pace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix.calibration import ask
from calmix.compression import plan
from calmix.compression.plan import PACK, Request, Stage, empty_model
from calmix.files import check_free
from calmix.models import check_models, resolve_model
from calmix.models.shards import weight_bytes
from calmix.options import BITS_METHOD, Recovering
from calmix.pruning.checkpoint import planned
from calmix.recovery.memory import BEHIND, check_memory
from calmix.specs import PruneRequest, prune_request, recover_request
from calmix.study.estimate import PROGRAM, SCORED, EmptyModel, suite_size

SMALLER = 0.45  # packed size of a pruned model over its size


@dataclass(frozen=True)
class StageCost:
    """What a stage takes: what it works on, bytes of memory at peak, bytes left on disk."""

    stage: Stage
    work: str
    memory: float
    disk: float


def estimate(request: Request, listed: Sequence[Stage]) -> list[StageCost]:
    """Return the cost of each stage of a compression on this machine."""
    model = empty_model(request.model, "auto", request.device, request.trust_remote_code)
    rows, length = _drawn(request)
    tokens = f"{rows} rows of {length} tokens"
    pruning = prune_request(**plan.aim(request), calibration=request.calibration)
    suites, costs = plan.scored(request), []
    for stage in listed:
        work, memory, disk = "", PROGRAM + model.bytes, 0.0
        leaves = Path(stage.leaves or "").name.removeprefix("dense-")
        if leaves == plan.CALIBRATION:
            work, disk = tokens, 8.0 * rows * length
            memory = memory if request.generated else PROGRAM
        elif stage.arguments[0] == "prune":
            work = tokens
            memory, disk = planned(
                request.model,
                {Path("pruned"): pruning},
                rows,
                length,
                device=request.device,
                trust_remote_code=request.trust_remote_code,
                max_memory=request.most,
            )
        elif stage.arguments[0] == "recover":
            recovery, disk = _recovery(request, stage), model.disk
            work = f"{recovery.epochs} x {tokens}"
            memory = _recovery_memory(model, recovery, length, request.most)
        elif leaves == PACK:
            memory, disk = PROGRAM, SMALLER * model.disk
            if pruning.method == BITS_METHOD and (sizes := plan.pack_sizes(request)):
                disk = sizes(request.bits or 0.0)
        elif leaves in suites:
            size = suite_size(suites[leaves])
            work, disk = f"{'' if size.exact else 'about '}{size.items} items", SCORED * size.items
        costs.append(StageCost(stage, work, memory, disk))
    return costs


def estimate_prune(
    name: str,
    targets: Mapping[Path, PruneRequest],
    *,
    max_memory: int | None = None,
    **how: Any,
) -> list[StageCost]:
    """Return the cost of pruning to one or several targets on this machine."""
    check_models(name, **how)
    first = next((r for r in targets.values() if r.calibration is not None), None)
    model, costs, rows, length = EmptyModel(name, **how), list[StageCost](), 0, 0
    work = ""
    if first is not None:
        drawn = ask(first.calibration or "", **first.drawn())
        rows, length = drawn.draw.rows, drawn.draw.length
        work = f"{rows} rows of {length} tokens"
        if drawn.written:
            stage = Stage("write the calibration set", (), None)
            costs.append(StageCost(stage, work, model.bytes + PROGRAM, 0.0))
    needed, checkpoint = planned(name, targets, rows, length, max_memory=max_memory, **how)
    for request in targets.values():
        stage = Stage(f"prune, {request.name}", (), None)
        costs.append(StageCost(stage, work if request.calibration else "", needed, checkpoint))
    return costs


def check_room(request: Request, out: Path) -> None:
    """Refuse a compression if its recovery exceeds `--max-memory` or its weights the disk."""
    left = [stage for stage in plan.stages(request, out) if not stage.done(out)]
    for stage in left:
        if stage.arguments[0] == "recover" and request.most is not None:
            model = empty_model(request.model, "auto", request.device, request.trust_remote_code)
            _recovery_memory(model, _recovery(request, stage), _drawn(request)[1], request.most)
    copies: float = sum(stage.arguments[0] in ("prune", "recover") for stage in left)
    copies += SMALLER * any(stage.leaves == PACK for stage in left)
    size = weight_bytes(resolve_model(request.model))
    check_free(out, int(copies * size), "the checkpoints take")


def _drawn(request: Request) -> tuple[int, int]:
    """Return rows and length of the calibration set."""
    if request.saved:
        draw = ask(request.calibration).draw
        return draw.rows, draw.length
    return plan.EFFORTS[request.effort].rows, request.length


def _recovery(request: Request, stage: Stage) -> Recovering:
    method = stage.arguments[stage.arguments.index("--method") + 1]
    epochs = request.epochs if Path(stage.leaves or "").name == "model" else None
    return recover_request(calibration=request.calibration, method=method, epochs=epochs)


def _recovery_memory(
    model: EmptyModel, request: Recovering, length: int, most: int | None
) -> float:
    """Return the bytes a recovery takes, with what pruning before it leaves; refuse more than
    `most`."""
    held = int(PROGRAM + BEHIND)
    memory = model.recovery_memory(request, length, math.inf if most is None else most - held)
    check_memory(memory, held, most, 0)
    return memory + held
