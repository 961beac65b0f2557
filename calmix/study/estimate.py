"""Memory and disk that a run needs, known before it starts from headers and counts.

A model is built from its configuration only, without weights. Memory comes from `calmix.memory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from calmix import assets
from calmix.calibration.distance_texts import builtin_readers
from calmix.errors import InputError
from calmix.evaluation.suites import ARCHIVE, Suite
from calmix.evaluation.tasks import load_items
from calmix.files import size_text
from calmix.machine import host_memory
from calmix.memory import device_memory, plan_pruning, plan_recovery
from calmix.models.blocks import find_blocks, outer_layers
from calmix.models.hub import known_model
from calmix.models.loading import loading
from calmix.models.opening import DTYPES, device_of, resolve_model
from calmix.options import Recovering
from calmix.precision import narrower, suited
from calmix.recovery.training import rows_at_once, trained_weights
from calmix.study.spec import Study
from calmix.study.trials import Condition, Planned, plan

PROGRAM = 0.6e9  # bytes of Python, torch and transformers without any weights
ITEMS = 1000  # assumed items of a task whose data is not here
SCORED_BYTES = 160.0  # bytes of a scored item on disk, of the dense and the smaller model


class EmptyModel:
    """A model built from its configuration only, without weights, and the memory of work on it.

    Arguments are those of `open_model`; for a hub model only config.json is fetched.
    """

    merges = False  # `calmix.memory` reads this and the public attributes

    def __init__(
        self, name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = device_of(device)
        path = name if known_model(name) is None else resolve_model(name)
        trust = {"trust_remote_code": trust_remote_code}
        with loading(f"cannot read the configuration of {name}"):
            config = AutoConfig.from_pretrained(path, **trust)
            stored = getattr(config, "dtype", None) or torch.float32
            chosen = DTYPES.get(dtype, stored)
            self.dtype = suited(chosen, self.device) if dtype == "auto" else chosen
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, **trust)
            model.tie_weights()
        self.model: Any = model.requires_grad_(False).eval()
        self.blocks = find_blocks(self.model)
        self.weights = sum(p.numel() for p in self.model.parameters())
        self.block_weights = sum(p.numel() for p in self.blocks.blocks.parameters())
        self.vocabulary, self.hidden = self.model.get_output_embeddings().weight.shape
        self.bytes = self.weights * self.dtype.itemsize
        self.disk = self.weights * narrower(stored, self.dtype).itemsize  # of a checkpoint

    @property
    def outer_weights(self) -> int:
        """Number of weights in embeddings and output head."""
        return sum(weight.numel() for weight in outer_layers(self.model).values())

    def outside_bytes(self, *, head: bool = False) -> int:
        """Return the bytes outside the blocks; an untied output head counts only if `head`."""
        tied = len(outer_layers(self.model)) == 1
        untied = 0 if head or tied else self.vocabulary * self.hidden
        return (self.weights - self.block_weights - untied) * self.dtype.itemsize

    def recovery_memory(self, request: Recovering, length: int, room: float = math.inf) -> int:
        """Return the bytes that recovery needs besides the program; less if `room` is limited."""
        source: Any = self
        rows = rows_at_once(request.batch, length)
        trained = trained_weights(self.model, request.method)
        return plan_recovery(source, length, rows, room, trained)[-1]

    def trial_memory(self, trial: Planned, *, compared: bool) -> float:
        """Return a trial's peak memory in bytes on the device that prunes."""
        source: Any = self
        shape = trial.rows, trial.length
        needed = plan_pruning(source, shape, trial.request.chosen, budget=2**62).needed
        blocks = 2 * max(self.blocks.sizes)  # already counted in `self.bytes`
        scored = 3 * 512 * self.vocabulary * 4  # logits
        if compared and trial.request.embeddings:  # distance needs the dense head
            scored += self.bytes
        peak = max(needed - blocks, PROGRAM + scored)
        if trial.recovery is not None:
            recovered = self.recovery_memory(trial.recovery, trial.length)
            peak = max(peak, PROGRAM + max(recovered, self.bytes + scored))  # two models are open
        return self.bytes + peak


class SuiteSize(NamedTuple):
    """The items of a suite; `exact` if its data is available."""

    items: int
    exact: bool


def suite_size(suite: Suite) -> SuiteSize:
    """Return the number of items of a suite, from its data if available, else assumed."""
    items, exact, present = 0, True, assets.get_asset(ARCHIVE).state == "ok"
    for spec in suite.tasks.values():
        known = present or spec.file is not None
        items += len(load_items(spec)) if known else min(ITEMS, spec.limit or ITEMS)
        exact = exact and known
    return SuiteSize(items, exact)


def has_texts(suite: Suite) -> bool:
    """Whether the distance between models is measured on texts for this suite."""
    return any(name in builtin_readers() for name in suite.dimensions)


def estimate(
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
    trials, groups = plan(study), dict[Condition, list[Planned]]()
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
        memory = model.trial_memory(first, compared=compared)
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
    disk = sum(group["trials"] * group["disk"] for group in costs)
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
        trial.label: empty(trial.model).trial_memory(trial, compared=compared) for trial in kinds
    }
    return max(needed.items(), key=lambda one: one[1])


def check_memory(study: Study, trials: Sequence[Planned], *, device: str, **how: Any) -> None:
    """Raise an `InputError` for trials that do not fit an accelerator; a CPU would swap."""
    available = device_memory(device_of(device))[2]
    if available is not None and trials:
        label, needed = largest(study, trials, device=device, **how)
        if needed > available:
            raise InputError(too_large(label, needed, available))
