"""What a recovery takes: pure arithmetic over sizes, told before it starts.

    trained weights     float32 master, gradient and two moments (16 bytes), and the gradient in
                        the type of the modules on its way there
    weights as computed with, all of them or one block's
    the widest chunk of logits, five of it in float32
    activations of one micro-batch: of all blocks, or of one and the states between blocks

How many bytes of activations a token leaves in a block is ours, fitted to what PyTorch keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from calmix.errors import InputError
from calmix.pruning.budget import GIB
from calmix.recovery.losses import CHUNK

PASSING = 2  # blocks' activations that come and go while one runs


@dataclass(frozen=True)
class Sizes:
    """What decides the memory.

    Attributes:
        weights: of the whole model.
        trained: weights that are trained at a time.
        blocks, hidden: number of blocks, and width between them.
        widths: inputs and outputs of all linear maps of a block together.
        vocabulary: width of the logits.
        tokens: of a micro-batch.
        value_bytes: bytes of a weight and an activation as computed with.
    """

    weights: int
    trained: int
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
    logits = 5 * 4 * min(max(CHUNK, 16 * sizes.vocabulary), sizes.tokens * sizes.vocabulary)
    return (
        sizes.weights * sizes.value_bytes
        + optimiser_bytes(sizes)
        + between
        + kept * block_activations(sizes)
        + logits
    )


def blocks_bytes(sizes: Sizes, outside: int) -> int:
    """Return what recovery of one block at a time takes beside the program.

    Args:
        sizes: of the largest block.
        outside: bytes of what is outside the blocks, while the first states are made.
    """
    # The block, both models' next ones that are read meanwhile, and the best weights so far.
    weights = sizes.trained * (3 * sizes.value_bytes + 4)
    working = weights + optimiser_bytes(sizes) + (1 + 2 * PASSING) * block_activations(sizes)
    return max(working, outside + sizes.trained * sizes.value_bytes)


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
