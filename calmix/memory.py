"""The memory of every activity, computed from sizes before it starts, and what fits in it at once.

Pruning block by block holds

    the process's memory before it starts
    one block's weights, and those of the next being read
    the weights outside the blocks, until the first hidden states are computed
    the solver's workspace for the widest input
    the weights outside the blocks again, if embeddings are rounded at the end
    one micro-batch running through a block, and the activations of paused ones
    hidden states between two blocks, and with targets from the dense model its states and its
    layers' inputs in one block, as far as there is room; the rest are in files

and to weigh tokens before that

    the weights outside the blocks, the head's too, with a block's or with the logits of a few
    positions and their gradient
    the gradient at one block's outputs

A recovery holds

    trained weights     float32 master, gradient and two moments (16 bytes), and the gradient in
                        the compute type before it is converted
    weights in the compute type, all of them or one block's
    the widest chunk of logits, five float32 copies
    activations of one micro-batch: of all blocks, or of one and the states between blocks

A model that writes text holds keys, values, logits and the sampler's tensors of every row.

The formulas for activations and solvers were fitted to the engine, and to what PyTorch keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import psutil
import torch
from torch import nn
from torch.func import functional_call

from calmix.errors import InputError
from calmix.machine import host_memory, tokens_at_once
from calmix.models.blocks import (
    DecoderBlocks,
    decoder_of,
    experts_per_token,
    first_tensor,
    outer_layers,
)
from calmix.models.streaming import StreamedModel

T = TypeVar("T")

GIB = 2**30
MEMORY_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
FREE_SHARE = 0.8  # of the free memory, used without a budget
SLACK = 0.05  # fraction of the budget of pruning, for the allocator's rounding
WORKSPACE = GIB // 2  # of libraries on an accelerator: buffers and loaded kernels
KERNEL_BYTES = GIB // 16  # of oneDNN on a CPU; the command line bounds their number
BEHIND = 3 * GIB // 8  # extra memory of a process that has pruned: kernels and their buffers

LAYER_ENTRIES = 2**25  # of a layer processed at a time on an accelerator, to launch few kernels
AT_ONCE = 64  # bytes per entry of the rows an accelerator's solver processes at a time
EXPERT_BYTES = 2**30  # for statistics of experts at a time
PROGRAM = 0.6e9  # bytes of Python, torch and transformers without any weights
ROUNDED_AT_ONCE = 2**23  # weights of an embedding rounded at a time
ROUNDING_BYTES = 40  # bytes for each of them
LOGIT_POSITIONS = 128  # whose logits are in memory at a time; of fewer, reading the head dominates
LOGIT_COPIES = 5  # of logits and their gradient, in the model's type: 3.3 measured, 5.2 if capped
STORED = 4 * 2**30  # bytes of hidden states of all blocks, stored at a time to weigh tokens
LOGITS_AT_ONCE = 2**23  # logits of one model held at a time in recovery, or more
PASSING = 2  # temporary activations while a block runs, in blocks


def device_memory(device: torch.device) -> tuple[int, int, int | None]:
    """Return a device's memory in bytes: used by this process, still available to it, and total;
    None for the total where memory can be swapped."""
    if device.type not in ("cuda", "xpu"):
        return psutil.Process().memory_info().rss, host_memory()[0], None
    backend = torch.get_device_module(device)
    free, total = backend.mem_get_info(device)
    in_use = backend.memory_allocated(device)
    return in_use, free + backend.memory_reserved(device) - in_use, total


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory; backends share no exception class."""
    known = any(part in str(error) for part in ("out of memory", "ALLOC_FAILED", "allocate memory"))
    return known or isinstance(error, torch.OutOfMemoryError)


