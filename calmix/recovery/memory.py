"""The memory plan of a recovery, computed from sizes before it starts.

    trained weights     float32 master, gradient and two moments (16 bytes), and the gradient in
                        the compute type before it is converted
    weights in the compute type, all of them or one block's
    the widest chunk of logits, five float32 copies
    activations of one micro-batch: of all blocks, or of one and the states between blocks

The formula for activation bytes per token was fitted to what PyTorch keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

from calmix.errors import InputError
from calmix.models.blocks import experts_per_token
from calmix.models.streaming import StreamedModel
from calmix.pruning.budget import GIB
from calmix.pruning.trace import token_bytes
from calmix.recovery.training import trained_parameters

PASSING = 2  # temporary activations while a block runs, in blocks
LOGITS_AT_ONCE = 2**23  # logits of one model held at a time
CHUNK_TOKENS = 128  # minimum tokens per chunk: with fewer, reading the head dominates
BEHIND = 3 * GIB // 8  # extra memory of a process that has pruned: kernels and their buffers


def make_plan(
    model: StreamedModel,
    method: str,
    length: int,
    rows: Sequence[int],
    room: float,
) -> tuple[int, bool, int]:
    """Return the first plan that fits in `room` bytes, else the smallest: how many rows run at a
    time, which affects rounding, whether to spare memory, and the bytes needed beside the program.

    `rows` are the numbers of rows of `length` tokens that may run at a time, largest first. To
    spare memory costs time and changes no number: blocks are not read ahead, or (distill) are
    recomputed in the backward pass.
    """
    blocks, size = model.blocks, model.dtype.itemsize
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
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
    outside = model.outside_bytes()
    learning = blocks.blocks[largest].parameters()
    if method == "distill":
        learning = trained_parameters(model.model).values()
    trained = sum(p.numel() for p in learning)

    def needed(tokens: int, sparing: bool) -> int:
        activations = tokens * (6 * hidden + widths) * size
        optimiser = trained * (16 + size)
        if method == "blocks":
            # The block, its best weights, and both models' next blocks unless sparing.
            weights_held = trained * (2 if sparing else 4) * size
            first = outside + trained * size  # for the first states
            return max(first, weights_held + optimiser + (1 + 2 * PASSING) * activations)
        between = len(blocks) * tokens * hidden * size
        passes = PASSING + (1 if sparing else len(blocks))
        logits = 5 * 4 * min(max(LOGITS_AT_ONCE, CHUNK_TOKENS * vocabulary), tokens * vocabulary)
        return weights + optimiser + between + passes * activations + logits

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
