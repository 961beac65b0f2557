"""The memory plan of pruning: how many micro-batches stay paused, and whether to read ahead.

Pruning block by block holds

    the process's memory before it starts
    one block's weights, and those of the next being read
    the weights outside the blocks, until the first hidden states are computed
    the solver's workspace for the widest input
    the weights outside the blocks again, if embeddings are rounded at the end
    one micro-batch running through a block, and the activations of paused ones
    hidden states between two blocks, and with targets from the dense model its states and its
    layers' inputs in one block, as far as there is room; the rest are in files

The formulas for activations and solver were fitted to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from calmix.errors import InputError
from calmix.machine import device_memory, tokens_at_once
from calmix.models.blocks import outer_weights
from calmix.models.streaming import StreamedModel
from calmix.options import BITS_METHOD
from calmix.pruning.engine import ROUNDED_AT_ONCE
from calmix.pruning.experts import EXPERT_BYTES
from calmix.pruning.gram import LAYER_ENTRIES
from calmix.pruning.held_out import may_move
from calmix.pruning.methods import Method, get_method
from calmix.pruning.trace import token_bytes

GIB = 2**30
MEMORY_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
AT_ONCE = 64  # bytes per entry of the rows an accelerator's solver processes at a time
SLACK = 0.05  # fraction of the budget, for the allocator's rounding
FREE_SHARE = 0.9  # of the free memory, used without a budget
ROUNDING_BYTES = 40  # bytes per weight of an embedding rounded at a time
WORKSPACE = GIB // 2  # of libraries on an accelerator: buffers and loaded kernels
KERNELS = GIB // 16  # of oneDNN on a CPU; the command line bounds their number


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


def parse_memory(text: str, option: str = "--max-memory") -> int:
    """Return bytes from `6GiB`, `512MB` or `8000000000`; an InputError names the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    value = float(match[1]) * MEMORY_UNITS[match[2] or ""] if match else 0
    if value < 1:
        raise InputError(f"{option} '{text}' is not a size: write 6GiB, 512MB or bytes")
    return int(value)


def solver_bytes(
    method: Method, layers: Sequence[tuple[int, int]], *, accelerator: bool = False
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


def plan_for(
    source: StreamedModel,
    shape: Sequence[int],
    method: Method,
    *,
    budget: int | None,
    sequential: bool = True,
    rows_at_once: int = 0,
    embeddings: bool = False,
    dense_targets: bool = False,
) -> Plan:
    """Return how to prune a model within a budget or the free memory.

    The process's memory is rounded up to a quarter of a GiB, so that the same budget gives the same
    plan: the micro-batch size affects rounding. Fewer paused micro-batches and no overlap change no
    number, so they are tried first.

    Args:
        source: the model.
        shape: of the calibration ids, (0, 0) without any.
        method: the pruning method, or `Look`.
        budget: bytes of the process; None for the free memory, which a CPU may exceed.
        sequential: whether pruned weights replace the dense ones before a block's end.
        rows_at_once: rows of a micro-batch in resumed work, which must not change.
        embeddings: whether embeddings are rounded at the end.
        dense_targets: whether the dense model's states are kept too.
    """
    blocks, (rows, length) = source.blocks, shape
    kind, sizes = method.needs, blocks.sizes
    block, device = max(sizes), source.device
    accelerator = device.type != "cpu"
    # Bytes per token: hidden states, and the widest input.
    hidden = token_bytes(source.model, blocks) if rows else 0
    inner = solver = expert = count = states = last = read = 0
    for layers in map(blocks.prunables, range(len(blocks))):  # the widest need not be the largest
        inside = [layer for layer in layers if layer.expert is not None]
        one = {layer.mixture: layer.expert for layer in inside}
        alone = [layer.shape for layer in layers if layer.expert is None]
        experts = [layer.shape for layer in inside if layer.expert == one[layer.mixture]]
        count = max([count, *(1 + (layer.expert or 0) for layer in inside)])
        widths = [columns * source.dtype.itemsize for _, columns in (*alone, *experts)]
        followed = [columns for _, columns in alone if may_move(columns, rows * length)]
        inner = max([inner, *widths])
        read = max(read, sum(followed) * source.dtype.itemsize)
        # The statistics of one expert's widest input: for its own tokens and for all.
        both = 0 if kind is None else max((2 * kind.memory(w) for _, w in experts), default=0)
        taken = [solver_bytes(method, some, accelerator=accelerator) for some in (alone, experts)]
        expert, solver = max(expert, both), max(solver, max(taken) + both)
    if kind is not None:
        states = rows * length * (2 * hidden + read if dense_targets else hidden)
        if not sequential:
            solver += block
    if embeddings:
        largest = max(outer_weights(source.model), key=lambda weight: weight.nbytes)
        last = source.outside_bytes(head=True) + largest.nbytes + ROUNDING_BYTES * ROUNDED_AT_ONCE
        last += max(one.memory(largest.shape[1], 0) for one in (get_method(BITS_METHOD), method))
    begin = max(block + (source.outside_bytes() if rows else 0), last)

    resident, free, total = device_memory(device)
    swaps = total is None
    most = resident + int(FREE_SHARE * free) if budget is None else budget
    resident += KERNELS if swaps else WORKSPACE
    room, resident = int((1 - SLACK) * most), -(-resident // (GIB // 4)) * (GIB // 4)
    # On a CPU the micro-batch does not depend on the free memory, so that results do not either;
    # what does not fit is swapped.
    swaps = swaps and budget is None
    at_once = rows_at_once or max(1, tokens_at_once(device) // max(1, length))
    while True:
        tokens = at_once * length
        running = 9 * tokens * (hidden + inner)
        first = resident + begin + running
        wanted = -(-rows // at_once)
        each = max(1, tokens * (3 * hidden + 2 * inner))  # held while paused in a block
        plans: list[tuple[int, Plan]] = []
        for overlap in (True, False):
            least = resident + (1 + overlap + source.merges) * block + max(solver, running)
            if max(first, least) <= room:
                # Taking several experts at a time saves restarts of unpaused micro-batches.
                more = min(EXPERT_BYTES, count * expert, (room - least) // 2)
                paused = min(wanted, (room - least - more) // each)
                needed = max(first, least + more + paused * each)
                in_memory = min(states, room - needed)
                limit = None if paused == wanted else paused
                plan = Plan(
                    tokens,
                    limit,
                    overlap,
                    needed + in_memory,
                    max(more, expert),
                    in_memory,
                    states - in_memory,
                )
                plans.append((paused, plan))
        if plans:
            return max(plans, key=lambda one: one[0])[1]
        if swaps:
            needed = max(first, least + min(EXPERT_BYTES, count * expert))
            return Plan(tokens, 0, False, needed, files=states)
        if rows_at_once or at_once == 1:
            needed = int(max(first, least) / (1 - SLACK)) + 1
            raise InputError(
                f"{most / GIB:.2f} GiB of memory cannot hold one block at work: "
                f"{needed / GIB:.2f} GiB are needed ({block / GIB:.2f} for its "
                f"weights, {solver / GIB:.2f} for the solver, {resident / GIB:.2f} for the program)"
            )
        at_once //= 2
