"""What a compression or a prune will take before it runs: time, memory and disk by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calmix.calibration import ask
from calmix.compression.plan import (
    CALIBRATION,
    EFFORTS,
    PACK,
    SCORES,
    Request,
    Stage,
    aim,
    scored,
    stages,
    timed,
)
from calmix.evaluation.generations import TOKENS
from calmix.files import check_free
from calmix.models import check_models, resolve_model
from calmix.models.shards import weight_bytes
from calmix.options import Recovering
from calmix.pruning.checkpoint import planned
from calmix.recovery.memory import BEHIND, check_memory
from calmix.specs import NONE, PruneRequest, prune_request, recover_request
from calmix.study.estimate import (
    PROGRAM,
    START,
    SuiteWork,
    Timed,
    suite_work,
    text_tokens,
)

ASKED = 16  # answers written at once take as long as so many of a full batch

RIGHT = 0.4  # of the answers asked for, what the builtin dense models get right at most
ZIPPED, SMALLER = 0.2e9, 0.45  # bytes a second that are packed, and what is left of them


@dataclass(frozen=True)
class Taken:
    """What a stage will take: seconds, bytes of memory at its peak, bytes left on disk."""

    stage: Stage
    seconds: float
    memory: float
    disk: float


def estimate(asked: Request, listed: Sequence[Stage]) -> list[Taken]:
    """Return what every stage of a compression will take here, in order."""
    model = timed(asked.model, asked.device, asked.trust_remote_code)
    rows, length = _drawn(asked)
    request = prune_request(**aim(asked), calibration=asked.calibration)
    suites, found = scored(asked), []
    for stage in listed:
        seconds, memory, disk = 0.0, PROGRAM + model.bytes, 0.0
        leaves = Path(stage.leaves or "").name.removeprefix("dense-")
        if leaves == CALIBRATION:
            disk = 8.0 * rows * length
            memory = memory if asked.generated else PROGRAM
            seconds = model.calibration(ask(asked.calibration, rows=rows, length=length), False)
        elif stage.arguments[0] == "prune":
            seconds = _pruning(model, request, rows, length)
            memory, disk = planned(
                asked.model, {Path("pruned"): request}, rows, length, device=asked.device,
                trust_remote_code=asked.trust_remote_code, max_memory=asked.most,
            )  # fmt: skip
        elif stage.arguments[0] == "recover":
            recovery, disk = _recovery(asked, stage), model.bytes
            seconds = model.files + model.recovery(recovery, rows, length)
            memory = _recovery_memory(model, recovery, length, asked.most)
        elif leaves == PACK:
            seconds, memory, disk = model.bytes / ZIPPED, PROGRAM, SMALLER * model.bytes
        elif leaves in suites:
            work = suite_work(suites[leaves])
            if "--right-only" in stage.arguments:
                work = work._replace(written=int(RIGHT * work.written))
            both = asked.model in stage.arguments[2:]  # the dense model is scored with it
            far = both and leaves == SCORES and "--no-distance" not in stage.arguments
            texts = text_tokens(suites[leaves]) if far else 0
            seconds = (1 + both) * model.evaluation(work) + model.evaluation(SuiteWork(), texts)
            disk = 160.0 * work.items
        elif leaves == "answers.json":
            seconds = model.write(2 * TOKENS * ASKED)
        found.append(Taken(stage, seconds, memory, disk))
    return found


def estimate_prune(
    name: str,
    targets: Mapping[Path, PruneRequest],
    *,
    max_memory: int | None = None,
    **how: Any,
) -> list[Taken]:
    """Return what a prune to one or several targets will take here."""
    check_models(name, **how)
    asked = next((r for r in targets.values() if r.calibration is not None), None)
    model, found, rows, length = Timed(name, **how), list[Taken](), 0, 0
    if asked is not None:
        drawn = ask(asked.calibration or "", **asked.drawn())
        rows, length = drawn.draw.rows, drawn.draw.length
        if seconds := model.calibration(drawn, False):
            stage = Stage("write the calibration set", (), None)
            found.append(Taken(stage, START + seconds, model.bytes + PROGRAM, 0.0))
    needed, checkpoint = planned(name, targets, rows, length, max_memory=max_memory, **how)
    for request in targets.values():
        seconds = _pruning(model, request, rows, length) + (0.0 if found else START)
        stage = Stage(f"prune, {request.name}", (), None)
        found.append(Taken(stage, seconds, needed, checkpoint))
    return found


def check_room(asked: Request, out: Path) -> None:
    """Refuse a compression whose recovery cannot stay within `--max-memory`, or for whose weights
    the disk has no room."""
    left = [stage for stage in stages(asked, out) if not stage.stands(out)]
    recovered = [stage for stage in left if stage.arguments[0] == "recover"]
    if recovered and asked.most is not None:
        model = timed(asked.model, asked.device, asked.trust_remote_code)
        for stage in recovered:
            _recovery_memory(model, _recovery(asked, stage), _drawn(asked)[1], asked.most)
    made: float = len(recovered) + sum(stage.arguments[0] == "prune" for stage in left)
    made += SMALLER * any(stage.leaves == PACK for stage in left)
    check_free(out, int(made * weight_bytes(resolve_model(asked.model))), "the checkpoints take")


def _drawn(asked: Request) -> tuple[int, int]:
    """Return rows and length of the calibration set."""
    if asked.saved:
        held = ask(asked.calibration)
        return held.draw.rows, held.draw.length
    return EFFORTS[asked.effort].rows, asked.length


def _recovery(asked: Request, stage: Stage) -> Recovering:
    method = stage.arguments[stage.arguments.index("--method") + 1]
    epochs = asked.epochs if Path(stage.leaves or "").name == "model" else None
    return recover_request(calibration=asked.calibration, method=method, epochs=epochs)


def _pruning(model: Timed, request: PruneRequest, rows: int, length: int) -> float:
    """Return the seconds of a prune to one target, files and all."""
    seconds = model.files
    if request.method != NONE:
        spread = request.allocation if isinstance(request.allocation, str) else None
        seconds += model.pruning(request.chosen, request.propagation, rows, length, spread)
    if request.drop_experts is not None:  # a pass, and every expert's outputs once more
        seconds += model.forward(2 * rows * length, length)
    return seconds


def _recovery_memory(model: Timed, request: Recovering, length: int, most: int | None) -> float:
    """Return the bytes a recovery takes, with what a prune before it leaves; refuse more than
    `most` in all."""
    held = int(PROGRAM + BEHIND)
    memory = model.recovery_memory(request, length, None if most is None else most - held)
    check_memory(memory, held, most, 0)
    return memory + held
