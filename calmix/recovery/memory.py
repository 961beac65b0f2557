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
from calmix.models.blocks import DecoderBlocks, experts_per_token
from calmix.models.streaming import StreamedModel
from calmix.pruning.budget import GIB
from calmix.pruning.trace import token_bytes
from calmix.recovery.losses import CHUNK, LEAST
from calmix.recovery.training import trained_names

PASSING = 2  # blocks' activations that come and go while one runs
BEHIND = 3 * GIB // 8  # what a process holds more once it has pruned: kernels, and what they keep


@dataclass(frozen=True)
class Sizes:
    """What of a model decides the memory: weights of the whole, `trained` at a time, and `outside`
    the blocks; `widths` are the inputs and outputs of the linear maps of a block together.
    """

    weights: int
    trained: int
    outside: int
    blocks: int
    hidden: int
    widths: int
    vocabulary: int
    value_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recovery does to stay within its memory, and the bytes it takes beside the program.

    `rows` run at a time, which decides how sums round. `sparing` costs time and changes no number:
    no block is read ahead, or (distill) blocks run anew on the way back.
    """

    rows: int
    sparing: bool
    needed: int


def needed_bytes(method: str, sizes: Sizes, tokens: int, *, sparing: bool) -> int:
    """Return what a recovery takes beside the program, with micro-batches of so many tokens."""
    activations = tokens * (6 * sizes.hidden + sizes.widths) * sizes.value_bytes
    optimiser = sizes.trained * (16 + sizes.value_bytes)
    if method == "blocks":
        # The block, its best weights so far, and both models' next ones unless sparing.
        weights = sizes.trained * (2 if sparing else 4) * sizes.value_bytes
        first = (sizes.outside + sizes.trained) * sizes.value_bytes  # of the first states
        return max(first, weights + optimiser + (1 + 2 * PASSING) * activations)
    between = sizes.blocks * tokens * sizes.hidden * sizes.value_bytes
    kept = PASSING + (1 if sparing else sizes.blocks)
    logits = 5 * 4 * min(max(CHUNK, LEAST * sizes.vocabulary), tokens * sizes.vocabulary)
    weights = sizes.weights * sizes.value_bytes
    return weights + optimiser + between + kept * activations + logits


def make_plan(method: str, sizes: Sizes, length: int, rows: Sequence[int], room: float) -> Plan:
    """Return the first plan that takes no more than `room` bytes, or the one that takes least.

    `rows` of `length` tokens may run at a time, the most first.
    """
    plans = [
        Plan(count, sparing, needed_bytes(method, sizes, count * length, sparing=sparing))
        for count in rows
        for sparing in (False, True)
    ]
    least = min(plans, key=lambda plan: plan.needed)
    return next((plan for plan in plans if plan.needed <= room), least)


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


def sizes_of(model: StreamedModel, method: str, dtype: torch.dtype) -> Sizes:
    """Return what decides the memory of a recovery of a model, computed with in `dtype`."""
    config = model.model.config.get_text_config(decoder=True)
    largest = max(range(len(model.blocks)), key=model.block_bytes)
    own = model.parameters
    trained = sum(p.numel() for p in model.blocks.blocks[largest].parameters())
    if method == "distill":
        trained = sum(own[n].numel() for n in trained_names(model.model, model.blocks))
    return Sizes(
        weights=sum(p.numel() for p in own.values()),
        trained=trained,
        outside=model.outside_bytes // model.dtype.itemsize,
        blocks=len(model.blocks),
        hidden=token_bytes(model.model, model.blocks) // dtype.itemsize,
        widths=widths_of(model.blocks, largest, experts_per_token(config)),
        vocabulary=model.model.get_output_embeddings().weight.shape[0],
        value_bytes=dtype.itemsize,
    )


def widths_of(found: DecoderBlocks, index: int, chosen: int) -> int:
    """Return the inputs and outputs, together, of a block's linear maps a token goes through."""
    layers = found.prunables(index)
    each: dict[str | None, int] = {}
    for layer in layers:
        each[layer.mixture] = max(each.get(layer.mixture, 0), (layer.expert or 0) + 1)
    return sum(
        sum(layer.shape) * (1 if layer.expert is None else min(chosen, each[layer.mixture]))
        for layer in layers
        if not layer.expert
    )
