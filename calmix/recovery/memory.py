"""What a recovery takes: arithmetic over sizes, so that it is known before it starts.

    trained weights     float32 master, gradient and two moments (16 bytes), and the gradient in
                        the type of the modules on its way there
    weights as computed with, all of them or one block's
    the widest chunk of logits, five of it in float32
    activations of one micro-batch: of all blocks, or of one and the states between blocks

How many bytes of activations a token leaves in a block is ours, fitted to what PyTorch keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from calmix.errors import InputError
from calmix.models.blocks import experts_per_token
from calmix.models.streaming import StreamedModel
from calmix.pruning.budget import GIB
from calmix.pruning.trace import token_bytes
from calmix.recovery.training import trained_names

PASSING = 2  # blocks' activations that come and go while one runs
CHUNK = 2**23  # logits of one model held at a time
LEAST = 128  # tokens, whatever the vocabulary: of fewer, reading the head outweighs its product
BEHIND = 3 * GIB // 8  # what a process holds more once it has pruned: kernels, and what they keep


@dataclass(frozen=True)
class Plan:
    """What a recovery does to stay within its memory, and the bytes it takes beside the program.

    `rows` run at a time, which decides how sums round. `sparing` costs time and changes no number:
    no block is read ahead, or (distill) blocks run anew on the way back.
    """

    rows: int
    sparing: bool
    needed: int


def make_plan(
    model: StreamedModel,
    method: str,
    dtype: torch.dtype,
    length: int,
    rows: Sequence[int],
    room: float,
) -> Plan:
    """Return the first plan that takes no more than `room` bytes, or the one that takes least.

    `rows` of `length` tokens may run at a time, the most first.
    """
    blocks, own, size = model.blocks, model.parameters, dtype.itemsize
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    hidden = token_bytes(model.model, blocks) // size
    largest = blocks.sizes.index(max(blocks.sizes))
    chosen = experts_per_token(model.model.config)
    # The inputs and outputs of the linear maps in a block that a token goes through.
    widths = sum(
        sum(layer.shape)
        for layer in blocks.prunables(largest)
        if layer.expert is None or layer.expert < chosen
    )
    weights = sum(p.numel() for p in own.values()) * size
    outside = model.outside_bytes() // model.dtype.itemsize * size
    trained = sum(p.numel() for p in blocks.blocks[largest].parameters())
    if method == "distill":
        trained = sum(own[name].numel() for name in trained_names(model.model))

    def needed(tokens: int, sparing: bool) -> int:
        activations = tokens * (6 * hidden + widths) * size
        optimiser = trained * (16 + size)
        if method == "blocks":
            # The block, its best weights so far, and both models' next ones unless sparing.
            held = trained * (2 if sparing else 4) * size
            first = outside + trained * size  # of the first states
            return max(first, held + optimiser + (1 + 2 * PASSING) * activations)
        between = len(blocks) * tokens * hidden * size
        kept = PASSING + (1 if sparing else len(blocks))
        logits = 5 * 4 * min(max(CHUNK, LEAST * vocabulary), tokens * vocabulary)
        return weights + optimiser + between + kept * activations + logits

    plans = [
        Plan(count, sparing, needed(count * length, sparing))
        for count in rows
        for sparing in (False, True)
    ]
    return min(plans, key=lambda plan: max(0, plan.needed - room))


def check_memory(needed: int, held: int, most: int | None, free: int) -> str:
    """Return the line that says what is needed beside what the program has `held`.

    More than `most` is an InputError; without it what is `free` is not enforced.
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
