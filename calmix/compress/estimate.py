"""What a compression will take before it runs: time, memory and disk of every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calmix.calibration import ask
from calmix.capability.answers import EACH, TOKENS
from calmix.capability.evaluate import choose
from calmix.capability.texts import LENGTH as TEXT_LENGTH
from calmix.capability.texts import ROWS as TEXT_ROWS
from calmix.capability.texts import builtin_readers
from calmix.compress.plan import EFFORTS, METHOD, Request, Stage
from calmix.models import check_models, resolve_model
from calmix.models.shards import weight_bytes
from calmix.pruning.allocation import SPREAD
from calmix.pruning.budget import parse_memory
from calmix.pruning.checkpoint import planned
from calmix.pruning.methods import get_method
from calmix.recovery.memory import BEHIND, check_memory
from calmix.specs import (
    BATCH,
    NONE,
    RECOVERIES,
    PruneRequest,
    RecoverRequest,
    target_name,
)
from calmix.study import cost
from calmix.study.cost import Machine, Sizes
from calmix.study.planning import sizes_of_model, suite_work
from calmix.study.probe import probe
from calmix.study.spec import Model

PROGRAM = 0.6e9  # bytes of Python, torch and transformers before any weight is read


@dataclass(frozen=True)
class Taken:
    """What a stage will take: seconds, bytes of memory at its peak, bytes left on disk."""

    stage: Stage
    seconds: float
    memory: float
    disk: float


def sizes_of(asked: Request) -> Sizes:
    """Return the model's sizes, from its configuration."""
    return sizes_of_model(asked.model, Model(name=asked.model))


def estimate(asked: Request, listed: list[Stage], sizes: Sizes, machine: Machine) -> list[Taken]:
    """Return what every stage will take on a machine, in order."""
    effort = EFFORTS[asked.effort]
    rows, length = _drawn(asked)
    suite = choose(asked.suite, quick=effort.quick)
    work = suite_work(suite)
    texts = TEXT_ROWS * TEXT_LENGTH * sum(name in builtin_readers() for name in suite.dimensions)
    weights = float(sizes.weights * sizes.value_bytes)
    found = []
    for stage in listed:
        verb, seconds, memory, disk = stage.arguments[0], 0.0, weights, 0.0
        if verb == "calibrate":
            disk = 8.0 * rows * length
            if not asked.generated:
                memory = 0.0
            else:
                made = cost.set_seconds(sizes, rows, length, "self-written", machine)
                seconds = made["generate"]
        elif verb == "prune":
            seconds = sum(cost.prune_seconds(sizes, rows, length, METHOD, None, machine).values())
            seconds += cost.files_seconds(sizes)
            memory, disk = cost.peak_memory(sizes, rows, length, METHOD, machine.device), weights
        elif verb == "recover":
            way = _way(stage)
            epochs = effort.epochs if stage.leaves == "model" else RECOVERIES[way][0]
            seconds = cost.recover_seconds(sizes, rows, length, way, epochs, BATCH, machine)
            seconds += cost.files_seconds(sizes)
            most = None if asked.max_memory is None else parse_memory(asked.max_memory)
            memory, disk = _recover_memory(sizes, length, way, BATCH, most), weights
        elif verb == "evaluate":
            seconds = 2 * cost.suite_seconds(sizes, work, machine)
            seconds += cost.distance_seconds(sizes, texts, machine)
            disk = 160.0 * work.items
        elif verb == "answer":
            written = 2 * TOKENS * EACH * len(suite.dimensions)
            seconds = cost.generation_seconds(sizes, cost.BATCH_ROWS / 8 * written, machine)
        found.append(Taken(stage, seconds, memory + PROGRAM, disk))
    return found


