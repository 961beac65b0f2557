"""Memory and disk that a run needs, known before it starts from headers and counts.

Memory comes from `calmix.memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from calmix.calibration.distance_texts import builtin_readers
from calmix.errors import InputError
from calmix.evaluation.scores import SCORED_BYTES
from calmix.evaluation.suites import Suite
from calmix.evaluation.tasks import suite_size
from calmix.files import size_text
from calmix.machine import host_memory
from calmix.memory import PROGRAM, device_memory, plan_pruning
from calmix.models.empty import EmptyModel
from calmix.models.opening import device_of
from calmix.recovery.training import recovery_memory
from calmix.study.spec import Study
from calmix.study.trials import Condition, Planned, planned_trials


def has_texts(suite: Suite) -> bool:
    """Whether the distance between models is measured on texts for this suite."""
    return any(name in builtin_readers() for name in suite.dimensions)


def trial_memory(model: EmptyModel, trial: Planned, *, compared: bool) -> float:
    """Return a trial's peak memory in bytes on the device that prunes."""
    source: Any = model
    shape = trial.rows, trial.length
    needed = plan_pruning(source, shape, trial.request.chosen, budget=2**62).needed
    scored = model.bytes + 3 * 512 * model.vocabulary * 4  # logits
    if compared and trial.request.embeddings:  # distance needs the dense head
        scored += model.bytes
    if trial.recovery is not None:
        scored = max(scored, recovery_memory(model, trial.recovery, trial.length))
    return max(needed, PROGRAM + scored)


def study_cost(
    study: Study, device: str = "auto", *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return what a study takes on this machine, running one trial at a time.

    The result has the numbers of `trials`, `prunes`, calibration `sets` and `items` per trial, and
    bytes of `memory` and `disk`. `groups` holds the cost per trial of similar trials; `notes` lists
    assumptions and trials that do not fit.
    """
    models = {
        label: EmptyModel(m.name, m.dtype, device, trust_remote_code)
        for label, m in study.file.models.items()
    }
    size, compared = suite_size(study.suite), has_texts(study.suite)
    trials, groups = planned_trials(study), dict[Condition, list[Planned]]()
    for trial in trials:
        groups.setdefault(trial.condition, []).append(trial)
    sets = {
        (trial.model, trial.calibration, trial.rows, trial.length, trial.seed): trial
        for trial in trials
        if trial.rows
    }
    costs: list[dict[str, Any]] = []
    notes: list[str] = []
    if not size.exact:
        notes.append(
            f"the data of suite {study.suite.name} has not been fetched: its number of items is "
            "assumed"
        )
    for members in groups.values():
        first, model = members[0], models[members[0].model]
        memory = trial_memory(model, first, compared=compared)
        checkpoints = study.file.keep_checkpoints * model.disk
        costs.append(
            {
                "model": first.model,
                "method": first.recipe,
                "pattern": first.pattern,
                "rows": first.rows,
                "length": first.length,
                "trials": len(members),
                "memory": memory,
                "disk": SCORED_BYTES / 2 * size.items + checkpoints + 50_000,
            }
        )
        available = device_memory(model.device)[2] or host_memory()[1]
        if memory > available:
            label = f"{first.model} {first.recipe} {first.pattern}"
            notes.append(too_large(label, memory, available))
    disk = max(model.disk for model in models.values())  # while a model is scored
    disk += sum(group["trials"] * group["disk"] for group in costs)
    return {
        "trials": len(trials),
        "prunes": len({trial.pruned for trial in trials}),
        "sets": len(sets),
        "items": size.items,
        "memory": max(group["memory"] for group in costs),
        "disk": disk + sum(8.0 * one.rows * one.length for one in sets.values()),
        "groups": costs,
        "notes": list(dict.fromkeys(notes)),
    }


def too_large(label: str, needed: float, available: float) -> str:
    """Return the message that a trial needs more memory than there is."""
    return (
        f"{label} needs {size_text(needed)} of memory, but there are only "
        f"{size_text(available)}: use fewer or shorter rows"
    )


def largest(study: Study, trials: Sequence[Planned], **how: Any) -> tuple[str, float]:
    """Return label and bytes of the trial that needs most memory; `how` as for `EmptyModel`."""
    files = study.file.models
    empty = cache(lambda label: EmptyModel(files[label].name, files[label].dtype, **how))
    kinds = {trial.condition: trial for trial in trials}.values()
    compared = has_texts(study.suite)
    needed = {
        trial.label: trial_memory(empty(trial.model), trial, compared=compared) for trial in kinds
    }
    return max(needed.items(), key=lambda one: one[1])


def check_trial_memory(study: Study, trials: Sequence[Planned], *, device: str, **how: Any) -> None:
    """Raise an `InputError` for trials that do not fit an accelerator; a CPU would swap."""
    available = device_memory(device_of(device))[2]
    if available is not None and trials:
        label, needed = largest(study, trials, device=device, **how)
        if needed > available:
            raise InputError(too_large(label, needed, available))
