"""What of a model decides the memory its recovery takes."""

from __future__ import annotations

import torch

from calmix.models.blocks import DecoderBlocks, experts_per_token
from calmix.models.streaming import StreamedModel
from calmix.pruning.trace import token_bytes
from calmix.recovery.distill import trained_names
from calmix.recovery.memory import Sizes


def sizes_of(model: StreamedModel, method: str, dtype: torch.dtype) -> Sizes:
    """Return what decides the memory of a recovery of a model, computed with in `dtype`."""
    config = model.model.config.get_text_config(decoder=True)
    largest = max(range(len(model.blocks)), key=model.block_bytes)
    own = model.parameters
    inside = sum(p.numel() for p in model.blocks.blocks[largest].parameters())
    everything = sum(own[n].numel() for n in trained_names(model.model, model.blocks))
    head = model.model.get_output_embeddings().weight
    return Sizes(
        weights=sum(p.numel() for p in own.values()),
        trained=everything if method == "distill" else inside,
        outside=model.outside_bytes // model.dtype.itemsize,
        blocks=len(model.blocks),
        hidden=token_bytes(model.model, model.blocks) // dtype.itemsize,
        widths=widths_of(model.blocks, largest, experts_per_token(config)),
        vocabulary=head.shape[0],
        tokens=0,
        value_bytes=dtype.itemsize,
    )


def widths_of(found: DecoderBlocks, index: int, chosen: int) -> int:
    """Return the inputs and outputs, together, of the linear maps of a block a token goes through.

    Args:
        found: the blocks.
        index: which.
        chosen: experts a token is sent to.
    """
    layers = found.prunables(index)
    each: dict[str | None, int] = {}
    for layer in layers:
        each[layer.mixture] = max(each.get(layer.mixture, 0), (layer.expert or 0) + 1)
    return sum(
        sum(layer.shape) * (1 if layer.expert is None else min(chosen, each[layer.mixture]))
        for layer in layers
        if not layer.expert
    )
