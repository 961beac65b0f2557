"""What a recovery takes: pure arithmetic over sizes, told before it starts.

    trained weights     float32 master, gradient and two moments (16 bytes), and the gradient in
                        the type of the modules on its way there
    weights as computed with, all of them or one block's
    the widest chunk of logits, five of it in float32
    activations of one micro-batch: of all blocks, or of one and the states between blocks

How many bytes of activations a token leaves in a block is ours, fitted to what PyTorch keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calmix.errors import InputError
from calmix.pruning.budget import GIB
from calmix.recovery.losses import CHUNK, LEAST

PASSING = 2  # blocks' activations that come and go while one runs
BEHIND = 3 * GIB // 8  # what a process holds more once it has pruned: kernels, and what they keep


@dataclass(frozen=True)
class Sizes:
    """What decides the memory.

    Attributes:
        weights: of the whole model.
        trained: weights that are trained at a time.
        outside: weights that are outside the blocks.
        blocks, hidden: number of blocks, and width between them.
        widths: inputs and outputs of all linear maps of a block together.
        vocabulary: width of the logits.
        tokens: of a micro-batch.
        value_bytes: bytes of a weight and an activation as computed with.
    """

    weights: int
    trained: int
    outside: int
    blocks: int
    hidden: int
    widths: int
    vocabulary: int
    tokens: int
    value_bytes: int


def block_activations(sizes: Sizes) -> int:
    """Return what one micro-batch leaves in a block for the way back."""
    return sizes.tokens * (6 * sizes.hidden + sizes.widths) * sizes.value_bytes


def optimiser_bytes(sizes: Sizes) -> int:
    """Return masters, gradients and moments."""
    return sizes.trained * (16 + sizes.value_bytes)


def distill_bytes(sizes: Sizes, *, recompute: bool) -> int:
    """Return what distillation takes beside the program."""
    between = sizes.blocks * sizes.tokens * sizes.hidden * sizes.value_bytes
    kept = PASSING + (1 if recompute else sizes.blocks)
    logits = 5 * 4 * min(max(CHUNK, LEAST * sizes.vocabulary), sizes.tokens * sizes.vocabulary)
    return (
        sizes.weights * sizes.value_bytes
        + optimiser_bytes(sizes)
        + between
        + kept * block_activations(sizes)
        + logits
    )


def blocks_bytes(sizes: Sizes, *, ahead: bool) -> int:
    """Return what recovery of one block at a time takes beside the program.

    Args:
        sizes: of the largest block.
        ahead: whether both models' next blocks are read meanwhile.
    """
    # The block, its best weights so far, and the next ones.
    weights = sizes.trained * (2 + 2 * ahead) * sizes.value_bytes
    working = weights + optimiser_bytes(sizes) + (1 + 2 * PASSING) * block_activations(sizes)
    first = (sizes.outside + sizes.trained) * sizes.value_bytes  # while the first states are made
    return max(working, first)


@dataclass(frozen=True)
class Plan:
    """What a recovery does to stay within its memory.

    Attributes:
        rows: that run at a time, which decides how sums round.
        sparing: blocks: none is read ahead; distill: blocks run anew on the way back. The same
            numbers in more time.
        needed: bytes beside the program.
    """

    rows: int
    sparing: bool
    needed: int


def make_plan(method: str, sizes: Sizes, length: int, rows: Sequence[int], room: float) -> Plan:
    """Return the first plan with room enough, or the one that takes least.

    Args:
        method: `distill` or `blocks`.
        sizes: of the model, whatever their `tokens`.
        length: tokens of a row.
        rows: how many may run at a time, the most first.
        room: bytes beside the program.
    """
    plan = None
    for count in rows:
        own = replace(sizes, tokens=count * length)
        for sparing in (False, True):
            if method == "blocks":
                needed = blocks_bytes(own, ahead=not sparing)
            else:
                needed = distill_bytes(own, recompute=sparing)
            if plan is None or needed < plan.needed:
                plan = Plan(count, sparing, needed)
            if needed <= room:
                return Plan(count, sparing, needed)
    assert plan is not None
    return plan


def check_memory(needed: int, held: int, most: int | None, free: int) -> str:
    """Return the line that tells what is needed.

    Args:
        needed: bytes beside the program.
        held: bytes the program holds.
        most: what the user allows; None for what is free, which is told and not enforced.
        free: bytes that are free.

    Raises:
        InputError: more is needed than the user allows.
    """
    if most is not None and held + needed > most:
        raise InputError(
            f"{most / GIB:.2f} GiB of memory are not enough: {(held + needed) / GIB:.2f} GiB are "
            f"needed ({needed / GIB:.2f} for weights, optimiser and activations, "
            f"{held / GIB:.2f} for the program)"
        )
    line = f"takes about {(held + needed) / GIB:.2f} GiB of memory"
    if most is None and needed > free:
        line += f", and {free / GIB:.2f} GiB are free: it may be killed"
    return line
