"""What a study will take before it runs: trials, time, memory and disk, by the cost model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calmix import assets
from calmix.capability.suites import ARCHIVE, WRITTEN, Suite, TaskSpec
from calmix.capability.tasks import load_items, preamble
from calmix.capability.texts import LENGTH, ROWS, builtin_readers
from calmix.errors import InputError
from calmix.files import user_path
from calmix.machine import device_memory
from calmix.models import resolve_model
from calmix.models.streaming import NotStreamableError, StreamedModel
from calmix.pruning.allocation import SPREAD, from_shares
from calmix.pruning.methods import get_method
from calmix.specs import recovery_of
from calmix.study import cost
from calmix.study.cost import Cost, Machine, Sizes, SuiteWork
from calmix.study.spec import Model, Study
from calmix.study.trials import Key, Planned, plan

PROGRAM = 2**29  # bytes a process holds before it opens a model; 375 MiB with all it imports
CHARACTERS = 3.6  # a token, in English text and code


@dataclass(frozen=True)
class Group:
    """Trials that cost the same, and what each of them costs."""

    model: str
    method: str
    pattern: str
    rows: int
    length: int
    trials: int
    cost: Cost


@dataclass(frozen=True)
class Estimate:
    """What a study will take.

    Attributes:
        groups: trials that cost the same together, in the order of the plan.
        sets: number of calibration sets, and seconds to make and measure all of them.
        dense: seconds to score the dense models.
        machine: what it was estimated for.
        notes: what was assumed, and what does not fit.
    """

    groups: list[Group]
    sets: int
    sets_seconds: float
    dense: float
    machine: Machine
    notes: list[str]

    @property
    def trials(self) -> int:
        """Number of trials."""
        return sum(group.trials for group in self.groups)

    @property
    def seconds(self) -> float:
        """Seconds of the whole study, one trial at a time."""
        trials = sum(group.trials * group.cost.total for group in self.groups)
        return trials + self.sets_seconds + self.dense

    @property
    def disk(self) -> float:
        """Bytes the whole study leaves on disk."""
        sets = {(g.model, g.rows, g.length) for g in self.groups if g.rows}
        ids = max((8.0 * rows * length for _, rows, length in sets), default=0.0)
        return sum(group.trials * group.cost.disk for group in self.groups) + self.sets * ids


def estimate(study: Study, sizes: Mapping[str, Sizes], machine: Machine) -> Estimate:
    """Estimate what a study will take on a machine.

    Args:
        study: the study.
        sizes: of every model, by label.
        machine: its rates, from `probe` or `cost.on_paper`.
    """
    work = suite_work(study.suite)
    held = ROWS * LENGTH * sum(name in builtin_readers() for name in study.suite.dimensions)
    groups: dict[tuple[Any, ...], list[Planned]] = {}
    prunes: dict[Key, Planned] = {}  # those that are recovered in other ways too are pruned once
    sets: dict[tuple[Any, ...], Planned] = {}
    for trial in plan(study):
        size = (0, 0) if trial.draw is None else (trial.draw.rows, trial.draw.length)
        key = (trial.model, trial.way, trial.pattern, *size, trial.propagation)
        groups.setdefault(key, []).append(trial)
        prunes.setdefault(trial.pruned, trial)
        if trial.draw is not None:
            sets.setdefault((trial.model, trial.calibration, *size, trial.seed), trial)
    found = []
    for (label, way, pattern, rows, length, propagation), members in groups.items():
        model, like = sizes[label], members[0]
        method = like.method
        pruning = cost.prune_seconds(model, rows, length, method, propagation, machine)
        pruned = sum(prunes[trial.pruned] is trial for trial in members) / len(members)
        seconds = {
            "prune": pruned * sum(pruning.values()),
            "evaluate": cost.suite_seconds(model, work, machine)
            + cost.distance_seconds(model, held, machine),
        }
        if like.allocation in SPREAD:
            seconds["allocation"] = pruned * cost.allocation_seconds(
                model, rows, length, like.allocation, machine
            )
        if like.recovery is not None:
            asked = recovery_of(like.recovery)
            how = asked.method, asked.epochs, asked.batch
            seconds["recover"] = cost.recover_seconds(model, rows, length, *how, machine)
        disk = cost.disk_bytes(model, work, study.file.keep_checkpoints)
        costs = Cost(seconds, trial_memory(model, like, machine.device), disk)
        found.append(Group(label, way, pattern, rows, length, len(members), costs))
    measured = study.file.perplexity
    making = sum(
        sum(cost.set_seconds(sizes[key[0]], key[2], key[3], trial.strategy, machine,
                             measured=measured).values())
        for key, trial in sets.items()
    )  # fmt: skip
    dense = sum(cost.suite_seconds(model, work, machine) for model in sizes.values())
    notes = (
        []
        if work.exact
        else [
            f"the data of suite {study.suite.name} is not at hand: scoring is estimated from "
            "assumed sizes of its tasks"
        ]
    )
    for group in found:
        if group.cost.memory > machine.memory:
            named = f"{group.model} {group.method} {group.pattern}"
            notes.append(too_large(named, group.cost.memory, machine.memory))
    return Estimate(found, len(sets), making, dense, machine, list(dict.fromkeys(notes)))


def too_large(named: str, needed: float, there: float, where: str = "there are") -> str:
    """Say that a trial needs more memory than there is."""
    return (
        f"{named} needs {needed / 1e9:.1f} GB, and {where} {there / 1e9:.1f} GB: fewer or "
        "shorter rows need less"
    )


def trial_memory(sizes: Sizes, trial: Planned, device: str) -> float:
    """Return the bytes a trial holds at its peak on the device that prunes, by formula."""
    rows, length = (0, 0) if trial.draw is None else (trial.draw.rows, trial.draw.length)
    peak = cost.peak_memory(sizes, rows, length, trial.method, device)
    if trial.recovery is None:
        return peak
    asked = recovery_of(trial.recovery)
    recovering = cost.recover_memory(sizes, length, asked.method, asked.batch)
    return max(peak, cost.held_memory(sizes, device) + recovering)


def largest(
    study: Study, trials: Sequence[Planned], memory: Callable[[Sizes, Planned], float]
) -> tuple[Planned | None, float]:
    """Return the trial that takes the most memory, and how much, of those whose model is known."""
    found: tuple[Planned | None, float] = None, 0.0
    for label, model in study.models.items():
        try:
            sizes = sizes_of_model(label, model)
        except InputError:  # it is not here yet, or its configuration is of another kind
            continue
        for trial in (trial for trial in trials if trial.model == label):
            if (needed := memory(sizes, trial)) > found[1]:
                found = trial, needed
    return found


def check_memory(
    study: Study, trials: Sequence[Planned], device: torch.device, share: float = 1
) -> None:
    """Refuse trials that an accelerator cannot hold, by formula. On a CPU they would be swapped.

    Args:
        share: of the accelerator that is a trial's.

    Raises:
        InputError: there is one.
    """
    there = device_memory(device)[2]
    if there is None:
        return
    trial, needed = largest(study, trials, lambda sizes, t: trial_memory(sizes, t, device.type))
    if trial is not None and needed > share * there:
        raise InputError(too_large(trial.label, needed, share * there))


def host_memory(study: Study, trials: Sequence[Planned], device: str) -> tuple[str, float]:
    """Return which trial takes the most of a machine's own memory, and how many bytes, by formula.

    Where an accelerator prunes weights pass through it on their way. None is known: an empty name.

    Args:
        device: `cpu`, or another kind that prunes.
    """
    trial, needed = largest(
        study,
        trials,
        lambda sizes, t: (
            trial_memory(sizes, t, device) if device == "cpu" else sizes.weights * sizes.value_bytes
        ),
    )
    return ("", 0.0) if trial is None else (trial.label, PROGRAM + needed)


def check_allocations(
    study: Study, trials: Sequence[Planned], *, trust_remote_code: bool = False
) -> None:
    """Refuse a file of sparsities by layer that does not fit a model, before any trial is run.

    Raises:
        InputError: it misses a layer, names one that is none, or adds up to another sparsity.
        ModelError: a model cannot be opened.
    """
    asked = dict.fromkeys(
        (trial.model, trial.allocation, trial.sparsity, trial.method)
        for trial in trials
        if trial.allocation in study.allocations
    )
    for label in dict.fromkeys(each[0] for each in asked):
        name = study.models[label].name
        try:
            model = StreamedModel(name, device="cpu", trust_remote_code=trust_remote_code)
        except NotStreamableError:  # read whole, once its trials run
            continue
        model.close()
        for own, file, sparsity, method in asked:
            if own != label or file is None:
                continue
            try:
                from_shares(study.allocations[file], model.blocks, sparsity, get_method(method))
            except InputError as error:
                raise InputError(f"{file} does not fit {label}: {error}") from error


def sizes_of_model(label: str, model: Model) -> Sizes:
    """Return a model's sizes: from the shape in the study file, or from its config.json.

    Raises:
        InputError: neither is there, or the configuration lacks a size.
    """
    if model.shape is not None:
        config: dict[str, Any] = model.shape.model_dump()
    else:
        try:
            config = json.loads(_config(label, model.name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the configuration of {label}: {error}") from error
    width = 4 if "float32" in (model.dtype, config.get("dtype"), config.get("torch_dtype")) else 2
    try:
        return cost.sizes_of(config.get("text_config") or config, value_bytes=width)
    except KeyError as error:
        raise InputError(
            f"the configuration of {label} does not tell its {error.args[0]}: give a 'shape' in "
            "the study file"
        ) from error


def _config(label: str, name: str) -> Path:
    path = user_path(name)
    if name.count("/") == 1 and name[0] not in "./~" and not path.exists():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if not isinstance(found, str):
            raise InputError(
                f"model {label} ({name}) is not here: give its 'shape' in the study file, as in "
                "studies/paper-llama31-8b.yaml, to plan without it"
            )
        return Path(found)
    return resolve_model(name) / "config.json"


def suite_work(suite: Suite) -> SuiteWork:
    """Return what scoring a suite takes, counted where its data is at hand, else assumed."""
    items = tokens = answers = 0
    exact = True
    for spec in suite.tasks.values():
        if spec.archive is not None and assets.get_asset(ARCHIVE).state == "ok":
            count, held, written = _counted(spec)
        else:
            exact = False
            count, held, written = _assumed(spec)
        items, tokens, answers = items + count, tokens + held, answers + written
    return SuiteWork(items, tokens, answers, exact)


def _counted(spec: TaskSpec) -> tuple[int, int, int]:
    found = load_items(spec)
    contexts = list(dict.fromkeys(text for item in found for text in item.contexts))
    shared = preamble(contexts)
    characters = shared + sum(len(text) - shared for text in contexts)
    characters += sum(len(choice) for item in found for choice in item.choices)
    answers = len(found) if spec.metric in WRITTEN else 0
    return len(found), round(characters / CHARACTERS), answers


def _assumed(spec: TaskSpec) -> tuple[int, int, int]:
    name = spec.harness or ""
    count, each, writes = cost.KNOWN_TASKS.get(name, (*cost.UNKNOWN_TASK, False))
    writes = writes or spec.metric in WRITTEN
    count = min(count, spec.limit or count)
    return count, count * each, count if writes else 0
