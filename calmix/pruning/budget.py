"""How pruning stays within so much memory: which micro-batches stay paused, what is read ahead.

Pruning block by block holds

    what the process holds before it begins
    one block's weights, and another's being read
    what is outside the blocks, until the first hidden states are made
    the solver's work on the widest input
    what is outside the blocks once more, where embeddings are rounded at the end
    one micro-batch running through a block, and the activations of those that are paused
    hidden states between two blocks, as far as there is room

Those for which there is none lie in a file. What a block's activations and the solver take is ours,
fitted to the engine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from calmix.errors import InputError
from calmix.machine import device_memory, tokens_at_once
from calmix.models.blocks import outer_weights
from calmix.models.streaming import StreamedModel
from calmix.options import BITS_METHOD
from calmix.pruning import distributed
from calmix.pruning.engine import ROUNDED
from calmix.pruning.experts import EXPERT_BYTES
from calmix.pruning.gram import ENTRIES
from calmix.pruning.methods import Method, get_method
from calmix.pruning.trace import token_bytes

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
AT_ONCE = 64  # bytes an entry of the rows that a solver on an accelerator works on at a time
SLACK = 0.05  # of the budget, for the allocator's rounding
FREE_SHARE = 0.9  # of the memory that is free, where no budget is given
ROUNDING = 40  # bytes a weight of what is rounded at a time
WORKSPACE = GIB // 2  # that libraries take on an accelerator beside tensors, and what they load
KERNELS = GIB // 16  # that oneDNN's take on a CPU; the command line bounds their number


@dataclass(frozen=True)
class Sizes:
    """What decides the memory that pruning takes.

    `block_bytes` are the weights of the largest block, `copies` how often they are kept beside (to
    be merged), `outside_bytes` the weights outside the blocks without the output head. `layers` are
    (outputs, inputs) of one block's linear maps; `experts` those of one expert of each mixture, of
    which there are `expert_count`. `last_bytes` are held once all blocks are done. `hidden` values
    a token lie between two blocks, each of `value_bytes`; `rows` and `length` are 0 without
    calibration.
    """

    block_bytes: int
    copies: int
    outside_bytes: int
    layers: Sequence[tuple[int, int]]
    hidden: int
    rows: int
    length: int
    value_bytes: int
    method: Method
    accelerator: bool = False
    experts: Sequence[tuple[int, int]] = ()
    expert_count: int = 0
    last_bytes: int = 0

    @property
    def inner(self) -> int:
        """Width of the widest input."""
        return max(columns for _, columns in (*self.layers, *self.experts))


@dataclass(frozen=True)
class Plan:
    """What pruning does to stay within its budget.

    `micro_tokens` run through a block at a time; `paused` micro-batches may stay paused, None for
    all; `overlap` reads the next block beside the work; `needed` are the bytes at the peak,
    `expert_bytes` and `states` those that statistics of experts and hidden states may take.
    """

    micro_tokens: int
    paused: int | None
    overlap: bool
    needed: int
    expert_bytes: int = EXPERT_BYTES
    states: int = 0


def parse_memory(text: str, what: str = "") -> int:
    """Return bytes from `6GiB`, `512MB` or `8000000000`; an InputError says of `what`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    value = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if value < 1:
        named = f"{what} '{text}' is no size" if what else f"'{text}' is not an amount of memory"
        raise InputError(f"{named}: write 6GiB, 512MB or bytes")
    return int(value)


def solver_bytes(sizes: Sizes) -> int:
    """Return the most memory a solver takes: all layers of one width may share an input."""
    most = 0
    for layers in (sizes.layers, sizes.experts):
        for width in {columns for _, columns in layers}:
            rows = [rows for rows, columns in layers if columns == width]
            wide = AT_ONCE * min(ENTRIES, width * max(rows)) if sizes.accelerator else 0
            most = max(most, sizes.method.memory(width, sum(rows)) + wide)
    return most


def micro_bytes(sizes: Sizes, tokens: int) -> int:
    """Return what one micro-batch takes while it runs through a block."""
    return 3 * tokens * (3 * sizes.hidden + 3 * sizes.inner) * sizes.value_bytes


def paused_bytes(sizes: Sizes, tokens: int) -> int:
    """Return what one micro-batch holds while it waits in a block."""
    return tokens * (3 * sizes.hidden + 2 * sizes.inner) * sizes.value_bytes


