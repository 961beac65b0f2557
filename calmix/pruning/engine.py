"""The engine: one forward pass over the blocks prunes a model.

Sequential propagation (the default): every layer is pruned on inputs from already-pruned layers.
Each micro-batch runs a block's own forward in a coroutine that pauses where a distinct input first
reaches a layer. When all micro-batches have paused there, the input's statistic is complete, the
layers that share it are solved together, and the coroutines continue through the pruned weights.
Nothing is computed twice.

Block propagation, as in the papers: all layers of a block are pruned on the inputs that its dense
weights produce. Pruned weights wait until all are solved; then the block runs again to produce the
next block's inputs.

A paused micro-batch holds a block's activations. When memory is short, only some stay paused and
the others restart the block for every input: the same numbers in more time.

Independent of architectures (see trace.py), files (see checkpoint.py) and command lines.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from calmix.calibration.dataset import CalibrationSet
from calmix.errors import InputError, ModelError, PassingError, SolverError, nearest
from calmix.machine import tokens_at_once
from calmix.memory import EXPERT_BYTES, ROUNDED_AT_ONCE, out_of_memory
from calmix.models.blocks import DecoderBlocks, Prunable, evaluating, find_blocks, outer_layers
from calmix.models.opening import OpenModel
from calmix.models.opening import check_ids as check_vocabulary
from calmix.options import BITS_METHOD, METHOD, Propagation, Statistics
from calmix.precision import bfloat16_products, dtype_name, narrower, reproducible
from calmix.progress import half_progress
from calmix.pruning.experts import SMOOTHING, Routed, Step
from calmix.pruning.gram import (
    Cross,
    Gram,
    Squares,
    Statistic,
    inverse_factor,
    raised_diagonal,
    relative_error,
)
from calmix.pruning.held_out import (
    DOUBTFUL,
    SHARE,
    HeldOut,
    checked,
    held_out_rows,
    widest_to_move,
)
from calmix.pruning.held_out import STORED_TOKENS as JUDGING
from calmix.pruning.imatrix import importance
from calmix.pruning.methods import Method, get_method
from calmix.pruning.methods.base import Quantiser
from calmix.pruning.methods.ggml import Typed
from calmix.pruning.patterns import (
    Blocks,
    Mixed,
    Pattern,
    Rate,
    Recipe,
    as_pattern,
    check_embeddings,
)
from calmix.pruning.report import LayerReport, PruneReport
from calmix.pruning.solvers.ggml_types import Encoded
from calmix.pruning.solvers.grids import Grid
from calmix.pruning.token_weights import POWER, Weighting, token_weights, weighting
from calmix.pruning.trace import TRACED_TOKENS, Batch, Calls, SharedInput, observe_block
from calmix.pruning.work import States

Patterns = Pattern | Mapping[str, Pattern]  # one for all layers, or one per layer name
BACKWARD = 4  # times fewer rows run backward than forward at a time
Work = Callable[[int, tuple[Any, ...], dict[str, Any]], None]  # on a micro-batch and its arguments


def prune(
    model: nn.Module | OpenModel,
    ids: Tensor | CalibrationSet | None = None,
    *,
    method: str | Method | None = None,
    pattern: Patterns | str | float | None = None,
    propagation: Propagation = "sequential",
    statistics: Statistics = "robust",
    micro_tokens: int | None = None,
    paused: int | None = None,
    embeddings: float | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    sources: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> PruneReport:
    """Prune the linear maps in a causal language model's blocks, in place.

    Norms and biases are never changed; embeddings and the output head only with `embeddings`, or by
    a pattern that includes them.

    Args:
        model: decoder-only causal language model of transformers, or one opened by `open_model`.
        ids: calibration token ids, int64 (rows, length), full rows without padding, or a
            calibration set; None for a method that needs none.
        method: a name, `NAME,option=value` or a `Method` (`calmix.pruning.methods.get_method`);
            by default SparseGPT, or ECQ if only `bits` is given.
        pattern: a sparsity such as 0.5, `"2:4"`, `"2.8 bits"` or `"Q3_K_M"` (`as_pattern`); or a
            mapping with one for every layer name, which can include embeddings and head.
        propagation: `sequential` (inputs from already-pruned layers) or `block` (the papers').
        statistics: `robust` (tokens weighted by what their errors cost, Gram matrices shrunk: see
            `calmix.pruning.token_weights` and `Gram.shrinkage`) or `plain` (the papers').
        micro_tokens: tokens that run through a block at a time; None for the device's default.
        paused: micro-batches that may hold a block's activations at a time; None for all.
        embeddings: bits per weight of embeddings and output head; None to leave them unchanged.
        only, skip: layer name patterns to prune, and to leave dense.
        sources: the source of each calibration row; the rows held out are spread over them.
        progress: called with (blocks done, blocks) after every block; a pass that weighs tokens
            counts as as many blocks.
        **options: of the method, such as `damping=0.1` or `bits=4`.

    Raises:
        ModelError: the architecture cannot be pruned.
        InputError: ids are missing or of the wrong shape, the pattern does not fit, or there is
            no such method or option.
        SolverError: a layer's weights or inputs are unusable.

    An error after the first block leaves the model partly pruned and names the pruned blocks.
    """
    stored = None
    if isinstance(model, OpenModel):
        stored, model = model.stored_dtype, model.model
    if isinstance(ids, CalibrationSet):
        sources, ids = sources or ids.sources, ids.ids
    if not isinstance(model, nn.Module):
        name = model if isinstance(model, str) else "NAME"
        raise InputError(
            f"prune needs an open model, not {type(model).__name__}: open it first with "
            f"calmix.open_model('{name}').model"
        )
    default = BITS_METHOD if pattern is None and options.get("bits") else METHOD
    chosen = get_method(default if method is None else method, **options)
    blocks, what = find_blocks(model).select(only, skip), "by layer"
    if isinstance(pattern, Mapping):
        pattern = {name: as_pattern(one) for name, one in pattern.items()}
        check_embeddings(embeddings, *pattern.values())
    else:
        chosen, pattern = chosen.aim(None if pattern is None else as_pattern(pattern))
        check_embeddings(embeddings, pattern)
        what = str(pattern)
        if isinstance(pattern, Recipe):
            pattern = pattern.types(model, blocks)
        elif isinstance(pattern, Mixed):
            raise InputError(
                f"types or levels for {pattern.bits:g} bits are chosen first: pass "
                "pattern=calmix.pruning.allocation.allocate(model, ids, "
                f"'{pattern.bits:g} bits', method='{chosen.name}')"
            )
    check_pattern(blocks, pattern, chosen)
    if chosen.needs is not None:
        input_embeddings: Any = model.get_input_embeddings  # a method of transformers' models
        check_vocabulary(type(model).__name__, input_embeddings(), check_ids(ids, chosen.name))
    run = Run(model, blocks, chosen, pattern, propagation, paused, sources, embeddings)
    run.report.pattern = what
    check_run(run)
    if stored is not None:
        run.types = {name: narrower(stored, p.dtype) for name, p in model.named_parameters()}
    try:
        run.robust = chosen.is_robust(statistics)
        if run.robust:
            rows = check_ids(ids, chosen.name)
            whole = progress or (lambda done, total: None)
            run.weigh(costs_in_memory(model, blocks, rows, half_progress(whole, 0, len(blocks))))
            progress = half_progress(whole, 1, len(blocks))
        run_through(run, ids, micro_tokens, progress)
    except BaseException as error:
        if run.changed:
            last = run.changed - 1
            error.add_note(f"the model is left pruned in blocks 0 to {last}: open it again")
        raise
    return run.report


def costs_in_memory(
    model: nn.Module,
    blocks: DecoderBlocks,
    ids: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Return the costs of errors by token (`token_weights`) of a model in memory; {} if it has no
    gradient."""
    device = next(model.parameters()).device
    at_once = max(1, tokens_at_once(device) // ids.shape[1] // BACKWARD)
    try:
        return token_weights(
            model, blocks, ids, device=device, rows_at_once=at_once, progress=progress
        )
    except ModelError:  # the report says that tokens count alike
        return {}


@contextmanager
def memory_errors(run: Run, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into one line that suggests how to use less."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise PassingError(
            f"{device} ran out of memory with {run.report.rows_at_once} calibration rows at a "
            "time: free some, run fewer rows at a time (--max-memory, in Python micro_tokens), or "
            "use shorter rows"
        ) from error


def run_through(
    run: Run,
    ids: Tensor | None,
    micro_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run through all blocks of a model in memory, keeping the hidden states in memory too."""
    model, blocks = run.model, run.blocks
    began = time.perf_counter()
    with evaluating(model), memory_errors(run, next(model.parameters()).device):
        if run.needs_ids:
            run.record(ids, micro_tokens)
        for index in range(len(blocks)):
            run.block(index)
            if progress is not None:
                progress(index + 1, len(blocks))
        run.outside()
    run.report.seconds["total"] = time.perf_counter() - began


def check_pattern(blocks: DecoderBlocks, pattern: Patterns, method: Method) -> None:
    """Refuse patterns that do not fit the layers or the method."""
    layers = blocks.layers
    if isinstance(pattern, Mapping):
        outside = _outside(blocks, pattern)
        check_names([layer.name for layer in layers], [n for n in pattern if n not in outside])
    for layer in layers:
        own = pattern[layer.name] if isinstance(pattern, Mapping) else pattern
        method.check(own, layer.shape[1], layer.name)


def _outside(blocks: DecoderBlocks, pattern: Patterns) -> dict[str, Pattern]:
    """Return the types that a mapping has for matrices outside the blocks."""
    every = pattern.items() if isinstance(pattern, Mapping) else ()
    inside = f"{blocks.name}."
    return {n: one for n, one in every if isinstance(one, Blocks) and not n.startswith(inside)}


def check_run(run: Run) -> None:
    """Refuse an importance matrix of another model, and patterns of embeddings and head that do not
    fit, before any block has changed."""
    _ = run.importance
    if not (wanted := run.outer):
        return
    layers = outer_layers(run.model)
    check_names(list(layers), layers | wanted)
    for name, one in _outside(run.blocks, run.pattern).items():
        run.method.check(one, layers[name].shape[1], name)


def solve_rows(
    weight: Tensor, gram: Tensor | None, pattern: Blocks, method: Method
) -> tuple[Tensor, Encoded]:
    """Return a matrix with many rows in blocks of a type, as `round_rows`; rounded plainly without
    a Gram matrix."""
    assert isinstance(method, Typed)
    values = torch.empty_like(weight)
    parts = weight.tensor_split(-(-weight.numel() // ROUNDED_AT_ONCE))
    blocks, at = list[Encoded](), 0
    for one in method.solve_outer(parts, gram, pattern):
        values[at : at + len(one.data)] = one.values()
        at += len(one.data)
        blocks.append(one)
    return values, Encoded(blocks[0].name, torch.cat([one.data for one in blocks]))


def round_rows(weight: Tensor, gram: Tensor | None, bits: float) -> tuple[Tensor, Grid]:
    """Return a matrix with many rows, rounded to a rate by the default method, in its own type, and
    its grid. It is rounded in chunks of about equal size, each with its own step.

    Args:
        weight: (rows, columns).
        gram: (columns, columns), of the inputs; without it, as if they did not depend on another.
    """
    gram = torch.eye(weight.shape[1], device=weight.device) if gram is None else gram
    method, parts = get_method(BITS_METHOD), -(-weight.numel() // ROUNDED_AT_ONCE)
    assert isinstance(method, Quantiser)
    factor = inverse_factor(gram, method.damping)
    values, scales, taken = torch.empty_like(weight), [], 0.0
    for rows, out in zip(weight.tensor_split(parts), values.tensor_split(parts), strict=True):
        [rounded], [grid] = method.round([rows], factor, bits)
        out.copy_(rounded)
        scales.append(grid.scale.expand(len(rows), -1))
        taken += grid.bits * rows.numel()
    return values, replace(grid, scale=torch.cat(scales), bits=taken / weight.numel())


def check_names(layers: Sequence[str], names: Collection[str]) -> None:
    """Refuse a pattern whose names are not exactly those of the layers."""
    for name in names:
        if name not in layers:
            raise InputError(
                f"the pattern names '{name}', which is not a layer: {nearest(name, layers)}"
            )
    if missing := [name for name in layers if name not in names]:
        raise InputError(f"the pattern lacks {len(missing)} layers, the first is {missing[0]}")


def check_ids(ids: Tensor | None, method: str) -> Tensor:
    """Return calibration ids after checking their shape."""
    if ids is None or ids.ndim != 2 or not ids.numel():
        raise InputError(f"{method} needs calibration ids of shape (rows, length)")
    return ids


@dataclass(eq=False)
class Run:
    """One pruning run, block by block; the caller decides where weights and hidden states are kept.

    `block` only needs the current block's weights in memory; `record` those of the first block and
    everything outside the blocks.

    Attributes:
        model, blocks, method: the model, its blocks, and the method with its options.
        pattern, propagation, paused, sources, embeddings: as for `prune`.
        expert_bytes: bytes that statistics of several experts may take at a time.
        seen: called with the layers of each input and its statistic, in place of pruning; then the
            pattern does not matter.
        costs: of errors by token, `token_weights`.
        weighting: multiplies the inputs of layers before their statistic is added up.
        robust: whether Gram matrices are shrunk, and judged on rows that are not fitted.
        states: hidden states entering the current block, by micro-batch number. With targets from
            the dense model, its states follow, and then its layers' inputs.
        types: that parameters will be stored in, by name, if narrower than in memory; pruned
            weights are rounded to them.
        changed: number of blocks up to the last one with a changed weight.
        needs_ids: whether the method uses calibration data.
        report: the report so far.
    """

    model: nn.Module
    blocks: DecoderBlocks
    method: Method
    pattern: Patterns = field(default_factory=dict)
    propagation: Propagation = "sequential"
    paused: int | None = None
    sources: Sequence[str] = ()
    embeddings: float | None = None
    weighting: Weighting | None = None
    costs: Mapping[str, Tensor] = field(default_factory=dict)
    robust: bool = False
    expert_bytes: int = EXPERT_BYTES
    seen: Callable[[list[Prunable], Any], None] | None = None
    states: dict[int, Tensor] | States = field(default_factory=dict)
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    changed: int = 0

    def __post_init__(self) -> None:
        self._kind: Any = self.method.needs
        if self.method.dense_inputs:
            self.propagation = "block"
        self.needs_ids = self._kind is not None
        self._batches: list[Batch] = []
        self._unfitted: list[int] = []  # rows held out
        self._dense_batches: list[Batch] = []  # of the dense model, if it gives targets
        self._waiting: list[tuple[list[Prunable], list[Tensor]]] = []  # pruned weights of a block
        self.report = PruneReport(
            self.method.name,
            "by layer" if isinstance(self.pattern, Mapping) else str(self.pattern),
            self.propagation if self.needs_ids else None,
            0,
            self.method.options,
        )

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """The importance of the inputs of layers, from the file that the method names, if any."""
        file = self.method.importance_file
        return importance(Path(file), self.model, self.blocks) if file else {}

    @property
    def outer(self) -> dict[str, Pattern]:
        """The patterns of embeddings and output head, by layer name; {} to leave them unchanged."""
        if self.embeddings is not None:
            return dict.fromkeys(outer_layers(self.model), Rate(self.embeddings))
        return _outside(self.blocks, self.pattern)

    def weigh(self, costs: Mapping[str, Tensor], power: float = POWER) -> None:
        """Weigh tokens by a power of what their errors cost (`token_weights`)."""
        self.costs, self.report.weighted = costs, bool(costs)
        self.weighting = weighting(costs, power)

    def record(self, ids: Tensor | None, micro_tokens: int | None = None) -> None:
        """Compute the states entering the first block, and keep the blocks' other arguments."""
        ids = check_ids(ids, self.method.name)
        device, (rows, length) = self._device(0), ids.shape
        self.report.tokens, self.report.rows = ids.numel(), rows
        at_once = max(1, (micro_tokens or tokens_at_once(device)) // length)
        self.report.rows_at_once = min(at_once, rows)
        if self.robust and issubclass(self._kind, Gram):
            self._unfitted = held_out_rows(rows, self.sources)
        with _at_work(device):
            # Blocks are observed outside inference mode: tensors have version counters there.
            with torch.inference_mode(False), torch.no_grad():
                few = ids[:1, :TRACED_TOKENS].clone().to(device)
                self._calls = calls = Calls(self.model, self.blocks, few)
                self._few = calls.record(few)
            parts = ids.split(at_once)
            for number, part in enumerate(parts):
                self.states[number], batch = calls.record(part.to(device))
                self._batches.append(batch)
                if self.has_dense_targets and self._unfitted:
                    self.states[len(parts) + number] = self.states[number].clone()
                    self._dense_batches.append(copy(batch))

    def block(self, index: int) -> None:
        """Prune one block, whose weights are in memory, and advance the states to the next."""
        self._index = index
        self.report.dense += self.blocks.dense(index)
        with _at_work(self._device(index)):
            if self.needs_ids:
                hidden, batch = self._few
                with torch.inference_mode(False):
                    inputs, dense = observe_block(self.blocks, index, batch, hidden)
                self.report.dense += dense
                captured = self.run_dense(index, inputs)
                self._through(index, inputs)
                for key in captured:
                    del self.states[key]
            else:
                for layer in self.blocks.prunables(index):
                    squares = None
                    if self.importance:
                        squares = Squares(layer.shape[1], layer.view().device)
                        squares.sum.copy_(self.importance[layer.name])
                    self._prune([layer], squares)

    @property
    def has_dense_targets(self) -> bool:
        """Whether layers also make up for the errors of those before them."""
        return self.robust and self._kind is Gram

    @property
    def follows_dense(self) -> bool:
        """Whether the states hold the dense model's too: only rows that are not fitted say how far
        to follow it."""
        return bool(self._dense_batches)

    def run_dense(self, index: int, inputs: Sequence[SharedInput | Routed] = ()) -> list[int]:
        """Advance the dense model's states through a block with dense weights; return the numbers
        under which the states hold its layers' inputs."""
        captured, number, count = list[int](), 0, len(self._batches)

        def see(at: int, module: nn.Module, args: tuple[Any, ...]) -> None:
            captured.append(self._key(at, number))
            self.states[captured[-1]] = args[0].clone()

        with _at_work(self._device(index)), ExitStack() as hooks:
            for at, one in enumerate(inputs):
                if not isinstance(one, Routed) and self._follows(one):
                    hook = partial(see, at)
                    hooks.enter_context(one[0].module.register_forward_pre_hook(hook))
            for number, batch in enumerate(self._dense_batches):
                self.states[count + number] = batch.run(index, self.states[count + number])
        return captured

    def _follows(self, shared: SharedInput) -> bool:
        """Whether the layers of an input make up for the errors of earlier ones."""
        return self.follows_dense and shared[0].shape[1] <= widest_to_move(self.report.tokens)

    def _key(self, at: int, number: int) -> int:
        """Return where the states hold the dense model's `at`-th input of the block."""
        return (2 + at) * len(self._batches) + number

    def replay(self, index: int) -> None:
        """Advance the states through a block pruned by an earlier run."""
        hidden, batch = self._few
        with _at_work(self._device(index)):
            with torch.inference_mode(False), torch.no_grad():
                batch.run(index, hidden)
            self._advance(index)

    def outside(self) -> None:
        """Round embeddings and output head, which are in memory, after the last block.

        The head, or the matrix shared with it, is solved on its inputs; separate embeddings are
        rounded without correction.
        """
        if not (patterns := self.outer):
            return
        weights = outer_layers(self.model)
        head = next(iter(weights))
        with _at_work(weights[head].device):
            held_out = self._judge()
            head_gram = self._head_gram(head, weights[head], held_out) if self.needs_ids else None
            for name, weight in weights.items():
                if (pattern := patterns.get(name)) is None:
                    continue
                gram = head_gram if name == head else None
                statistic = None if gram is None else gram.matrix()
                matrices = [weight] if statistic is None else [weight, statistic]
                ends = torch.stack([end for matrix in matrices for end in torch.aminmax(matrix)])
                if not ends.isfinite().all():
                    raise SolverError(f"{name}: its weights or inputs are not finite")
                shrinkage = 0.0 if gram is None or not self.robust else gram.shrinkage()
                grid: Grid | Encoded
                with bfloat16_products(allowed=False), raised_diagonal(statistic, shrinkage):
                    if isinstance(pattern, Blocks):
                        rounded, grid = solve_rows(weight, statistic, pattern, self.method)
                    else:
                        assert isinstance(pattern, Rate)
                        rounded, grid = round_rows(weight, statistic, pattern.bits)
                error = held_out.error(weight, rounded) if gram and held_out.judges else None
                weight.data.copy_(rounded)
                self.report.grids[f"{name}.weight"] = grid
                self.report.outer.append(
                    LayerReport(
                        name,
                        len(weight),
                        weight.shape[1],
                        error=error,
                        bits=grid.bits,
                        type=grid.name if isinstance(grid, Encoded) else None,
                        shrinkage=shrinkage,
                        held_out=error is not None,
                    )
                )

    def _head_gram(self, name: str, head: Tensor, held_out: HeldOut | None = None) -> Gram | None:
        """Return the statistic of the head's inputs, without the rows held out if these are asked
        for; None if it is never called."""
        length, gram = self.report.tokens // self.report.rows, Gram(head.shape[1], head.device)
        for number, batch in enumerate(self._batches):
            inputs = self._calls.behind(self.states[number], batch.rows, length)
            if inputs is None:
                return None
            weighted = self._weighted({name: len(head)}, number, inputs)
            if held_out is None:
                gram.add_product(weighted)
            else:
                self._add(gram, held_out, number, weighted)
        return gram

    def _advance(self, index: int, run: Callable[[int], Tensor] | None = None) -> None:
        """Replace the states by the block's outputs if these are still needed; `run` returns those
        of a micro-batch."""
        run = run or partial(self._run, index)
        if index + 1 < len(self.blocks) or self.outer:
            for number in range(len(self._batches)):
                self.states[number] = run(number)

    def _run(self, index: int, number: int) -> Tensor:
        return self._batches[number].run(index, self.states[number])

    def _through(self, index: int, inputs: list[SharedInput | Routed]) -> None:
        """Prune one block; replace the states by its outputs if these are needed."""
        device, current, batches = self._device(index), 0, range(len(self._batches))
        paused = len(batches) if self.paused is None else self.paused
        work: dict[int, Work] = {}  # at the current input
        owners: list[Any] = [one if isinstance(one, Routed) else one[0] for one in inputs]

        def pause(number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            while number >= current:  # else it continues, or restarts the block
                if number in work:
                    work[number](batch, args, kwargs)
                with torch.autocast(device.type, enabled=False):  # of all coroutines of a thread
                    getcurrent().parent.switch(number)

        run = partial(self._run, index)
        tasks = [greenlet(partial(run, batch)) for batch in batches]
        with ExitStack() as hooks:
            for number, owner in enumerate(owners):
                hook = partial(pause, number)
                hooks.enter_context(owner.module.register_forward_pre_hook(hook, with_kwargs=True))
            try:
                for at, one in enumerate(inputs):
                    for part in self._parts(one, at):
                        work[current] = next(part)
                        for batch in batches:  # run each to that input
                            reached = tasks[batch].switch()
                            if tasks[batch].dead or reached != current:
                                raise ModelError(
                                    f"{owners[current].name} is not reached by every micro-batch: "
                                    "the engine cannot prune layers that only some tokens pass "
                                    "through"
                                )
                            if batch >= paused:
                                tasks[batch].throw()
                                tasks[batch] = greenlet(partial(run, batch))
                        work.clear()  # drops the last reference to the statistic
                        next(part, None)
                    current += 1
                if self.propagation == "sequential":
                    self._advance(index, lambda batch: tasks[batch].switch())
            finally:
                for task in tasks:
                    task.throw()
        if self.propagation == "block":
            if self.method.dense_inputs:
                self._advance(index)
            for layers, weights in self._waiting:
                self._assign(layers, weights)
            self._waiting.clear()
            if not self.method.dense_inputs:
                self._advance(index)

    def _parts(self, one: SharedInput | Routed, at: int) -> Iterator[Iterator[Work]]:
        """Yield the parts of an input that are pruned together: all its layers, or as many experts
        of a mixture's step as have room for statistics. A part yields the work to do on every
        micro-batch, then solves."""
        if not isinstance(one, Routed):
            yield self._layers(one, at)
            return
        for step in (step for step in one.steps if step.layers):
            experts = list(step.layers)
            columns = step.layers[experts[0]][0].shape[1]
            at_once = max(1, self.expert_bytes // (2 * self._kind.memory(columns)))
            for start in range(0, len(experts), at_once):
                yield self._experts(one, step, experts[start : start + at_once])

    def _layers(self, shared: SharedInput, at: int) -> Iterator[Work]:
        """Gather the statistic of an input, then prune the layers that share it."""
        place = shared[0].shape[1], shared[0].view().device
        statistic: Statistic = self._kind(*place)
        cross = Cross(*place) if self._follows(shared) else None
        held_out, outputs = self._judge(), {layer.name: layer.shape[0] for layer in shared}

        def add(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                some = [args[0], *([] if cross is None else [self.states[self._key(at, number)]])]
                weighted = [self._weighted(outputs, number, one) for one in some]
                self._add(statistic, held_out, number, *weighted, cross=cross)

        yield add
        self._prune(shared, statistic, held_out, cross=cross)

    def _judge(self) -> HeldOut:
        """Return an empty store of a layer's inputs on the rows held out."""
        tokens = len(self._unfitted) * self.report.tokens // max(1, self.report.rows)
        return HeldOut(max(1, tokens // JUDGING))

    def _add(
        self,
        statistic: Statistic,
        held_out: HeldOut,
        number: int,
        *inputs: Tensor,
        cross: Cross | None = None,
    ) -> None:
        """Add the inputs of a micro-batch, and those of the dense model if they are known, to the
        sums, and rows held out to their store."""
        start, rows = number * self.report.rows_at_once, self._batches[number].rows
        apart = [row - start for row in self._unfitted if start <= row < start + rows]
        by_row = [one.reshape(rows, -1, one.shape[-1]) for one in inputs]  # some layers take 2-d
        if apart:
            held_out.add(*(one[apart] for one in by_row))
            fitted = [row for row in range(rows) if row not in apart]
            by_row = [one[fitted] for one in by_row]
        if by_row[0].numel():
            statistic.add(by_row[0])
            if cross is not None:
                cross.add(by_row[1], by_row[0])

    def _weighted(self, outputs: Mapping[str, int], number: int, inputs: Tensor) -> Tensor:
        """Return the inputs of a micro-batch, each token times the square root of its weight;
        `outputs` are the sizes of the layers that read them, by name."""
        if self.weighting is None:
            return inputs
        start = number * self.report.rows_at_once
        return self.weighting(outputs, slice(start, start + self._batches[number].rows), inputs)

    def _experts(self, routed: Routed, step: Step, experts: list[int]) -> Iterator[Work]:
        """Gather the statistics of some experts at one step, smoothed by those of all tokens, then
        prune them."""
        columns = step.layers[experts[0]][0].shape[1]
        report, kind = self.report, partial(self._kind, columns, routed.device)
        own: dict[int, Statistic] = defaultdict(kind)
        every: dict[int, Statistic] = defaultdict(kind)
        held_out: dict[int, HeldOut] = defaultdict(HeldOut)
        seen = Counter[int]()  # tokens of each expert so far
        length = report.tokens // report.rows
        # One in `spacing` tokens stands for all, so that each expert sees as many of them as are
        # routed to it on average. A `spacing` coprime to the row length favours no position.
        spacing, sampled = max(1, round(routed.mixture.count / max(1, routed.chosen))), 0
        while math.gcd(spacing, length) > 1:
            spacing += 1
        # If all experts see all tokens, there is nothing to smooth.
        smoothed = [] if routed.kind == "shared" else experts[: 1 if step.common else None]

        def add(sums: dict[int, Statistic], expert: int, inputs: Tensor) -> None:
            sums[expert].add(inputs)

        def add_own(expert: int, inputs: Tensor) -> None:
            if self._unfitted:  # rows cannot be told apart here
                numbers = torch.arange(len(inputs), device=inputs.device) + seen[expert]
                judging = numbers % SHARE == SHARE - 1
                seen[expert] += len(inputs)
                held_out[expert].add(inputs[judging])
                inputs = inputs[~judging]
            add(own, expert, inputs)

        def collect(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal sampled
            rows, call = self._batches[number].rows, (args, kwargs)
            if number not in routed.counted:
                routed.counted[number] = routed.counts(call)
            before = number * report.rows_at_once * length
            tokens = torch.arange(-before % spacing, rows * length, spacing).to(routed.device)
            routed.collect(step, experts, call, add_own)
            if smoothed and len(tokens):
                sampled += len(tokens)
                routed.everything(step, smoothed, tokens, call, partial(add, every))

        yield collect
        counted = torch.stack([*routed.counted.values()]).sum(0).tolist()
        whole: Statistic | None = None
        for expert in experts:
            statistic = own.pop(expert, None) or kind()  # of no tokens if none is routed to it
            if smoothed:
                if whole is None or not step.common:
                    whole = every.pop(expert, None) or kind()
                statistic.merge(whole, SMOOTHING / sampled)
            judge = held_out.pop(expert, None)
            self._prune(step.layers[expert], statistic, judge, counted[expert])
            del statistic

    def _targets(
        self,
        weights: Sequence[Tensor],
        gram: Tensor,
        cross: Cross,
        held_out: HeldOut,
        shrinkage: float,
    ) -> list[Tensor]:
        """Return the weights that are to be approximated: those that make up for a share of the
        errors of earlier layers, float32."""
        with raised_diagonal(gram, shrinkage):
            inverse = inverse_factor(gram).upper
        moves = cross.moves(weights, gram, inverse)
        if not (share := held_out.share(weights, moves)):
            return [*weights]
        return [weight + share * move for weight, move in zip(weights, moves, strict=True)]

    def _stored(self, layers: list[Prunable], weights: Sequence[Tensor]) -> list[Tensor]:
        """Return weights in the types in which they will be stored."""
        pairs = zip(layers, weights, strict=True)
        return [w.to(self.types.get(one.parameter_name, one.view().dtype)) for one, w in pairs]

    def _assign(self, layers: list[Prunable], weights: list[Tensor]) -> None:
        self.changed = self._index + 1
        for layer, weight in zip(layers, weights, strict=True):
            layer.view().copy_(weight)
        _check_finite(layers, "its pruned weights are not finite")

    def _device(self, index: int) -> torch.device:
        return next(self.blocks.blocks[index].parameters()).device

    def _prune(
        self,
        layers: list[Prunable],
        gathered: Statistic | None,
        held_out: HeldOut | None = None,
        tokens: int | None = None,
        cross: Cross | None = None,
    ) -> None:
        """Solve the layers of one input, write their weights and add them to the report."""
        statistic = None if gathered is None else gathered.matrix()
        if self.seen is not None:
            self.seen(layers, statistic)
            return
        inputs = []
        if statistic is not None:  # a Gram matrix is finite if its diagonal is
            square = statistic.ndim == 2 and statistic.shape[0] == statistic.shape[1]
            inputs = [statistic.diagonal() if square else statistic]
        _check_finite(layers, "its weights are not finite", inputs)
        weights, pattern = [layer.view() for layer in layers], self.pattern
        targets: list[Tensor] = weights
        patterns = [
            pattern[one.name] if isinstance(pattern, Mapping) else pattern for one in layers
        ]
        # Solvers allow rounding explicitly; all else is float32, whatever the caller has set.
        errors: list[float | None] = [None] * len(layers)
        judged, corrected = errors, [True] * len(layers)
        shrinkage = 0.0
        with bfloat16_products(allowed=False):
            try:
                if self.robust and isinstance(gathered, Gram):
                    shrinkage = gathered.shrinkage()
                if statistic is not None and cross is not None and held_out is not None:
                    targets = self._targets(weights, statistic, cross, held_out, shrinkage)
                with raised_diagonal(statistic, shrinkage):
                    solved = self.method.solve(targets, statistic, patterns)
            except SolverError as failure:
                raise SolverError(f"{layers[0].name}: {failure}") from failure
            stored = self._stored(layers, solved.weights)
            if statistic is not None and isinstance(gathered, Gram):
                errors = [
                    relative_error(*pair, statistic) for pair in zip(targets, stored, strict=True)
                ]
                judged = errors
            if statistic is not None and held_out is not None and held_out.judges:
                judged = [held_out.error(*pair) for pair in zip(targets, stored, strict=True)]
                doubtful = [
                    at for at, one in enumerate(judged) if (one or 0) > DOUBTFUL * (errors[at] or 0)
                ]
                squares = statistic.diagonal()
                solved, replaced = checked(
                    self.method, weights, solved, squares, patterns, held_out, doubtful
                )
                for at in replaced:
                    corrected[at] = False
                    [stored[at]] = self._stored([layers[at]], [solved.weights[at]])
                    errors[at] = relative_error(weights[at], stored[at], statistic)
                    judged[at] = held_out.error(weights[at], stored[at])
        if self.report.propagation == "block":
            self._waiting.append((layers, stored))
        else:
            self._assign(layers, stored)
        precision = None if solved.dtype is None else dtype_name(solved.dtype)
        grids: Sequence[Grid | Encoded | None] = solved.grids or [None] * len(layers)
        results = zip(layers, solved.pruned, judged, errors, grids, corrected, strict=True)
        for layer, pruned, error, fitted, grid, kept_correction in results:
            rows, columns = layer.shape
            if grid is not None and layer.whole_matrix:
                self.report.grids[layer.parameter_name] = grid
            self.report.layers.append(
                LayerReport(
                    layer.name,
                    rows,
                    columns,
                    pruned,
                    pruned / (rows * columns),
                    error,
                    solved.damping,
                    precision,
                    solved.dead,
                    tokens,
                    None if grid is None else grid.bits,
                    grid.name if isinstance(grid, Encoded) else None,
                    shrinkage,
                    fitted,
                    held_out is not None and held_out.judges,
                    kept_correction,
                )
            )


@contextmanager
def _at_work(device: torch.device) -> Iterator[None]:
    """Compute the same bytes whatever torch settings the caller uses."""
    off = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(), reproducible(device), off:
        yield


def _check_finite(layers: list[Prunable], otherwise: str, inputs: Sequence[Tensor] = ()) -> None:
    """Refuse non-finite weights or input statistics, with one device synchronisation."""
    weights = [layer.view() for layer in layers]
    ends = [torch.stack(torch.aminmax(value)).float() for value in (*weights, *inputs)]
    finite = torch.stack(ends).isfinite().all(1).tolist()
    if all(finite):
        return
    number = finite.index(False)
    what = otherwise if number < len(layers) else "its inputs are not finite"
    half = weights[0].dtype == torch.float16
    hint = ": float16 may overflow, use --dtype bfloat16 or float32" if half else ""
    raise SolverError(f"{layers[number % len(layers)].name}: {what}{hint}")
