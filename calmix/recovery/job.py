"""A recovery at work, and what is told of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from calmix.calibration import CalibrationSet
from calmix.errors import CalmixError, InputError
from calmix.machine import device_memory, give_memory_back
from calmix.manifest import asked_record, deciding_versions
from calmix.models import open_model
from calmix.models.opening import device_of
from calmix.precision import fast_half_precision
from calmix.pruning.budget import GIB
from calmix.pruning.old_states import Entry
from calmix.recovery.checks import Pair
from calmix.recovery.memory import Plan, Sizes, check_memory, make_plan
from calmix.recovery.training import Rows, rows_at_once, split_rows
from calmix.recovery.work import RecoveryFolder
from calmix.specs import RecoverRequest

ROOM = 0.8  # of the free memory, for the activations of all blocks at once

Way = Callable[["Job", dict[str, Any]], tuple[float, float, Any]]  # loss before, after; the curve


@dataclass
class RecoveryReport:
    """What a recovery did.

    Attributes:
        method: `distill` or `blocks`.
        rows_at_once: rows that ran at a time in a process.
        rows, held_out: rows of the set, and the numbers of those that decided when to stop.
        before, after: loss of the held-out rows: mean KL a token in nats (distill), or the mean
            relative error a token, over blocks (blocks).
        weights, zeros: of the linear maps, and how many of them are and stay zero.
        curve: the losses on the way, in the terms of `Progress` or a `BlockReport` a block.
        seconds: by activity.
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

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)


class Job:
    """A recovery at work: what is asked for, what it has, and the processes that share it."""

    pair: Pair
    calibration: CalibrationSet
    rows: Rows
    plan: Plan

    def __init__(
        self,
        request: RecoverRequest,
        output: Path,
        how: dict[str, Any],
        dtype: str,
        device: str,
        max_memory: int | None,
        progress: Callable[[int, int, str], None],
        say: Callable[[str], None],
    ) -> None:
        self.request, self.output, self.how = request, output, how
        self.max_memory, self.progress = max_memory, progress
        self.accelerator: Any = None
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if launched and request.method == "blocks":
            raise InputError("recovery by blocks runs in one process: start it without a launcher")
        if launched and device not in ("auto", "cpu"):
            raise InputError(
                "--device has no effect under a launcher, which gives each process its"
            )
        self.device = device_of(device)
        if request.method == "distill":
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
            if launched:
                self.device = self.accelerator.device
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            if plugin is not None and plugin.fsdp_version != 2:
                raise InputError("only version 2 of FSDP can be used: set fsdp_version to 2")
        self.processes = self.accelerator.num_processes if self.accelerator else 1
        if request.batch % self.processes:
            raise InputError(
                f"--batch {request.batch} cannot be shared by {self.processes} processes"
            )
        self.dtype = _compute_type(dtype, self.device)
        self.main = self.accelerator is None or self.accelerator.is_main_process
        self.say = say if self.main else (lambda line: None)
        self.work = RecoveryFolder(output, "steps" if request.method == "distill" else "blocks")
        self.goes_on = False
        self.seconds: dict[str, float] = {}
        self.dense: dict[str, Entry] = {}

    @property
    def type_name(self) -> str:
        """What it computes in, by the name a user gives it."""
        return str(self.dtype).removeprefix("torch.")

    def whole(self, name: str) -> Any:
        """Open a model whole, in what this computes in."""
        return open_model(name, dtype=self.type_name, device=str(self.device), **self.how).model

    def asked(self, pruned: str, against: str) -> dict[str, Any]:
        """Return what decides the bytes of the result, as far as it is known before the draw.

        Args:
            pruned, against: hashes of both models' files.
        """
        return {
            "pruned": pruned,
            "against": against,
            "dtype": self.type_name,
            "device": self.device.type,
            "processes": self.processes,
            **asked_record(self.request),
            "versions": deciding_versions("accelerate"),
        }

    def together(self, act: Callable[[], Any]) -> Any:
        """Let the main process act, and return what came of it, or raise it, in all."""
        if self.processes == 1:
            return act()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = act()
            except CalmixError as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def gathered(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what all processes have under their keys."""
        if self.processes == 1:
            return own
        from accelerate.utils import gather_object

        return {key: value for part in gather_object([own]) for key, value in part.items()}

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.processes > 1:
            self.accelerator.wait_for_everyone()

    def take(self, calibration: CalibrationSet) -> None:
        """Take the calibration set, and hold rows out of it."""
        self.calibration = calibration
        seed = calibration.manifest.get("seed")
        self.seed = seed if isinstance(seed, int) else 0
        self.rows = split_rows(calibration.sources, self.request.batch, self.seed)

    def check_memory(self, sizes: Sizes, length: int, more: int = 0) -> None:
        """Tell what memory is needed, and decide what to spare to stay within it.

        What the process holds is rounded up to a quarter of a GiB, so that the same budget gives
        the same plan.

        Args:
            sizes: from `sizes_of`.
            length: of a row.
            more: bytes the process will hold beside what it holds now.

        Raises:
            InputError: more is needed than the user allows.
        """
        give_memory_back()
        held, free, _ = device_memory(self.device)
        held += more
        rows = rows_at_once(self.request.batch // self.processes, length)
        room = int(ROOM * free) // self.processes
        if self.max_memory is None:
            rows = rows[:1]
        else:
            held = -(-held // (GIB // 4)) * (GIB // 4)
            room = self.max_memory - held
        if self.goes_on and (begun := self.work.progress().get("rows_at_once")):
            rows = [begun]
        self.plan = make_plan(self.request.method, sizes, length, rows, room)
        self.say("recovery " + check_memory(self.plan.needed, held, self.max_memory, free))

    def count(self, progress: Mapping[str, Any]) -> None:
        """Write how far the work is."""
        seconds = {"rows_at_once": self.plan.rows, "seconds": self.clock()}
        self.work.count({**progress, **seconds})

    def run(self, way: Way) -> RecoveryReport:
        """Do the work, from where an earlier run has left it."""
        began = time.perf_counter()
        kept = self.work.progress() if self.goes_on else {}
        before = kept.get("seconds", {})
        self.seconds = {key: float(value) for key, value in before.items()}
        self._began = began - self.seconds.get("total", 0.0)
        first, last, curve = way(self, kept)
        self.clock()
        request = self.request
        return RecoveryReport(
            request.method, request.epochs, request.lr, request.batch, self.plan.rows, self.seed,
            self.calibration.rows, self.calibration.length, self.rows.held_out.tolist(),
            first, last, self.pair.weights, self.pair.zeros, curve, dict(self.seconds),
        )  # fmt: skip

    def clock(self) -> dict[str, float]:
        """Return the seconds so far."""
        self.seconds["total"] = time.perf_counter() - self._began
        return dict(self.seconds)


def _compute_type(name: str, device: torch.device) -> torch.dtype:
    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name == "auto":
        fast = device.type != "cpu" or fast_half_precision(torch.bfloat16)
        return torch.bfloat16 if fast else torch.float32
    if name not in types:
        raise InputError(f"--dtype {name} cannot train: use bfloat16 or float32")
    return types[name]
