"""The engine: one forward pass over the blocks prunes a model.

Sequential propagation (the default): every layer is pruned just in time, on inputs that come
from already-pruned layers. Each micro-batch runs a block's own forward in a coroutine that
pauses where a distinct input first reaches a layer. When all micro-batches have paused there,
the input's statistic is complete, the layers that share it are solved together, and the
coroutines continue through the pruned weights. Nothing is computed twice.

Block propagation: the published two-pass semantics. All layers of a block are pruned on the
inputs the block's dense weights give, then the block runs again to make the next one's inputs.

A paused micro-batch holds a block's activations. Where memory is short only some stay paused, and
the others begin the block anew for every input: the same numbers, in more time.

Knows nothing about architectures (see trace.py), files (see streamed.py) or command lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import (
    CalmixError,
    DeviceMemoryError,
    InputError,
    ModelError,
    SolverError,
    nearest,
)
from calmix.machine import Laps, give_memory_back, out_of_memory, tokens_at_once
from calmix.models.blocks import DecoderBlocks, Prunable, find_blocks
from calmix.models.opening import OpenModel
from calmix.models.opening import check_ids as check_vocabulary
from calmix.options import BITS_METHOD, METHOD
from calmix.precision import bfloat16_products, reproducible
from calmix.pruning import distributed
from calmix.pruning.experts import EXPERT_BYTES, Gathering, Routed, Step, sampled
from calmix.pruning.gram import Gram, Statistic, relative_error
from calmix.pruning.methods import Method, Solution, get_method
from calmix.pruning.patterns import Pattern, as_pattern
from calmix.pruning.report import ExpertsReport, LayerReport, PruneReport
from calmix.pruning.solvers.grids import Grid
from calmix.pruning.trace import TOKENS, BlockCall, Calls, SharedInput, observe_block

Propagation = Literal["sequential", "block"]
Patterns = Pattern | Mapping[str, Pattern]  # one for all layers, or one a layer by its name
Work = Callable[[int, tuple[Any, ...], dict[str, Any]], None]  # on a micro-batch's arguments
T = TypeVar("T")


def prune(
    model: nn.Module | OpenModel,
    ids: Tensor | CalibrationSet | None = None,
    *,
    method: str | Method | None = None,
    pattern: Patterns | str | float | None = None,
    propagation: Propagation = "sequential",
    micro_tokens: int | None = None,
    paused: int | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    sources: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> PruneReport:
    """Prune the linear maps in a causal language model's blocks, in place.

    Embeddings, the output head, norms and biases are never touched.

    Args:
        model: decoder-only causal language model of transformers, or one that `open_model` opened.
        ids: calibration token ids, int64 (rows, length), full rows without padding, or a
            calibration set; None for a method that needs none.
        method: as `calmix.pruning.methods.get_method` takes it: a name, `NAME,option=value` or a
            `Method`; SparseGPT, or ECQ where `bits` stands alone.
        pattern: a sparsity such as 0.5, or `"2:4"` or `"2.8 bits"`, as `as_pattern` takes them; or
            one for every layer, by its name.
        propagation: `sequential` (inputs from already-pruned layers) or `block` (the papers').
        micro_tokens: tokens that run through a block at a time; None for what suits the device.
        paused: micro-batches that may hold a block's activations at a time; None for all.
        only, skip: patterns of layers' names: those to be pruned, and those to be left dense.
        sources: of each calibration row, to report which experts it reaches.
        progress: called with (blocks done, blocks) after every block.
        **options: the method's own, such as `damping=0.1` or `bits=4`.

    Raises:
        ModelError: the architecture cannot be pruned.
        InputError: ids are missing or of the wrong shape, the pattern does not fit, or there is
            no such method or option.
        SolverError: a layer's weights or inputs are unusable.

    An error after the first block leaves the model partly pruned, and names the pruned blocks.
    """
    if isinstance(model, OpenModel):
        model = model.model
    ids = ids.ids if isinstance(ids, CalibrationSet) else ids
    if not isinstance(model, nn.Module):
        name = model if isinstance(model, str) else "NAME"
        raise InputError(
            f"prune needs an open model, not {type(model).__name__}: open it first, with "
            f"calmix.open_model('{name}').model"
        )
    default = BITS_METHOD if pattern is None and options.get("bits") else METHOD
    chosen = get_method(default if method is None else method, **options)
    if isinstance(pattern, Mapping):
        pattern = {name: as_pattern(one) for name, one in pattern.items()}
    else:
        chosen, pattern = chosen.aim(None if pattern is None else as_pattern(pattern))
    found = find_blocks(model).select(only, skip)
    check_pattern(found, pattern, chosen)
    device = next(model.parameters()).device
    first = [] if device.type == "cpu" else [(p, p.view().cpu()) for p in found.prunables(0)]
    count = length = 1
    if chosen.needs is not None:
        count, length = (ids := check_ids(ids, chosen.name)).shape
        embeddings: Any = model.get_input_embeddings  # a method of transformers' models
        check_vocabulary(type(model).__name__, embeddings(), ids)
    run: Run | None = None

    def act(rows: int) -> PruneReport:
        nonlocal run
        run = Run(model, found, chosen, pattern, propagation, paused, sources=sources)
        run_through(run, ids, rows * length, progress)
        return run.report

    def undone() -> bool:
        if run is None or run.done:
            return False
        for layer, weight in first:
            layer.assign(weight)
        return True

    rows = max(1, (micro_tokens or tokens_at_once(device)) // length)
    try:
        return with_room(act, min(rows, count), device, undone)
    except BaseException as error:
        if run is not None and (run.done or run.begun):
            done = f"blocks 0 to {run.done - 1}" if run.done > 1 else "block 0"
            parts = [done] * (run.done > 0) + [f"part of block {run.done}"] * run.begun
            state = f"the model is left with {' and '.join(parts)} pruned, so open it again"
            if isinstance(error, CalmixError):
                error.args = (f"{state}: {error}",)
            else:
                error.add_note(state)
        raise


def with_room(
    act: Callable[[int], T],
    rows: int,
    device: torch.device,
    undone: Callable[[], bool],
    say: Callable[[str], None] = lambda line: None,
) -> T:
    """Return `act(rows)`; where the device has no room, that of half as many rows at a time.

    `undone` puts back what `act` has changed and returns whether it could.
    """
    while True:
        try:
            return act(rows)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if distributed.processes()[1] > 1 or rows < 2 or not undone():
                raise DeviceMemoryError(
                    f"{device} has run out of memory, with {rows} calibration rows at a time: free "
                    "some of it, or draw shorter rows"
                ) from error
        rows //= 2
        give_memory_back()  # here, where nothing of what has failed is kept
        say(f"{device} has run out of memory: starting over with {rows} rows at a time")


def run_through(
    run: Run,
    ids: Tensor | None,
    micro_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Take a run through all blocks of a model that is in memory, its states too."""
    model, found = run.model, run.found
    began = time.perf_counter()
    training = [module for module in model.modules() if module.training]
    model.eval()  # no dropout
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            if run.needs_ids:
                for number, hidden in run.record(check_ids(ids, run.method.name), micro_tokens):
                    run.states[number] = hidden
            for index in range(len(found)):
                run.block(index)
                if progress is not None:
                    progress(index + 1, len(found))
    finally:
        for module in training:
            module.training = True
    run.report.seconds["total"] = time.perf_counter() - began


def check_pattern(found: DecoderBlocks, pattern: Patterns, method: Method) -> None:
    """Refuse patterns that do not fit the layers, or the method."""
    layers = [layer for index in range(len(found)) for layer in found.prunables(index)]
    if isinstance(pattern, Mapping):
        check_names([layer.name for layer in layers], pattern, "pattern")
    for layer in layers:
        method.check(_of_layer(pattern, layer.name), layer.shape[1], layer.name)


def check_names(layers: Sequence[str], named: Mapping[str, Any], what: str) -> None:
    """Refuse a mapping that does not name the layers, all of them and nothing else."""
    for name in named:
        if name not in layers:
            raise InputError(
                f"the {what} names '{name}', which is not a layer: {nearest(name, layers)}"
            )
    missing = [name for name in layers if name not in named]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"the {what} misses the layer {missing[0]}{more}")


