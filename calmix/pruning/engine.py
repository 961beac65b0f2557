"""The engine: one forward pass over the blocks prunes a model.

Sequential propagation (the default): every layer is pruned just in time, on inputs that come
from already-pruned layers. Each micro-batch runs a block's own forward in a coroutine that
pauses where a distinct input first reaches a layer. When all micro-batches have paused there,
the input's statistic is complete, the layers that share it are solved together, and the
coroutines go on through the pruned weights. Nothing is computed twice.

Block propagation: the published two-pass semantics. All layers of a block are pruned on the
inputs the block's dense weights give, then the block runs again to make the next one's inputs.

Knows nothing about architectures (see layout.py), files or command lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from calmix.errors import InputError, ModelError, SolverError
from calmix.models.blocks import DecoderBlocks, Prunable, find_blocks
from calmix.pruning.gram import Gram, Squares
from calmix.pruning.layout import BlockCall, Calls, SharedInput, observe
from calmix.pruning.methods import METHODS, Method, Solution
from calmix.pruning.patterns import Pattern, check_columns

Propagation = Literal["sequential", "block"]
MICRO_TOKENS = 2048  # activations of so many tokens stay in a CPU's cache


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer. `error` is the share of its output energy that was lost."""

    name: str
    rows: int
    columns: int
    pruned: int
    sparsity: float
    error: float | None
    damping: float | None
    factor_dtype: str | None
    dead_inputs: int


@dataclass
class PruneReport:
    """What a prune did: a report per layer, totals, and seconds by activity."""

    method: str
    pattern: str
    propagation: str | None
    tokens: int
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of weights in the pruned layers."""
        return sum(layer.rows * layer.columns for layer in self.layers)

    @property
    def pruned(self) -> int:
        """Number of weights set to zero."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of the weights in pruned layers that is zero."""
        return self.pruned / self.weights

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self) | {
            "weights": self.weights,
            "pruned": self.pruned,
            "sparsity": self.sparsity,
        }