def make_plan(
    sizes: Sizes,
    budget: int,
    held: int,
    micro_tokens: int,
    *,
    sequential: bool,
    fixed: bool = False,
) -> Plan:
    """Return how to prune within a budget, where a process holds so much without any weights.

    What it holds is rounded up to a quarter of a GiB, so that the same budget gives the same plan:
    the size of a micro-batch, `micro_tokens` at most if not `fixed`, decides how sums round. Fewer
    paused micro-batches and no overlap change no number, so they come first.
    """
    room = int((1 - SLACK) * budget)
    held = -(-held // (GIB // 4)) * (GIB // 4)
    kind, all_states = sizes.method.needs, 0
    # The statistics of one expert's widest input, its own and that of all.
    expert = max((2 * kind.memory(width) for _, width in sizes.experts), default=0) if kind else 0
    solver = solver_bytes(sizes) + expert
    if kind is not None:
        all_states = sizes.rows * sizes.length * sizes.hidden * sizes.value_bytes
        if not sequential:  # a block's statistics are summed together
            solver += sum(kind.memory(width) for _, width in sizes.layers)
    at_once = max(1, micro_tokens // sizes.length) if sizes.length else 1
    while True:
        tokens = at_once * sizes.length
        running = micro_bytes(sizes, tokens)
        first = held + max(sizes.block_bytes + sizes.outside_bytes, sizes.last_bytes) + running
        wanted = -(-sizes.rows // at_once) if sequential else 0
        each = max(1, paused_bytes(sizes, tokens))
        found: list[tuple[int, Plan]] = []
        for overlap in (True, False):
            weights = (1 + overlap + sizes.copies) * sizes.block_bytes
            least = held + weights + max(solver, running)
            if max(first, least) <= room:
                # Several experts at a time save a replay of those that do not stay paused.
                more = min(EXPERT_BYTES, sizes.expert_count * expert, (room - least) // 2)
                paused = min(wanted, (room - least - more) // each)
                needed = max(first, least + more + paused * each)
                states = min(all_states, room - needed)
                stay = None if paused == wanted else paused
                plan = Plan(tokens, stay, overlap, needed + states, max(more, expert), states)
                found.append((paused, plan))
        if found:
            return max(found, key=lambda one: one[0])[1]
        if fixed or at_once == 1:
            needed = int(max(first, least) / (1 - SLACK)) + 1
            raise InputError(
                f"{budget / GIB:.2f} GiB of memory cannot hold one block at work: "
                f"{needed / GIB:.2f} GiB are needed ({sizes.block_bytes / GIB:.2f} for its "
                f"weights, {solver / GIB:.2f} for the solver, {held / GIB:.2f} for the program)"
            )
        at_once //= 2


def plan_for(
    source: StreamedModel,
    shape: Sequence[int],
    method: Method,
    *,
    budget: int | None,
    sequential: bool = True,
    rows_at_once: int = 0,
    embeddings: bool = False,
) -> Plan:
    """Return how to prune a model within a budget, or within what is free now; of several processes
    all do as the one that has least.

    Args:
        source: the model.
        shape: of the calibration ids, (0, 0) without.
        method: that prunes the model, or looks at it.
        budget: bytes of each process; None for what is free, of which a CPU may take more.
        sequential: whether micro-batches pause within a block.
        rows_at_once: rows of a micro-batch of the work that is resumed, which must stay.
        embeddings: whether they are rounded at the end.
    """
    blocks, (rows, length), world = source.blocks, shape, distributed.processes()[1]
    pruned = [index for index in range(len(blocks)) if blocks.prunables(index)]
    layers = blocks.prunables(max(pruned, key=blocks.sizes.__getitem__))
    inside = [layer for layer in layers if layer.expert is not None]
    one = {layer.mixture: layer.expert for layer in inside}
    last = 0
    if embeddings:
        largest = max(outer_weights(source.model), key=lambda weight: weight.nbytes)
        last = source.outside_bytes(head=True) + largest.nbytes + ROUNDING * ROUNDED
        last += get_method(BITS_METHOD).memory(largest.shape[1], 0)
    sizes = Sizes(
        block_bytes=max(blocks.sizes),
        copies=source.merges,
        outside_bytes=source.outside_bytes() if rows else 0,
        last_bytes=last,
        layers=[layer.shape for layer in layers if layer.expert is None],
        experts=[layer.shape for layer in inside if layer.expert == one[layer.mixture]],
        expert_count=max((layer.expert or 0 for layer in inside), default=-1) + 1,
        hidden=token_bytes(source.model, blocks) // source.dtype.itemsize if rows else 0,
        rows=-(-rows // world),
        length=length,
        value_bytes=source.dtype.itemsize,
        method=method,
        accelerator=source.device.type != "cpu",
    )
    held, free, total = device_memory(source.device)
    swaps = total is None
    if swaps and world > 1:  # memory that processes here share, as they do not a device
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", world))
    room = min(distributed.everyone(held + int(FREE_SHARE * free) if budget is None else budget))
    held = max(distributed.everyone(held + (KERNELS if swaps else WORKSPACE)))
    at_once = rows_at_once * length or tokens_at_once(source.device)
    # On a CPU the micro-batch is the same whatever happens to be free, so that no number depends
    # on the moment; what does not fit is swapped.
    swaps = swaps and budget is None
    fixed = rows_at_once > 0 or swaps
    try:
        return make_plan(sizes, room, held, at_once, sequential=sequential, fixed=fixed)
    except InputError:
        if not swaps:
            raise
    whole = make_plan(sizes, 2**62, held, at_once, sequential=sequential, fixed=True)
    return Plan(whole.micro_tokens, 0 if sequential else None, False, whole.needed)