def _of_layer(pattern: Patterns, name: str) -> Pattern:
    return pattern[name] if isinstance(pattern, Mapping) else pattern


def check_ids(ids: Tensor | None, method: str) -> Tensor:
    """Return calibration ids, or refuse them."""
    if ids is None or ids.ndim != 2 or not ids.numel():
        raise InputError(f"{method} needs calibration ids of shape (rows, length)")
    return ids


def solve(
    method: Method,
    name: str,
    weights: Sequence[Tensor],
    statistic: Tensor | None,
    patterns: Sequence[Pattern],
) -> Solution:
    """Return what the method's `solve` makes of the layers of one input, with their errors.

    Raises:
        SolverError: as the method's `solve`, with the name.
    """
    try:
        made = method.solve(weights, statistic, patterns)
    except SolverError as error:
        raise SolverError(f"{name}: {error}") from error
    errors: list[float | None] = [None] * len(weights)
    if statistic is not None and method.needs is not None and issubclass(method.needs, Gram):
        pairs = zip(weights, made.weights, strict=True)
        errors = [relative_error(weight, kept, statistic) for weight, kept in pairs]
    return replace(made, errors=errors)


class Run:
    """One pruning run, block by block: the caller decides where weights and hidden states lie.

    Args:
        model: the model; only the block at hand needs its weights (and the first one in
            `record`, with all that is outside the blocks).
        found: its blocks.
        method: with its options.
        pattern, propagation, paused, sources: as for `prune`.
        shared: statistics of the first block's inputs that are the same for other runs, by kind
            and number: taken from here, or left here.
        expert_bytes: bytes that statistics of several experts may take at a time.

    Attributes:
        states: hidden states by number of the micro-batch: those that lead into the block at hand.
        written: what blocks have written into their arguments (keys and values that later ones
            share), of the few tokens that are observed and then of every micro-batch.
        done: blocks that this run has pruned.
        begun: whether layers of the block at hand have been pruned.
        report: what has been done so far.
    """

    def __init__(
        self,
        model: nn.Module,
        found: DecoderBlocks,
        method: Method,
        pattern: Patterns,
        propagation: Propagation,
        paused: int | None = None,
        shared: dict[tuple[type[Statistic], int], Tensor] | None = None,
        *,
        expert_bytes: int = EXPERT_BYTES,
        sources: Sequence[str] = (),
    ) -> None:
        self.model, self.found, self.method, self.pattern = model, found, method, pattern
        self.propagation, self.paused = propagation, paused
        self.expert_bytes, self.sources, self._shared = expert_bytes, sources, shared
        self.states: MutableMapping[int, Tensor] = {}
        self.written: list[list[Any]] = []
        self.done, self.begun = 0, False
        self.report = PruneReport(
            method.name, "by layer" if isinstance(pattern, Mapping) else str(pattern),
            propagation if self.needs_ids else None, 0, method.options,
        )  # fmt: skip
        activities = ("prepare", "statistics", "solve", "forward") if self.needs_ids else ("solve",)
        self.report.seconds = dict.fromkeys(activities, 0.0)
        self._calls: list[list[BlockCall]] = []
        self._rows: list[int] = []
        self._length = 0
        self._counts: dict[str, dict[int, Tensor]] = {}
        self._by_row: dict[str, Tensor] = {}
        self._tiny: tuple[Tensor, list[BlockCall]] | None = None
        self._laps = Laps(torch.device("cpu"))
        self.grids: dict[str, Grid] = {}  # of the block at hand, by parameter

    @property
    def needs_ids(self) -> bool:
        """Whether the method looks at calibration data."""
        return self.method.needs is not None

    def record(self, ids: Tensor, micro_tokens: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the hidden states each micro-batch brings into the first block.

        What the decoder hands to the blocks beside them is kept.
        """
        began = time.perf_counter()
        device = self._device(0)
        self.report.tokens, self.report.rows = ids.numel(), len(ids)
        # The layout is observed outside inference mode, where tensors count their versions.
        with torch.inference_mode(False), torch.no_grad():
            few = ids[:1, :TOKENS].clone().to(device)
            calls = Calls(self.model, self.found, few)
            hidden, recorded, written = calls.record(few)
        self._tiny = hidden, recorded
        self._calls, self.written, self._rows, self._length = [], [written], [], ids.shape[1]
        own = distributed.own_rows(ids)
        at_once = max(1, (micro_tokens or tokens_at_once(device)) // ids.shape[1])
        self.report.rows_at_once = min(at_once, len(own))
        for number, batch in enumerate(own.split(at_once)):
            with torch.inference_mode(), reproducible(device):
                hidden, recorded, written = calls.record(batch.to(device))
            self._calls.append(recorded)
            self._rows.append(len(batch))
            self.written.append(written)
            yield number, hidden
        self.report.seconds["prepare"] += time.perf_counter() - began

    def recorded_by(self, other: Run) -> None:
        """Take what another run of the same model and ids, yet to prune a block, has recorded."""
        self._calls, self._tiny = other._calls, other._tiny
        self._rows, self._length = other._rows, other._length
        self.written = [list(values) for values in other.written]
        self.report.tokens, self.report.rows = other.report.tokens, other.report.rows
        self.report.rows_at_once = other.report.rows_at_once

    def block(self, index: int) -> None:
        """Prune one block, whose weights are in memory, and move the states on to the next."""
        began = time.perf_counter()
        before = sum(self.report.seconds.values())
        device = self._device(index)
        self._laps = Laps(device)
        self.report.dense += self.found.dense(index)
        self._counts.clear()
        self._by_row.clear()
        self.grids.clear()
        with torch.inference_mode(), reproducible(device):
            if self.needs_ids:
                self._with_states(index)
            else:
                for layer in self.found.prunables(index):
                    self._prune([layer], None)
        self.done, self.begun = self.done + 1, False
        self._laps.read(self.report.seconds)
        spent = sum(self.report.seconds.values()) - before
        rest = "forward" if self.needs_ids else "solve"
        self.report.seconds[rest] += time.perf_counter() - began - spent

    def replay(self, index: int) -> None:
        """Move the states through a block that an earlier run has pruned."""
        assert self._tiny is not None
        hidden, recorded = self._tiny
        with torch.inference_mode(False), torch.no_grad():
            recorded[index].run(self.found.blocks[index], hidden, self.written[0])
        with torch.inference_mode(), reproducible(self._device(index)):
            self._advance(index)

    def _advance(self, index: int) -> None:
        """Replace the states by the block's outputs, unless it is the last."""
        if index + 1 < len(self.found):
            for number in range(len(self._calls)):
                self.states[number] = self._run(index, number)

    def _with_states(self, index: int) -> None:
        assert self._tiny is not None
        with torch.inference_mode(False):
            hidden, recorded = self._tiny
            seen = observe_block(self.found, index, recorded[index], hidden, self.written[0])
        self.report.dense += seen.dense
        if self.propagation == "sequential":
            self._sequential(index, seen.inputs, 0 if index else 1)
        else:
            self._two_pass(index, seen.inputs, 0 if index else len(seen.inputs))

    def _run(self, index: int, number: int, *, keep: bool = True) -> Tensor:
        """Run a block on a micro-batch; what it writes into its arguments stays if `keep`."""
        written = self.written[1 + number]
        return self._calls[number][index].run(
            self.found.blocks[index], self.states[number], written if keep else list(written)
        )

    def _sequential(self, index: int, inputs: list[SharedInput | Routed], common: int) -> None:
        """Prune one block in one pass; replace the states by its outputs unless it is the last.

        The first `common` inputs are the same whatever the block is pruned to.
        """
        outside = _autocast_state({"cpu", self._device(index).type})
        current = 0

        def pause(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                while number >= current:  # else a micro-batch that begins the block anew
                    with _autocast(outside):
                        work = getcurrent().parent.switch(number)
                    if not work:
                        return
                    work(args, kwargs)

            return hook

        handles = [
            shared.module.register_forward_pre_hook(pause(number), with_kwargs=True)
            for number, shared in enumerate(inputs)
        ]
        batches = range(len(self._calls))
        held = len(batches) if self.paused is None else self.paused
        tasks: dict[int, greenlet] = {}
        arrived: set[int] = set()

        def proceed(number: int) -> Any:
            if number in tasks:
                return tasks[number].switch()
            tasks[number] = greenlet(self._run)
            return tasks[number].switch(index, number)

        def gather(work: Work) -> None:
            """Take every micro-batch to the input at hand, and do some work on it there."""
            for number in batches:
                if number not in arrived:
                    # A task that has ended, or stands elsewhere, took a path of its own.
                    reached = proceed(number)
                    if tasks[number].dead or reached != current:
                        raise ModelError(
                            f"{inputs[current].name} is not reached by every micro-batch: the "
                            "engine cannot prune layers that only some tokens pass through"
                        )
                    arrived.add(number)
                tasks[number].switch(partial(work, number))
                if number >= held:
                    arrived.discard(number)
                    tasks.pop(number).throw()

        try:
            for current, shared in enumerate(inputs):
                arrived.clear()
                if isinstance(shared, Routed):
                    for step, experts in self._waves(shared):
                        self._experts(shared, step, experts, gather)
                    continue
                statistic = self._statistic(shared, current, common)

                def add(number: int, args: Any, kwargs: Any, to: Any = statistic) -> None:
                    with _autocast(outside):
                        self._add(to, args[0])

                gather(add)
                self._solve(shared, statistic, current, common)
                del statistic, add
            current = len(inputs)
            if index + 1 < len(self.found):
                for number in batches:
                    self.states[number] = proceed(number)
                    del tasks[number]
        finally:
            for handle in handles:
                handle.remove()
            for task in tasks.values():
                if task and not task.dead:
                    task.throw()

    def _two_pass(self, index: int, inputs: list[SharedInput | Routed], common: int) -> None:
        """Prune one block on its dense inputs, then run it again for the next one's inputs."""
        plain = [
            (shared, self._statistic(shared, number, common), number)
            for number, shared in enumerate(inputs)
            if isinstance(shared, SharedInput)
        ]
        gathered = False

        def gather(work: Work, at: nn.Module | None) -> None:
            """Run the block on every micro-batch, and do some work at a mixture of experts."""
            nonlocal gathered
            number = 0

            def collect(to: Statistic | Tensor) -> Callable[..., None]:
                return lambda module, args: self._add(to, args[0])

            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                work(number, args, kwargs)

            handles = [
                shared.module.register_forward_pre_hook(collect(statistic))
                for shared, statistic, _ in plain
                if not gathered
            ]
            if at is not None:
                handles.append(at.register_forward_pre_hook(hook, with_kwargs=True))
            try:
                for number in range(len(self._calls)):
                    self._run(index, number, keep=False)
            finally:
                for handle in handles:
                    handle.remove()
            gathered = True

        # From the last input to the first: what is upstream of experts has to be dense still.
        for routed in reversed([shared for shared in inputs if isinstance(shared, Routed)]):
            for step, experts in reversed(self._waves(routed)):
                self._experts(routed, step, experts, partial(gather, at=routed.module))
        if not gathered:
            gather(lambda number, args, kwargs: None, None)
        while plain:
            self._solve(*plain.pop(0), common)
        self._advance(index)

    def _waves(self, routed: Routed) -> list[tuple[Step, list[int | None]]]:
        """Return a mixture's steps, each with as many experts as have room for statistics."""
        kind = self.method.needs
        assert kind is not None
        waves = []
        for step in (step for step in routed.steps if step.layers):
            at_once = max(1, self.expert_bytes // (2 * kind.memory(step.columns)))
            experts = list(step.layers)
            waves += [(step, experts[at : at + at_once]) for at in range(0, len(experts), at_once)]
        return waves

    def _experts(
        self,
        routed: Routed,
        step: Step,
        experts: list[int | None],
        gather: Callable[[Work], None],
    ) -> None:
        """Gather the statistics of some experts at one step, and prune them."""
        kind = self.method.needs
        assert kind is not None
        lap = partial(self._laps.lap, "statistics")
        gathering = Gathering(routed, step, experts, kind, lap)
        every = sampled(routed, self._length)
        counts = self._counts.setdefault(routed.name, {})

        def collect(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = self._rows[number]
            if number not in counts:
                counts[number] = routed.counts(rows, args, kwargs)
            before = distributed.share(self.report.rows).start + sum(self._rows[:number])
            first = before * self._length
            sample = torch.arange(-first % every, rows * self._length, every)
            gathering.collect(sample.to(routed.device), args, kwargs)

        gather(collect)
        if routed.name not in self._by_row:  # read once a mixture
            own = torch.cat([counts[number] for number in range(len(self._rows))])
            whole = distributed.of_all_rows(own, self.report.rows, routed.device)
            self._by_row[routed.name] = whole.cpu()
        by_row = self._by_row[routed.name]
        with self._laps.lap("solve"):
            for layers, statistic, tokens in gathering.statistics(by_row.sum(0).tolist()):
                self._prune(layers, statistic, tokens)
                del statistic
        if not any(report.name == routed.name for report in self.report.experts):
            sources = {
                source: by_row[torch.tensor([one == source for one in self.sources])]
                for source in dict.fromkeys(self.sources)
            }
            self.report.experts.append(
                ExpertsReport(
                    routed.name, by_row.sum(0).tolist(),
                    {source: rows.sum(0).tolist() for source, rows in sources.items()},
                )
            )  # fmt: skip

    def _device(self, index: int) -> torch.device:
        return next(self.found.blocks[index].parameters()).device

    def _statistic(self, shared: SharedInput, number: int, common: int) -> Statistic | Tensor:
        """Return an input's empty statistic, or another run's full one that is the same."""
        kind = self.method.needs
        assert kind is not None
        if self._shared is not None and number < common and (kind, number) in self._shared:
            return self._shared[kind, number]
        return kind(shared.columns, shared.layers[0].view().device)

    def _add(self, statistic: Statistic | Tensor, inputs: Tensor) -> None:
        if isinstance(statistic, Statistic):
            with self._laps.lap("statistics"):
                statistic.add(inputs)

    def _solve(
        self, shared: SharedInput, statistic: Statistic | Tensor, number: int = 0, common: int = 0
    ) -> None:
        with self._laps.lap("solve"):
            if isinstance(statistic, Statistic):
                distributed.gather(statistic)
                kind, statistic = type(statistic), statistic.matrix()
                if self._shared is not None and number < common:
                    self._shared[kind, number] = statistic
            self._prune(shared.layers, statistic)

    def _prune(
        self, layers: list[Prunable], statistic: Tensor | None, tokens: int | None = None
    ) -> None:
        """Solve the layers of one input, write their weights and report on them."""
        inputs = []
        if statistic is not None:  # the sums of squares tell of a Gram matrix
            square = statistic.ndim == 2 and statistic.shape[0] == statistic.shape[1]
            inputs = [statistic.diagonal() if square else statistic]
        _check_finite(layers, "its weights are not finite", inputs)
        weights = [layer.view() for layer in layers]
        patterns = [_of_layer(self.pattern, layer.name) for layer in layers]
        # What a solver may round it says itself; the rest is float32, whatever is set.
        with bfloat16_products(allowed=False):
            solved = solve(self.method, layers[0].name, weights, statistic, patterns)
            self.begun = True
            for layer, weight in zip(layers, solved.weights, strict=True):
                layer.assign(weight)
            _check_finite(layers, "its pruned weights are not finite")
        grids: Sequence[Grid | None] = solved.grids or [None] * len(layers)
        for layer, pruned, error, grid in zip(
            layers, solved.pruned, solved.errors, grids, strict=True
        ):
            rows, columns = layer.shape
            if grid is not None and layer.whole_matrix:
                self.grids[layer.parameter_name] = grid
            precision = None if solved.dtype is None else str(solved.dtype)[6:]
            self.report.layers.append(
                LayerReport(
                    layer.name, rows, columns, pruned, pruned / (rows * columns), error,
                    solved.damping, precision, solved.dead, tokens,
                    None if grid is None else grid.bits,
                )
            )  # fmt: skip


def _autocast_state(kinds: set[str]) -> dict[str, tuple[bool, torch.dtype]]:
    """Return whether autocast is on, and to what type, by kind of device."""
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
    }


@contextmanager
def _autocast(state: dict[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Set autocast, which all coroutines of a thread share, for a while."""
    before = _autocast_state(set(state))

    def put(values: dict[str, tuple[bool, torch.dtype]]) -> None:
        for kind, (enabled, dtype) in values.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)

    put(state)
    try:
        yield
    finally:
        put(before)


def _check_finite(layers: list[Prunable], otherwise: str, inputs: Sequence[Tensor] = ()) -> None:
    """Refuse weights, or statistics of inputs, that are not finite; the host reads once."""
    weights = [layer.view() for layer in layers]
    ends = [torch.stack(torch.aminmax(value)).float() for value in (*weights, *inputs)]
    finite = torch.stack(ends).isfinite().all(1).tolist()
    if all(finite):
        return
    number = finite.index(False)
    what = otherwise if number < len(layers) else "its inputs are not finite"
    half = weights[0].dtype == torch.float16
    hint = ": float16 may be too narrow, use --dtype bfloat16 or float32" if half else ""
    raise SolverError(f"{layers[number % len(layers)].name}: {what}{hint}")