def parse_memory(text: str, option: str = "--max-memory") -> int:
    """Return bytes from `6GiB`, `512MB` or `8000000000`; an InputError names the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    value = float(match[1]) * MEMORY_UNITS[match[2] or ""] if match else 0
    if value < 1:
        raise InputError(f"{option} '{text}' is not a size: write 6GiB, 512MB or bytes")
    return int(value)


def fit(fixed: float, per_row: float, rows: int, room: float) -> int:
    """Return how many of the rows fit in a room, beside what is held for any number of them."""
    return max(0, min(rows, int((room - fixed) / max(1, per_row))))


def halving(
    work: Callable[[int], T], rows: int, note: Callable[[str], None] = lambda line: None
) -> tuple[int, T]:
    """Return a number of rows and the work on them; half as many whenever a device runs out of
    memory, which `note` is called to say."""
    while True:
        try:
            return rows, work(rows)
        except RuntimeError as error:
            if rows == 1 or not out_of_memory(error):
                raise
        note(f"out of memory with {rows} rows at a time: resuming with {rows // 2}")
        rows //= 2


def budgeted(device: torch.device, budget: int | None, more: int = 0) -> tuple[int, int]:
    """Return the bytes that this process uses, and the most that it may: the budget, or a share of
    what is free.

    The first has `more` added and is rounded up to a quarter of a GiB, so that the same budget
    gives the same plan: the number of rows at a time affects rounding.
    """
    resident, free, _ = device_memory(device)
    most = resident + int(FREE_SHARE * free) if budget is None else budget
    return -(-(resident + more) // (GIB // 4)) * (GIB // 4), most


@dataclass(frozen=True)
class Plan:
    """How pruning stays within its budget.

    `micro_tokens` run through a block at a time; `paused` micro-batches may stay paused, None for
    all; `overlap` reads the next block in the background; `needed` is the peak in bytes,
    `expert_bytes` and `states` the bytes for statistics of experts and hidden states, and `files`
    those of hidden states for which there is no room.
    """

    micro_tokens: int
    paused: int | None
    overlap: bool
    needed: int
    expert_bytes: int = EXPERT_BYTES
    states: int = 0
    files: int = 0


def solver_bytes(
    method: Any, layers: Sequence[tuple[int, int]], *, accelerator: bool = False
) -> int:
    """Return the maximum memory of a solver; all layers of one width may share an input.

    Args:
        method: the pruning method.
        layers: (outputs, inputs) of one block's linear maps.
        accelerator: whether the solver runs on one.
    """
    most = 0
    for width in {columns for _, columns in layers}:
        rows = [rows for rows, columns in layers if columns == width]
        wide = AT_ONCE * min(LAYER_ENTRIES, width * max(rows)) if accelerator else 0
        most = max(most, method.memory(width, sum(rows)) + wide)
    return most


def plan_pruning(
    source: StreamedModel,
    shape: Sequence[int],
    method: Any,
    *,
    budget: int | None,
    sequential: bool = True,
    rows_at_once: int = 0,
    outer: Sequence[Any] = (),
    followed: int | None = None,
    backward: bool = False,
) -> Plan:
    """Return how to prune a model within a budget or the free memory.

    Fewer paused micro-batches and no overlap change no number, so they are tried before fewer rows
    at a time.

    Args:
        source: the model.
        shape: of the calibration ids, (0, 0) without any.
        method: the pruning method, or `Look`.
        budget: bytes of the process; None for the free memory, which a CPU may exceed.
        sequential: whether pruned weights replace the dense ones before a block's end.
        rows_at_once: rows of a micro-batch in resumed work, which must not change.
        outer: the methods that may round embeddings at the end.
        followed: inputs of the widest layers that follow the dense model, whose states are kept
            too; None if they are not.
        backward: whether tokens are weighed.
    """
    blocks, (rows, length) = source.blocks, shape
    kind, block, device = method.needs, max(source.blocks.sizes), source.device
    # Bytes per token: hidden states, and the widest input.
    hidden = token_bytes(source.model, blocks) if rows else 0
    inner = solver = expert = count = states = last = read = 0
    for layers in map(blocks.prunables, range(len(blocks))):  # the widest need not be the largest
        expert_layers = [layer for layer in layers if layer.expert is not None]
        one = {layer.mixture: layer.expert for layer in expert_layers}
        dense_shapes = [layer.shape for layer in layers if layer.expert is None]
        expert_shapes = [
            layer.shape for layer in expert_layers if layer.expert == one[layer.mixture]
        ]
        count = max([count, *(1 + (layer.expert or 0) for layer in expert_layers)])
        widths = [columns * source.dtype.itemsize for _, columns in (*dense_shapes, *expert_shapes)]
        inner = max([inner, *widths])
        following = sum(columns for _, columns in dense_shapes if columns <= (followed or 0))
        read = max(read, following * source.dtype.itemsize)
        # The statistics of one expert's widest input: for its own tokens and for all.
        both = 0 if kind is None else max((2 * kind.memory(w) for _, w in expert_shapes), default=0)
        accelerator = device.type != "cpu"
        solver_sizes = [
            solver_bytes(method, some, accelerator=accelerator)
            for some in (dense_shapes, expert_shapes)
        ]
        expert, solver = max(expert, both), max(solver, max(solver_sizes) + both)
    if kind is not None:
        states = rows * length * (hidden if followed is None else 2 * hidden + read)
        if not sequential:
            solver += block
    if outer:
        largest = max(outer_layers(source.model).values(), key=lambda weight: weight.nbytes)
        last = source.outside_bytes(head=True) + largest.nbytes + ROUNDING_BYTES * ROUNDED_AT_ONCE
        last += max(one.memory(largest.shape[1], 0) for one in outer)
    begin = max(block + (source.outside_bytes() if rows else 0), last)
    if backward:
        # An accelerator takes the softmax of all of them at once, in float32.
        each = source.dtype.itemsize + (4 if device.type != "cpu" else 0)
        logits = LOGIT_POSITIONS * _vocabulary(source) * LOGIT_COPIES * each
        slopes = min(rows * length * hidden, STORED // (1 + len(blocks)))
        begin = max(begin, source.outside_bytes(head=True) + max(block, logits) + slopes)

    swaps = device_memory(device)[2] is None
    resident, most = budgeted(device, budget, KERNEL_BYTES if swaps else WORKSPACE)
    room = int((1 - SLACK) * most)
    base, row = resident + (1 + source.merges) * block, 9 * length * (hidden + inner)
    at_once = rows_at_once or max(1, tokens_at_once(device) // max(1, length))
    # On a CPU the micro-batch does not depend on the free memory, so that results do not either;
    # what does not fit is swapped.
    swaps = swaps and budget is None
    if not swaps and not rows_at_once:
        at_once = max(1, fit(max(resident + begin, base), row, at_once, room))
    tokens, running, wanted = at_once * length, at_once * row, -(-rows // at_once)
    first, busy = resident + begin + running, max(solver, running)
    # Taking several experts at a time saves restarts of unpaused micro-batches.
    statistics = min(EXPERT_BYTES, count * expert)
    if (least := max(first, base + busy)) > room:
        if swaps:
            return Plan(tokens, 0, False, max(first, base + busy + statistics), files=states)
        needed = int(least / (1 - SLACK)) + 1
        raise InputError(
            f"{most / GIB:.2f} GiB of memory cannot hold one block at work: "
            f"{needed / GIB:.2f} GiB are needed ({block / GIB:.2f} for its "
            f"weights, {solver / GIB:.2f} for the solver, {resident / GIB:.2f} for the program)"
        )
    plans: list[Plan] = []
    for overlap in (True, False):
        least = base + overlap * block + busy
        if least <= room:
            more = min(statistics, (room - least) // 2)
            each = tokens * (3 * hidden + 2 * inner)  # held while paused in a block
            paused = fit(least + more, each, wanted, room)
            needed = max(first, least + more + paused * each)
            resident = min(states, room - needed)
            needed, files = needed + resident, states - resident
            plans.append(Plan(tokens, paused, overlap, needed, max(more, expert), resident, files))
    best = max(plans, key=lambda plan: plan.paused or 0)
    return best if best.paused != wanted else replace(best, paused=None)


def plan_recovery(
    model: StreamedModel,
    length: int,
    rows: Sequence[int],
    room: float,
    trained: int | None = None,
) -> tuple[int, bool, int]:
    """Return the first plan that fits in `room` bytes, else the smallest: how many rows run at a
    time, which affects rounding, whether to spare memory, and the bytes needed beside the program.

    `rows` are the numbers of rows of `length` tokens that may run at a time, largest first;
    `trained` is the number of weights that distillation trains, None by block. To spare memory
    costs time and changes no number: blocks are not read ahead, or (distill) are recomputed in the
    backward pass.
    """
    blocks, size, vocabulary = model.blocks, model.dtype.itemsize, _vocabulary(model)
    hidden = token_bytes(model.model, blocks) // size
    largest = blocks.sizes.index(max(blocks.sizes))
    chosen = experts_per_token(model.model.config)
    # Inputs and outputs of the linear maps that a token passes in a block.
    widths = sum(
        sum(layer.shape)
        for layer in blocks.prunables(largest)
        if layer.expert is None or layer.expert < chosen
    )
    weights = sum(blocks.sizes) + model.outside_bytes(head=True)  # a tied head counts once
    block = sum(p.numel() for p in blocks.blocks[largest].parameters())

    def needed(tokens: int, sparing: bool) -> int:
        activations = tokens * (6 * hidden + widths) * size
        if trained is None:
            # The block, its best weights, and both models' next blocks unless sparing.
            weights_held = block * (2 if sparing else 4) * size
            first = model.outside_bytes() + block * size  # for the first states
            passes = (1 + 2 * PASSING) * activations
            return max(first, weights_held + block * (16 + size) + passes)
        between = len(blocks) * tokens * hidden * size
        passes = (PASSING + (1 if sparing else len(blocks))) * activations
        positions = min(max(LOGITS_AT_ONCE // vocabulary, LOGIT_POSITIONS), tokens)
        logits = 5 * 4 * positions * vocabulary
        return weights + trained * (16 + size) + between + passes + logits

    plans = [
        (count, sparing, needed(count * length, sparing))
        for count in rows
        for sparing in (False, True)
    ]
    return min(plans, key=lambda plan: max(0, plan[-1] - room))


def check_memory(needed: int, resident: int, most: int | None, free: int) -> str:
    """Return a line with the memory needed, including the `resident` bytes of the program.

    Exceeding `most` is an InputError; without it, exceeding `free` is only reported.
    """
    total = resident + needed
    if most is not None and total > most:
        raise InputError(
            f"{most / GIB:.2f} GiB of memory are not enough: {total / GIB:.2f} GiB are "
            f"needed ({needed / GIB:.2f} for weights, optimiser and activations, "
            f"{resident / GIB:.2f} for the program)"
        )
    line = f"takes about {total / GIB:.2f} GiB of memory"
    if most is None and needed > free:
        line += f", but only {free / GIB:.2f} GiB are free: it may be killed"
    return line


def plan_writing(model: Any, length: int, rows: int) -> int:
    """Return how many of the rows a model in memory can write at a time."""
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", None) or 1
    each = getattr(config, "per_layer_config", None)  # layers may differ: the widest counts
    configs = [config] if each is None else [each[index] for index in range(layers)]

    def most(key: str, otherwise: int) -> int:
        return max(getattr(layer, key, None) or otherwise for layer in configs)

    heads = most("num_attention_heads", 1)
    shared = most("num_key_value_heads", heads)
    head = most("head_dim", (getattr(config, "hidden_size", None) or 4096) // heads)
    # Half a cache extra: sliding windows are concatenated, and attention widens a layer.
    values = (3 * layers * shared + 2 * heads) * head * length
    needed = values * model.dtype.itemsize + 6 * 4 * int(config.vocab_size)
    if fitting := fit(0, needed, rows, FREE_SHARE * device_memory(model.device)[1]):
        return fitting
    raise InputError(
        f"memory does not hold one row of {length} tokens beside the model: use shorter rows"
    )


def token_bytes(model: Any, blocks: DecoderBlocks) -> int:
    """Return the bytes per token of the hidden states between blocks.

    Measured by running the first block on two tokens, with zeros for weights not in memory: some
    blocks return float32 whatever their weights, and some return several streams.
    """
    decoder, block = decoder_of(model), blocks.blocks[0]
    later = {id(p) for other in blocks.blocks[1:] for p in other.parameters()}
    none = {
        name: torch.zeros_like(p, device="cpu")
        for name, p in decoder.named_parameters()
        if p.is_meta and id(p) not in later
    }
    first = next(block.parameters())
    ids = torch.zeros(1, 2, dtype=torch.int64, device="cpu" if first.is_meta else first.device)
    sizes: list[int] = []

    def stop(module: nn.Module, args: Any, result: Any) -> None:
        sizes.append(first_tensor(result).nbytes)
        raise StopIteration  # the rest need not run

    # If this fails for any reason, the configuration is used instead.
    with block.register_forward_hook(stop), suppress(Exception), torch.no_grad():
        functional_call(decoder, none, kwargs={"input_ids": ids, "use_cache": False})
    if sizes:
        return sizes[0] // ids.numel()
    width = blocks.width or max(layer.shape[1] for layer in blocks.prunables(0, every=True))
    return width * first.element_size()


def _vocabulary(source: StreamedModel) -> int:
    """Return the number of rows of the output head, 0 without one."""
    weight = getattr(source.model.get_output_embeddings(), "weight", None)
    return 0 if weight is None else int(weight.shape[0])
