"""A recovery at work: what it was asked, what it has, and the processes that share it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.calibration import CalibrationSet
from calmix.errors import InputError
from calmix.evaluation.likelihood import close
from calmix.files import check_free
from calmix.machine import device_memory, give_memory_back
from calmix.manifest import deciding_versions
from calmix.models import open_model
from calmix.models.opening import device_of, fingerprint
from calmix.models.streaming import StreamedModel
from calmix.options import Recovering
from calmix.precision import dtype_name, suited
from calmix.pruning.budget import GIB
from calmix.pruning.checkpoint import MANIFEST, read_told
from calmix.pruning.distributed import processes
from calmix.pruning.expert_pruning import experts_of
from calmix.pruning.patterns import Rate
from calmix.pruning.solvers.grids import Grid, read_grids
from calmix.pruning.work import CHECKPOINT, WorkFolder
from calmix.recovery.memory import Plan, check_memory, make_plan
from calmix.recovery.training import Masters, Rows, rows_at_once, split_rows, trained_names
from calmix.shown import Shown
from calmix.specs import How

ROOM = 0.8  # of the free memory, for the activations of all blocks at once
LEAST = 0.01  # share of zeros below which a model is not sparse
APART = 0.9  # relative distance of embeddings beyond which a model is another one
ROWS = 4096  # of the embeddings that are compared


@dataclass(repr=False)
class RecoveryReport(Shown):
    """What a recovery did.

    `before` and `after` are the loss of the held-out rows (their numbers in `held_out`): mean KL a
    token in nats (distill), or the mean relative error a token, over blocks (blocks). `curve` has
    the losses on the way, as `Progress` or as `tune` returns them of each block. Of the `weights`
    of the linear maps, `zeros` are and stay zero, and `quantised` stay on their grid.
    """

    method: str
    epochs: int
    lr: float
    batch: int
    rows_at_once: int
    seed: int
    rows: int
    length: int
    held_out: list[int]
    before: float
    after: float
    weights: int
    zeros: int
    curve: Any
    seconds: dict[str, float] = field(default_factory=dict)
    quantised: int = 0

    def _line(self) -> str:
        return (f"{self.method}, loss of {len(self.held_out)} held-out rows (lower is better) "
                f"{self.before:.4f} before, {self.after:.4f} after")  # fmt: skip

    def _rows(self) -> list[dict[str, Any]]:
        if self.method == "distill":
            return [{"step": step, "loss": loss} for step, loss in self.curve["held_out"]]
        return [{name: one[name] for name in ("block", "before", "after")} for one in self.curve]


class Job:
    """A recovery at work, in each of the processes that share it.

    Attributes:
        pruned, dense: the models, their blocks on disk.
        masked: names in the pruned model of the linear maps whose zeros stay (one may be that of
            all experts); `weights` and `zeros` are how many they hold.
        grids: of the quantised linear maps, by name.
        fixed: names of those whose grid is not stored (experts in one tensor, or a matrix that lies
            transposed): they stay as they are.
    """

    pruned: StreamedModel
    dense: StreamedModel
    masked: frozenset[str]
    grids: dict[str, Grid]
    fixed: frozenset[str]
    calibration: CalibrationSet
    rows: Rows
    plan: Plan

    def __init__(self, request: Recovering, output: Path, run: How) -> None:
        self.request, self.output, self.run = request, output, run
        self.progress = run.progress
        self.rank, self.processes = processes()
        self.main = self.rank == 0
        if self.processes > 1 and request.method == "blocks":
            raise InputError("recovery by blocks runs in one process: start it without a launcher")
        self.device = device_of(run.device)
        if request.batch % self.processes:
            raise InputError(
                f"--batch {request.batch} cannot be shared by {self.processes} processes"
            )
        self.type_name = run.dtype
        if run.dtype == "auto":
            self.type_name = dtype_name(suited(torch.bfloat16, self.device))
        if self.type_name not in ("bfloat16", "float32"):
            raise InputError(f"--dtype {run.dtype} cannot train: use bfloat16 or float32")
        self.dtype: torch.dtype = getattr(torch, self.type_name)
        self.opening = run.opening | {"dtype": self.type_name, "device": str(self.device)}
        self.say = run.note if self.main else How.note
        self.work = WorkFolder(output, "steps" if request.method == "distill" else "blocks")

    def open(self, name: str) -> Any:
        """Open a model whole, in what this computes in."""
        return open_model(name, **self.opening).model

    def take(self, pruned: StreamedModel, dense: StreamedModel) -> None:
        """Take both models, or refuse the pair; the pruned one may lack experts."""
        self.pruned, self.dense = pruned, dense
        line = f"{pruned.name} was not pruned from {dense.name}"
        own, other = ({n: tuple(p.shape) for n, p in one.model.named_parameters()}
                      for one in (pruned, dense))  # fmt: skip
        kept, count = (experts_of(one.model.config) for one in (pruned, dense))
        for name in dict.fromkeys([*own, *other]):
            here, there = own.get(name), other.get(name)
            fewer = kept < count and (here is None or (there and here == (kept, *there[1:])))
            if here != there and not fewer:
                raise InputError(
                    f"{line}: {name} is {here or 'none'}, and {there or 'none'} in the dense model"
                )
        embedded = pruned.model.get_input_embeddings().weight
        named = next(n for n, p in pruned.model.named_parameters() if p is embedded)
        ours, theirs = (one.stored(named)[:ROWS].float() for one in (pruned, dense))
        if not close(ours, theirs, APART):
            raise InputError(f"{line}: their embeddings are of different models")
        layers = pruned.blocks.layers
        told, known = read_told(pruned.folder / MANIFEST), read_grids(pruned.folder)
        inside = known.keys() & {layer.parameter_name for layer in layers}
        self.grids = {name: known[name] for name in known if name in inside}
        while told.get("pruned"):  # it was recovered before
            told = told["pruned"]
        done = told.get("pruning", {})
        free = self.grids if Rate.parse(str(done.get("pattern"))) else {}  # zero is a level there
        self.masked = frozenset(layer.parameter_name for layer in layers) - free.keys()
        rounded = {one["name"] for one in done.get("layers", []) if one.get("bits") is not None}
        on_grid = {layer.parameter_name for layer in layers if layer.name in rounded}
        self.fixed = frozenset(on_grid - self.grids.keys())
        self.weights = sum(math.prod(own[name]) for name in self.masked | free.keys())
        self.zeros = sum(int((pruned.stored(name) == 0).sum()) for name in self.masked)
        self.quantised = sum(math.prod(own[name]) for name in self.grids.keys() | self.fixed)
        if self.zeros < LEAST * self.weights and kept == count and not self.quantised:
            raise InputError(
                f"{pruned.name} is not sparse ({self.zeros / self.weights:.2%} of its linear maps' "
                "weights are zero): prune it first"
            )

    def asked(self) -> dict[str, Any]:
        """Return what decides the bytes of the result beside the text."""
        return {
            "pruned": fingerprint(self.pruned.folder),
            "against": fingerprint(self.dense.folder),
            "dtype": self.type_name,
            "device": self.device.type,
            "processes": self.processes,
            **self.request.record(),
            "versions": deciding_versions(),
        }

    def begin(self, calibration: CalibrationSet) -> None:
        """Take the calibration set, hold rows out of it, decide what to spare to stay within the
        memory, and start the clock where it was left.

        What the process holds is rounded up to a quarter of a GiB, so that the same budget gives
        the same plan.
        """
        self.calibration = calibration
        seed = calibration.manifest.get("seed")
        self.seed = seed if isinstance(seed, int) else 0
        self.rows = split_rows(calibration.sources, self.request.batch, self.seed)
        self._began = time.perf_counter() - self.work.kept.get("seconds", 0.0)
        give_memory_back()
        held, free, _ = device_memory(self.device)
        rows = rows_at_once(self.request.batch // self.processes, calibration.length)
        if (most := self.run.max_memory) is None:
            rows, room = rows[:1], int(ROOM * free) // self.processes
        else:
            held = -(-held // (GIB // 4)) * (GIB // 4)
            room = most - held
        if begun := self.work.kept.get("rows_at_once"):
            rows = [begun]
        self.plan = make_plan(
            self.pruned, self.request.method, self.dtype, calibration.length, rows, room
        )
        self.say("recovery " + check_memory(self.plan.needed, held, most, free))

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return time.perf_counter() - self._began

    def check_room(self, tokens: int) -> None:
        """Refuse a recovery on so many tokens for whose files the disk has no room."""
        source = self.pruned
        needed = sum(place.size for place in source.shards.places.values())
        width = source.model.get_output_embeddings().weight.shape[1]
        states = tokens * width * self.dtype.itemsize
        if self.request.method == "distill":
            own = dict(source.model.named_parameters())
            trained = sum(own[n].numel() for n in trained_names(source.model, source.blocks))
            needed += states + 2 * (12 + 4) * trained
        else:
            needed += 2 * states
        check_free(self.output, needed - self.work.bytes, "checkpoint and states take up to")

    def keep(self, done: int, **facts: Any) -> None:
        """Make count what is done."""
        self.work.keep(done=done, rows_at_once=self.plan.rows, seconds=self.seconds, **facts)

    def masters(self, parameters: Mapping[str, torch.nn.Parameter]) -> Masters:
        """Return the masters of parameters of the pruned model."""
        source, masked = self.pruned.stored, self.masked.__contains__
        return Masters(parameters, source, masked, self.grids, self.dense.stored)

    def as_stored(self, masters: Masters, *, copy: bool = False) -> dict[str, Tensor]:
        """Return what masters stand for, in the types the pruned model is stored in."""
        return {
            name: masters.rounded(name).to(self.pruned.stored_dtype(name), copy=copy)
            for name in masters.values
        }

    def write(self, file: str, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a file of the result, and return it: what was trained, else the pruned tensors."""
        source = self.pruned
        made = source.shards.read(source.layout[file])
        for name, value in source.as_stored(trained).items():
            if name in made:
                made[name] = value.to(made[name].dtype)
        self.work.save(f"{CHECKPOINT}/{file}", made)
        return made
