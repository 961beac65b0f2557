"""What a compression will take before it runs: time, memory and disk of every stage."""

from __future__ import annotations

from dataclasses import dataclass

from calmix.calibration.set import CalibrationSet
from calmix.capability.answers import EACH, TOKENS
from calmix.capability.evaluate import choose
from calmix.capability.texts import LENGTH as TEXT_LENGTH
from calmix.capability.texts import ROWS as TEXT_ROWS
from calmix.capability.texts import builtin_readers
from calmix.compress.plan import EFFORTS, METHOD, Request, Stage
from calmix.files import user_path
from calmix.specs import BATCH, RECOVERIES
from calmix.study import cost
from calmix.study.cost import Machine, Sizes
from calmix.study.planning import sizes_of_model, suite_work
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
    rows, length = effort.rows, asked.length
    if asked.saved:
        held = CalibrationSet.open(user_path(asked.calibration))
        rows, length = held.rows, held.length
    suite = choose(asked.suite, quick=effort.quick)
    work = suite_work(suite)
    texts = TEXT_ROWS * TEXT_LENGTH * sum(name in builtin_readers() for name in suite.dimensions)
    weights = float(sizes.weights * sizes.value_bytes)
    found = []
    for stage in listed:
        verb, seconds, memory, disk = stage.arguments[0], 0.0, weights, 0.0
        if verb in ("calibrate", "generate"):
            disk = 8.0 * rows * length
            if verb == "calibrate":
                memory = 0.0
            else:
                made = cost.set_seconds(sizes, rows, length, "igsp", machine)
                seconds = made["generate"]
        elif verb == "prune":
            seconds = sum(cost.prune_seconds(sizes, rows, length, METHOD, None, machine).values())
            memory, disk = cost.peak_memory(sizes, rows, length, METHOD, machine.device), weights
        elif verb == "recover":
            way = stage.arguments[stage.arguments.index("--method") + 1]
            epochs = effort.epochs if stage.leaves == "model" else RECOVERIES[way][0]
            seconds = cost.recover_seconds(sizes, rows, length, way, epochs, BATCH, machine)
            memory, disk = cost.recover_memory(sizes, length, way, BATCH), weights
        elif verb == "evaluate":
            seconds = 2 * cost.suite_seconds(sizes, work, machine)
            seconds += cost.distance_seconds(sizes, texts, machine)
            disk = 160.0 * work.items
        elif verb == "answer":
            written = 2 * TOKENS * EACH * len(suite.dimensions)
            seconds = cost.generation_seconds(sizes, cost.BATCH_ROWS / 8 * written, machine)
        found.append(Taken(stage, seconds, memory + PROGRAM, disk))
    return found
