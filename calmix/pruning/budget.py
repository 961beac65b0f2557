"""How a prune stays within so much memory: which micro-batches stay paused, what is overlapped.

Pure arithmetic over sizes. A prune block by block holds

    what the process holds before it begins
    one block's weights, another's being read and another's being written
    what is outside the blocks, until the first hidden states are made
    the solver's work on the widest input
    one micro-batch running through a block, and the activations of those that are paused
    hidden states between two blocks, as far as there is room

Those for which there is none lie in a file. What a block's activations and the solver take is ours,
fitted to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from calmix.errors import InputError
from calmix.pruning.experts import EXPERT_BYTES
from calmix.pruning.gram import ENTRIES
from calmix.pruning.methods import Method

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
AT_ONCE = 64  # bytes an entry of the rows that a solver on an accelerator works on at a time
HELD = 2  # hidden states at a time: while some are written, the next ones are made
SLACK = 0.05  # of the budget, for the allocator's rounding


@dataclass(frozen=True)
class Sizes:
    """What decides the memory a prune takes.

    Attributes:
        block_bytes: weights of the largest block.
        copies: how often a block's weights are kept beside: for another target, or to be merged.
        outside_bytes: weights outside the blocks, the output head excepted.
        layers: (outputs, inputs) of the linear maps of one block, experts apart.
        experts: those of one expert, of one of each mixture; `expert_count` has how many are like
            it.
        hidden: values a token between two blocks, each of `value_bytes`.
        rows, length: calibration rows and their tokens; 0 without calibration.
        value_bytes: bytes of a weight and of an activation.
        methods: of all targets.
        accelerator: whether the work is done on a device that is no CPU.
    """

    block_bytes: int
    copies: int
    outside_bytes: int
    layers: Sequence[tuple[int, int]]
    hidden: int
    rows: int
    length: int
    value_bytes: int
    methods: Sequence[Method]
    accelerator: bool = False
    experts: Sequence[tuple[int, int]] = ()
    expert_count: int = 0

    @property
    def inner(self) -> int:
        """Width of the widest input."""
        return max(columns for _, columns in (*self.layers, *self.experts))


@dataclass(frozen=True)
class Plan:
    """What a prune does to stay within its budget.

    Attributes:
        micro_tokens: tokens that run through a block at a time.
        paused: micro-batches that may stay paused; None for all.
        overlap: whether blocks are read and written while another is pruned.
        needed: bytes at the peak.
        expert_bytes: bytes that statistics of experts take at a time.
        states: bytes that hidden states take, a second time while they are written.
    """

    micro_tokens: int
    paused: int | None
    overlap: bool
    needed: int
    expert_bytes: int = EXPERT_BYTES
    states: int = 0


def parse_memory(text: str) -> int:
    """Return bytes from `6GiB`, `512MB` or `8000000000`.

    Raises:
        InputError: the text is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    value = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if value < 1:
        raise InputError(f"'{text}' is no amount of memory: write 6GiB, 512MB or bytes")
    return int(value)


def solver_bytes(sizes: Sizes) -> int:
    """Return the most memory a solver takes: all layers of one width may share an input.

    On an accelerator it works on more rows at a time.
    """
    most = 0
    for layers in (sizes.layers, sizes.experts):
        for width in {columns for _, columns in layers}:
            rows = [rows for rows, columns in layers if columns == width]
            wide = AT_ONCE * min(ENTRIES, width * max(rows)) if sizes.accelerator else 0
            found = (m.memory(width, sum(rows)) for m in sizes.methods)
            most = max([most, *(held + wide for held in found)])
    return most


def one_expert_bytes(sizes: Sizes) -> int:
    """Return what the statistics of one expert's widest input take, its own and that of all."""
    kinds = [method.needs for method in sizes.methods]
    held = [2 * kind.memory(width) for kind in kinds if kind for _, width in sizes.experts]
    return max(held, default=0)


def statistics_bytes(sizes: Sizes) -> int:
    """Return what the statistics of a whole block take, one a layer at most."""
    kinds = [method.needs for method in sizes.methods]
    held = [sum(kind.memory(width) for _, width in sizes.layers) for kind in kinds if kind]
    return max(held, default=0)


def micro_bytes(sizes: Sizes, tokens: int) -> int:
    """Return what one micro-batch takes while it runs through a block."""
    return 3 * tokens * (3 * sizes.hidden + 3 * sizes.inner) * sizes.value_bytes


def paused_bytes(sizes: Sizes, tokens: int) -> int:
    """Return what one micro-batch holds while it waits in a block."""
    return tokens * (3 * sizes.hidden + 2 * sizes.inner) * sizes.value_bytes


def states_bytes(sizes: Sizes) -> int:
    """Return what the hidden states between two blocks take, those of all targets."""
    own = sum(method.needs is not None for method in sizes.methods)
    return own * sizes.rows * sizes.length * sizes.hidden * sizes.value_bytes


def make_plan(
    sizes: Sizes,
    budget: int,
    held: int,
    micro_tokens: int,
    *,
    sequential: bool,
    fixed: bool = False,
) -> Plan:
    """Return how to prune within a budget.

    What a process holds is rounded up to a quarter of a GiB, so that the same budget gives the
    same plan: the size of a micro-batch decides how sums round. Fewer paused micro-batches and
    no overlap change no number, so they come first.

    Args:
        sizes: of the model and its calibration set.
        budget: bytes the process may hold.
        held: bytes it holds already, without any weights.
        micro_tokens: tokens that run through a block at a time, at most; one row at least.
        sequential: whether micro-batches pause within a block.
        fixed: whether a micro-batch has to be as large as it may be.

    Raises:
        InputError: the budget cannot hold one block with one micro-batch of the least size at
            work.
    """
    room = int((1 - SLACK) * budget)
    held = -(-held // (GIB // 4)) * (GIB // 4)
    expert = one_expert_bytes(sizes)
    solver = solver_bytes(sizes) + expert
    if not sequential:  # a block's statistics are summed together
        solver += statistics_bytes(sizes)
    at_once = max(1, micro_tokens // sizes.length) if sizes.length else 1
    while True:
        tokens = at_once * sizes.length
        running = micro_bytes(sizes, tokens)
        first = held + sizes.block_bytes + sizes.outside_bytes + running
        wanted = -(-sizes.rows // at_once) if sequential else 0
        each = max(1, paused_bytes(sizes, tokens))
        found: list[Plan] = []
        for copies in (3, 1):
            weights = (copies + sizes.copies) * sizes.block_bytes
            least = held + weights + max(solver, running)
            if max(first, least) <= room:
                # Several experts at a time save a replay of those that do not stay paused.
                more = min(EXPERT_BYTES, sizes.expert_count * expert, (room - least) // 2)
                paused = min(wanted, (room - least - more) // each)
                needed = max(first, least + more + paused * each)
                limit = None if paused == wanted else paused
                states = min(states_bytes(sizes), (room - needed) // HELD)
                needed += HELD * states
                found.append(Plan(tokens, limit, copies > 1, needed, max(more, expert), states))
        if found:
            return max(found, key=lambda plan: wanted if plan.paused is None else plan.paused)
        if fixed or at_once == 1:
            needed = int(max(first, least) / (1 - SLACK)) + 1
            raise InputError(
                f"{budget / GIB:.2f} GiB of memory cannot hold one block at work: "
                f"{needed / GIB:.2f} GiB are needed ({sizes.block_bytes / GIB:.2f} for its "
                f"weights, {solver / GIB:.2f} for the solver, {held / GIB:.2f} for the program)"
            )
        at_once //= 2