def estimate_prune(
    name: str,
    targets: Mapping[Path, PruneRequest],
    recovery: RecoverRequest | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    max_memory: int | None = None,
) -> list[Taken]:
    """Return what a prune to one or several targets will take here, and recovery behind each.

    Args:
        name, targets, dtype, device, trust_remote_code, max_memory: as for `prune_checkpoints`.
        recovery: of each target.

    Raises:
        CalmixError: as `prune_checkpoints`, as far as it can be known.
    """
    check_models(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    asked = recovery or next((r for r in targets.values() if r.calibration is not None), None)
    rows, length, seconds = 0, 0, 0.0
    found: list[Taken] = []
    drawn = None if asked is None else ask(str(asked.calibration), **asked.draw)
    sizes = sizes_of_model(name, Model(name=name, dtype=dtype))
    machine = probe(sizes, device)
    if drawn is not None:
        rows, length = drawn.draw.rows, drawn.draw.length
        writer = drawn.spec.generate or ""
        seconds = cost.set_seconds(sizes, rows, length, writer, machine).get("generate", 0.0)
    if seconds:
        memory = sizes.weights * sizes.value_bytes + PROGRAM
        found.append(Taken(Stage("write the calibration set", (), None), seconds, memory, 0.0))
    used = rows if any(r.calibration is not None for r in targets.values()) else 0
    needed, checkpoint = planned(
        name, targets, used, length, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code, max_memory=max_memory,
    )  # fmt: skip
    for request in targets.values():
        seconds, way = cost.files_seconds(sizes), target_name(request)
        if request.method != NONE:
            text = get_method(request.method, **request.options).text
            size = rows, length
            seconds += sum(
                cost.prune_seconds(sizes, *size, text, request.propagation, machine).values()
            )
            if request.allocation in SPREAD:
                seconds += cost.allocation_seconds(sizes, *size, request.allocation, machine)
        if request.drop_experts is not None:  # a pass, and every expert's outputs once more
            seconds += 2 * cost.forward_seconds(sizes, rows * length, length, machine)
        found.append(Taken(Stage(f"prune, {way}", (), None), seconds, needed, checkpoint))
        if recovery is not None:
            how = recovery.method, recovery.epochs, recovery.batch
            seconds = cost.recover_seconds(sizes, rows, length, *how, machine)
            seconds += cost.files_seconds(sizes)
            memory = _recover_memory(sizes, length, recovery.method, recovery.batch, max_memory)
            stage = Stage(f"recover by {recovery.method}, {way}", (), None)
            found.append(Taken(stage, seconds, memory + PROGRAM, checkpoint))
    return [replace(found[0], seconds=found[0].seconds + cost.START), *found[1:]]


def check_recoveries(asked: Request, listed: Sequence[Stage]) -> None:
    """Refuse a compression whose recovery cannot stay within `--max-memory`, before its prune.

    Raises:
        InputError: it needs more.
    """
    ways = [_way(stage) for stage in listed if stage.arguments[0] == "recover"]
    if ways and asked.max_memory is not None:
        sizes, most = sizes_of(asked), parse_memory(asked.max_memory)
        for way in ways:
            _recover_memory(sizes, _drawn(asked)[1], way, BATCH, most)


def checkpoint_bytes(asked: Request, listed: Sequence[Stage]) -> int:
    """Return the bytes of weights that stages leave on disk."""
    made = sum(stage.arguments[0] in ("prune", "recover") for stage in listed)
    return made * weight_bytes(resolve_model(asked.model))


def _drawn(asked: Request) -> tuple[int, int]:
    """Return rows and length of the calibration set."""
    if asked.saved:
        held = ask(asked.calibration)
        return held.draw.rows, held.draw.length
    return EFFORTS[asked.effort].rows, asked.length


def _way(stage: Stage) -> str:
    return stage.arguments[stage.arguments.index("--method") + 1]


def _recover_memory(sizes: Sizes, length: int, way: str, batch: int, most: int | None) -> int:
    """Return the bytes a recovery takes beside the program, with what a prune before it leaves;
    refuse more than `most` in all."""
    held = int(PROGRAM + BEHIND)
    room = None if most is None else most - held
    memory = cost.recover_memory(sizes, length, way, batch, room)
    check_memory(memory, held, most, 0)
    return memory + BEHIND
