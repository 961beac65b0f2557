"""Estimate time, memory and disk of a compression or pruning run before it starts, by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix.calibration import ask
from calmix.compression import plan
from calmix.compression.plan import PACK, SCORES, Request, Stage, timed
from calmix.evaluation.generations import TOKENS
from calmix.files import check_free
from calmix.models import check_models, resolve_model
from calmix.models.shards import weight_bytes
from calmix.options import Recovering
from calmix.pruning.allocation import KL
from calmix.pruning.checkpoint import planned
from calmix.recovery.memory import BEHIND, check_memory
from calmix.specs import NONE, PruneRequest, prune_request, recover_request
from calmix.study import estimate as study
from calmix.study.estimate import PROGRAM, Timed

ASKED = 16  # the card's few prompts take as long as this many answers of a full batch
ZIPPED, SMALLER = 0.2e9, 0.45  # bytes packed per second, and packed size over size


@dataclass(frozen=True)
class StageCost:
    """What a stage will take: seconds, bytes of memory at peak, bytes left on disk."""

    stage: Stage
    seconds: float
    memory: float
    disk: float


def estimate(request: Request, listed: Sequence[Stage]) -> list[StageCost]:
    """Return the cost of each stage of a compression on this machine."""
    model = timed(request.model, "auto", request.device, request.trust_remote_code)
    rows, length = _drawn(request)
    pruning = prune_request(**plan.aim(request), calibration=request.calibration)
    suites, found = plan.scored(request), []
    for stage in listed:
        seconds, memory, disk = 0.0, PROGRAM + model.bytes, 0.0
        leaves = Path(stage.leaves or "").name.removeprefix("dense-")
        if leaves == plan.CALIBRATION:
            disk = 8.0 * rows * length
            memory = memory if request.generated else PROGRAM
            seconds = model.calibration(ask(request.calibration, rows=rows, length=length), False)
        elif stage.arguments[0] == "prune":
            seconds = _pruning(model, pruning, rows, length)
            memory, disk = planned(
                request.model, {Path("pruned"): pruning}, rows, length, device=request.device,
                trust_remote_code=request.trust_remote_code, max_memory=request.most,
            )  # fmt: skip
        elif stage.arguments[0] == "recover":
            recovery, disk = _recovery(request, stage), model.bytes
            seconds = model.files + model.recovery(recovery, rows, length)
            memory = _recovery_memory(model, recovery, length, request.most)
        elif leaves == PACK:
            seconds, memory, disk = model.bytes / ZIPPED, PROGRAM, SMALLER * model.bytes
        elif leaves in suites:
            work = study.suite_work(suites[leaves])
            both = request.model in stage.arguments[2:]  # the dense model is scored with it
            far = both and leaves == SCORES and "--no-distance" not in stage.arguments
            seconds = (1 + both + ("--repeat" in stage.arguments)) * model.evaluation(work)
            if far:
                texts = study.text_tokens(suites[leaves])
                seconds += model.evaluation(study.SuiteWork(), texts)
            disk = 160.0 * work.items
        elif leaves == "answers.json":
            seconds = model.write(2 * TOKENS * ASKED)
        found.append(StageCost(stage, seconds, memory, disk))
    return found


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
    model, found, rows, length = Timed(name, **how), list[StageCost](), 0, 0
    if first is not None:
        drawn = ask(first.calibration or "", **first.drawn())
        rows, length = drawn.draw.rows, drawn.draw.length
        if seconds := model.calibration(drawn, False):
            stage = Stage("write the calibration set", (), None)
            found.append(StageCost(stage, study.START + seconds, model.bytes + PROGRAM, 0.0))
    needed, checkpoint = planned(name, targets, rows, length, max_memory=max_memory, **how)
    if any(request.allocation == KL for request in targets.values()):
        needed = max(needed, int(PROGRAM + model.bytes))
    for request in targets.values():
        seconds = _pruning(model, request, rows, length) + (0.0 if found else study.START)
        stage = Stage(f"prune, {request.name}", (), None)
        found.append(StageCost(stage, seconds, needed, checkpoint))
    return found


def check_room(request: Request, out: Path) -> None:
    """Refuse a compression if its recovery exceeds `--max-memory` or its weights the disk."""
    left = [stage for stage in plan.stages(request, out) if not stage.done(out)]
    for stage in left:
        if stage.arguments[0] == "recover" and request.most is not None:
            model = timed(request.model, "auto", request.device, request.trust_remote_code)
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


def _pruning(model: Timed, request: PruneRequest, rows: int, length: int) -> float:
    """Return the seconds of pruning to one target, including files."""
    seconds = model.files
    if request.method != NONE:
        seconds += model.pruning(request, rows, length)
    if request.drop_experts is not None:  # a pass, and all experts' outputs once more
        seconds += model.forward(2 * rows * length, length)
    return seconds


def _recovery_memory(model: Timed, request: Recovering, length: int, most: int | None) -> float:
    """Return the bytes a recovery takes, with what pruning before it leaves; refuse more than
    `most`."""
    held = int(PROGRAM + BEHIND)
    memory = model.recovery_memory(request, length, math.inf if most is None else most - held)
    check_memory(memory, held, most, 0)
    return memory + held