def prune(
    model: nn.Module,
    ids: Tensor | None = None,
    *,
    method: str = "sparsegpt",
    pattern: Pattern,
    propagation: Propagation = "sequential",
    damping: float = 0.01,
    micro_tokens: int = MICRO_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> PruneReport:
    """Prune the linear maps in a causal language model's blocks, in place.

    Embeddings, the output head, norms and biases are never touched.

    Args:
        model: decoder-only causal language model of transformers.
        ids: calibration token ids, int64 (rows, length), full rows without padding; None for a
            method that needs none.
        method: a name in `METHODS`.
        pattern: `Unstructured` or `SemiStructured`.
        propagation: `sequential` (inputs from already-pruned layers) or `block` (the papers').
        damping: SparseGPT's, as a share of the mean diagonal of the Gram matrix.
        micro_tokens: tokens that run through a block at a time.
        progress: called with (blocks done, blocks) after every block.

    Raises:
        ModelError: the architecture cannot be pruned.
        InputError: ids are missing or of the wrong shape, or the pattern does not fit.
        SolverError: a layer's inputs are unusable.
    """
    chosen = METHODS[method]
    found = find_blocks(model)
    for index in range(len(found)):
        for layer in found.prunables(index):
            check_columns(pattern, layer.shape[1])
    began = time.perf_counter()
    with torch.inference_mode():
        if chosen.statistic == "none":
            report = PruneReport(method, str(pattern), None, 0)
            for index in range(len(found)):
                for layer in found.prunables(index):
                    _apply([layer], chosen.solve([layer.matrix()], pattern), report)
                if progress is not None:
                    progress(index + 1, len(found))
        else:
            if ids is None or ids.ndim != 2 or not ids.numel():
                raise InputError(f"{method} needs calibration ids of shape (rows, length)")
            report = PruneReport(method, str(pattern), propagation, ids.numel())
            run = _Run(model, found, chosen, pattern, damping, report)
            run.all_blocks(ids, propagation, max(1, micro_tokens // ids.shape[1]), progress)
    report.seconds["total"] = time.perf_counter() - began
    return report


class _Run:
    """One prune with calibration data: what its steps share."""

    def __init__(
        self,
        model: nn.Module,
        found: DecoderBlocks,
        method: Method,
        pattern: Pattern,
        damping: float,
        report: PruneReport,
    ) -> None:
        self.model = model
        self.found = found
        self.method = method
        self.pattern = pattern
        self.damping = damping
        self.report = report
        self.device = next(model.parameters()).device

    def all_blocks(
        self,
        ids: Tensor,
        propagation: Propagation,
        rows: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        began = time.perf_counter()
        # The layout is observed outside inference mode, where tensors count their versions.
        with torch.inference_mode(False):
            layout = observe(self.model, self.found, ids[:1, :8].clone().to(self.device))
        calls = Calls(self.model, self.found, layout)
        recorded = [calls.record(batch.to(self.device)) for batch in ids.split(rows)]
        hidden = [first for first, _ in recorded]
        self.report.seconds |= {"prepare": time.perf_counter() - began, "statistics": 0.0}
        self.report.seconds["solve"] = 0.0
        step = self._sequential if propagation == "sequential" else self._two_pass
        for index, block in enumerate(self.found.blocks):
            last = index + 1 == len(self.found)
            step(block, layout.inputs[index], [c[index] for _, c in recorded], hidden, last)
            if progress is not None:
                progress(index + 1, len(self.found))
        spent = sum(self.report.seconds.values())
        self.report.seconds["forward"] = time.perf_counter() - began - spent

    def _sequential(
        self,
        block: nn.Module,
        inputs: list[SharedInput],
        calls: list[BlockCall],
        hidden: list[Tensor],
        last: bool,
    ) -> None:
        """Prune one block in one pass; replace `hidden` by its outputs unless it is the last."""
        statistic = self._statistic(inputs[0])

        def pause(shared: SharedInput) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self._add(statistic, args[0])
                getcurrent().parent.switch(shared)

            return hook

        handles = [
            shared.layers[0].module.register_forward_pre_hook(pause(shared)) for shared in inputs
        ]
        tasks = [greenlet(call.run) for call in calls]
        try:
            for number, shared in enumerate(inputs):
                if number:
                    statistic = self._statistic(shared)
                for task, states in zip(tasks, hidden, strict=True):
                    # A task that has ended, or stands elsewhere, took a path of its own.
                    reached = None if task.dead else task.switch(*_start(task, block, states))
                    if reached is not shared:
                        raise ModelError(
                            f"{shared.layers[0].name} is not reached by every micro-batch: the "
                            "engine cannot prune layers that only some tokens pass through"
                        )
                self._solve(shared, statistic)
            if not last:
                for number, task in enumerate(tasks):
                    hidden[number] = task.switch()
        finally:
            for handle in handles:
                handle.remove()
            for task in tasks:
                if task and not task.dead:
                    task.throw()

    def _two_pass(
        self,
        block: nn.Module,
        inputs: list[SharedInput],
        calls: list[BlockCall],
        hidden: list[Tensor],
        last: bool,
    ) -> None:
        """Prune one block on its dense inputs, then run it again for the next one's inputs."""
        statistics = [self._statistic(shared) for shared in inputs]

        def collect(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self._add(statistics[number], args[0])

            return hook

        handles = [
            shared.layers[0].module.register_forward_pre_hook(collect(number))
            for number, shared in enumerate(inputs)
        ]
        try:
            for call, states in zip(calls, hidden, strict=True):
                call.run(block, states)
        finally:
            for handle in handles:
                handle.remove()
        for shared, statistic in zip(inputs, statistics, strict=True):
            self._solve(shared, statistic)
        if not last:
            for number, call in enumerate(calls):
                hidden[number] = call.run(block, hidden[number])

    def _statistic(self, shared: SharedInput) -> Gram | Squares:
        columns = shared.layers[0].shape[1]
        kind = Gram if self.method.statistic == "gram" else Squares
        return kind(columns, self.device)

    def _add(self, statistic: Gram | Squares, inputs: Tensor) -> None:
        began = time.perf_counter()
        statistic.add(inputs)
        self.report.seconds["statistics"] += time.perf_counter() - began

    def _solve(self, shared: SharedInput, statistic: Gram | Squares) -> None:
        began = time.perf_counter()
        weights = [layer.matrix() for layer in shared.layers]
        options = {"damping": self.damping} if self.method.statistic == "gram" else {}
        try:
            solved = self.method.solve(weights, statistic.matrix(), self.pattern, **options)
        except SolverError as error:
            raise SolverError(f"{shared.layers[0].name}: {error}") from error
        _apply(shared.layers, solved, self.report)
        self.report.seconds["solve"] += time.perf_counter() - began


def _start(task: Any, block: nn.Module, states: Tensor) -> tuple[Any, ...]:
    """Arguments of a coroutine's first switch; a paused one takes none."""
    return () if task else (block, states)


def _apply(layers: list[Prunable], solved: Solution, report: PruneReport) -> None:
    """Write solved weights into their modules and report on each."""
    for layer, weight, pruned, error in zip(
        layers, solved.weights, solved.pruned, solved.errors, strict=True
    ):
        layer.assign(weight)
        report.layers.append(
            LayerReport(
                name=layer.name,
                rows=weight.shape[0],
                columns=weight.shape[1],
                pruned=pruned,
                sparsity=pruned / weight.numel(),
                error=error,
                damping=solved.damping,
                factor_dtype=None if solved.dtype is None else str(solved.dtype).split(".")[-1],
                dead_inputs=solved.dead,
            )
        )
