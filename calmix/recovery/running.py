"""A recovery while it runs: its two models, rows, memory and work folder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import InputError
from calmix.evaluation.likelihood import close
from calmix.files import check_free
from calmix.machine import give_memory_back
from calmix.manifest import MANIFEST, lineage, read_if_there
from calmix.memory import budgeted, check_memory, device_memory, plan_recovery, token_bytes
from calmix.models.opening import device_of
from calmix.models.streaming import StreamedModel
from calmix.options import Recovering
from calmix.precision import dtype_name, suited
from calmix.pruning.expert_pruning import experts_of
from calmix.pruning.requests import How
from calmix.pruning.solvers.grids import read_blocks, read_grids
from calmix.pruning.work import CHECKPOINT, WorkFolder
from calmix.recovery.training import Masters, rows_at_once, split_rows, trained_weights

DENSE_ZEROS = 0.01  # share of zeros below which a model counts as dense
UNRELATED = 0.9  # relative distance of embeddings beyond which models are unrelated
COMPARED_ROWS = 4096  # rows of the embeddings that are compared


class RecoveryRun:
    """A running recovery.

    Attributes:
        pruned, dense: the models, their blocks on disk.
        masked: names of parameters of the linear maps whose zeros stay (one may hold all experts);
            `weights` and `zeros` count those of the linear maps.
        grids: of the quantised linear maps, by name.
        encoded: GGML's blocks of the linear maps, by name; recovery by block leaves them alone.
        fixed: names of those whose grid is not stored (experts in one tensor, or a matrix stored
            transposed); they are not trained.
        calibration: the set; `training` and `held_out` are indices of its rows.
        rows, sparing: the memory plan, from `plan_recovery`.
    """

    def __init__(self, request: Recovering, output: Path, run: How) -> None:
        self.request, self.output, self.run = request, output, run
        self.device = device_of(run.device)
        dtype = run.dtype
        if dtype == "auto":
            dtype = dtype_name(suited(torch.bfloat16, self.device))
        if dtype not in ("bfloat16", "float32"):
            raise InputError(f"--dtype {dtype} cannot train: use bfloat16 or float32")
        self.opening = run.opening | {"dtype": dtype, "device": str(self.device)}
        self.work = WorkFolder(output, "steps" if request.method == "distill" else "blocks")

    def take(self, pruned: StreamedModel, dense: StreamedModel) -> None:
        """Set both models, or refuse the pair; the pruned one may lack experts."""
        self.pruned, self.dense = pruned, dense
        line = f"{pruned.name} was not pruned from {dense.name}"
        shapes, others = (
            {n: tuple(p.shape) for n, p in one.model.named_parameters()} for one in (pruned, dense)
        )
        experts, count = (experts_of(one.model.config) for one in (pruned, dense))
        for name in dict.fromkeys([*shapes, *others]):
            here, there = shapes.get(name), others.get(name)
            # ERNIE's bias has groups first.
            cut = there and ((experts, *there[1:]), (*there[:1], experts, *there[2:]))
            fewer = experts < count and (here is None or (cut and here in cut))
            if here != there and not fewer:
                raise InputError(
                    f"{line}: {name} is {here or 'none'} here, {there or 'none'} in the dense model"
                )
        embedded = pruned.model.get_input_embeddings().weight
        named = next(n for n, p in pruned.model.named_parameters() if p is embedded)
        ours, theirs = (one.stored(named)[:COMPARED_ROWS].float() for one in (pruned, dense))
        if not close(ours, theirs, UNRELATED):
            raise InputError(f"{line}: their embeddings are of different models")
        layers, models = pruned.blocks.layers, lineage(read_if_there(pruned.folder / MANIFEST))
        done: Mapping[str, Any] = next((one["pruning"] for one in models if "pruning" in one), {})
        names = {layer.parameter_name for layer in layers}
        grids = read_grids(pruned.folder, shapes)
        self.grids = {name: grid for name, grid in grids.items() if name in names}
        rounded = {one["name"] for one in done.get("layers", []) if one.get("bits") is not None}
        on_grid = {layer.parameter_name for layer in layers if layer.name in rounded}
        encoded = read_blocks(pruned.folder, shapes)
        trains = self.request.method == "distill"
        self.encoded = {name: one for name, one in encoded.items() if trains and name in on_grid}
        self.fixed = on_grid - self.grids.keys() - self.encoded.keys()
        # Zero is a level, not a mask, unless a sparse method has quantised what it kept.
        rated = done.get("options", {}).get("bits") == 0
        self.masked = names - self.grids.keys() if rated else names
        self.weights = sum(math.prod(shapes[name]) for name in names)
        self.zeros = sum(int((pruned.stored(name) == 0).sum()) for name in self.masked)
        self.quantised = sum(math.prod(shapes[name]) for name in self.grids.keys() | on_grid)
        if self.zeros < DENSE_ZEROS * self.weights and experts == count and not self.quantised:
            raise InputError(
                f"{pruned.name} is not sparse ({self.zeros / self.weights:.2%} of its linear maps' "
                "weights are zero): prune it first"
            )

    def begin(self, calibration: CalibrationSet) -> None:
        """Set the calibration set, hold rows out, plan the memory, and resume the clock."""
        self.calibration = calibration
        seed = calibration.manifest.get("seed")
        self.seed = seed if isinstance(seed, int) else 0
        sources, batch = calibration.sources, self.request.batch
        self.training, self.held_out = split_rows(sources, batch, self.seed)
        self.began = time.perf_counter() - self.work.state.get("seconds", 0.0)  # of earlier runs
        give_memory_back()
        limit, rows = self.run.max_memory, rows_at_once(self.request.batch, calibration.length)
        resident, most = budgeted(self.device, limit)
        if limit is None and self.device.type == "cpu":  # results do not depend on the free memory
            rows = rows[:1]
        if begun := self.work.state.get("rows_at_once"):
            rows = [begun]
        trained = trained_weights(self.pruned.model, self.request.method)
        self.rows, self.sparing, needed = plan_recovery(
            self.pruned, calibration.length, rows, most - resident, trained
        )
        free = device_memory(self.device)[1]
        self.run.note("recovery " + check_memory(needed, resident, limit, free))

    def check_room(self, tokens: int) -> None:
        """Refuse a recovery if the disk has no room for the files of this many tokens."""
        source = self.pruned
        needed = sum(place.size for place in source.places.values())
        width = source.model.get_output_embeddings().weight.shape[1]
        states = tokens * width * source.dtype.itemsize
        if trained := trained_weights(source.model, self.request.method):
            needed += states + 2 * (12 + 4) * trained
        else:
            needed += 2 * tokens * token_bytes(source.model, source.blocks)
        check_free(self.output, needed - self.work.bytes, "checkpoint and states take up to")

    def keep(self, done: int, **facts: Any) -> None:
        """Record the progress, unless a model has changed."""
        self.pruned.files.check()
        self.dense.files.check()
        seconds = time.perf_counter() - self.began
        self.work.keep(done=done, rows_at_once=self.rows, seconds=seconds, **facts)

    def masters(self, parameters: Mapping[str, torch.nn.Parameter]) -> Masters:
        """Return masters for parameters of the pruned model."""
        pruned, dense = self.pruned.stored, self.dense.stored
        return Masters(parameters, pruned, self.masked, self.grids, dense, self.encoded)

    def write(self, file: str, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a file of the result, trained tensors (by stored name) replacing pruned ones, and
        return it."""
        tensors = {name: self.pruned.read(name) for name in self.pruned.layout[file]}
        for name in tensors.keys() & trained:
            tensors[name] = trained[name].to(tensors[name].dtype)
        self.work.save(f"{CHECKPOINT}/{file}", tensors)
        return tensors
