"""Full rows of tokens through a model: the fast path under perplexity and distance.

The blocks run in micro-batches that stay in cache, and the output head in slices, so that no
full-vocabulary tensor of a whole batch is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from calmix.machine import tokens_at_once

HEAD_TOKENS = 512


def decoder_and_head(model: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Return a causal LM's decoder and a function from its hidden states to logits.

    The function reproduces what the model does behind its head: gemma's final soft-capping and
    granite's or cohere's scaling of logits.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    # Some call their output head a decoder.
    if decoder is None or decoder is model or not hasattr(decoder, "get_input_embeddings"):
        decoder = model.base_model
    head = model.get_output_embeddings()
    cap, scale, divisor = logit_settings(model)

    def logits(hidden: Tensor) -> Tensor:
        value = head(hidden).float()
        if scale is not None:
            value = value * scale
        if divisor is not None:
            value = value / divisor
        if cap is not None:
            value = torch.tanh(value / cap) * cap
        return value

    return decoder, logits


def logit_settings(model: Any) -> tuple[float | None, float | None, float | None]:
    """Return what a causal LM does to its head's logits: cap, factor, divisor (None: nothing)."""
    config = model.config.get_text_config(decoder=True)
    cap, scale, divisor = (
        getattr(config, key, None)
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    return cap, scale, divisor


def hidden_states(decoder: Any, ids: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yield what the output head sees of full rows, in micro-batches, to be used without gradients.

    Args:
        decoder: of `decoder_and_head`.
        ids: int64 token ids, shape (rows, length), without padding.
        device: where the decoder is.

    Yields:
        shape (some rows, length - 1, width): every position that predicts a token of its row.
    """
    step = max(1, tokens_at_once(device) // ids.shape[1])
    for batch in ids.split(step):
        yield decoder(input_ids=batch.to(device), use_cache=False)[0][:, :-1]


@torch.inference_mode()
def row_nll(model: Any, ids: Tensor, *, tick: Callable[[int], None] | None = None) -> Tensor:
    """Return the negative log-likelihood of each predicted token of full rows, in nats.

    Args:
        model: causal language model of transformers.
        ids: int64 token ids, shape (rows, length), without padding.
        tick: called with the number of rows after each micro-batch.

    Returns:
        float32, shape (rows, length - 1): entry j is -log p(ids[j + 1] | ids[: j + 1]).
    """
    rows, length = ids.shape
    device = next(model.parameters()).device
    decoder, logits = decoder_and_head(model)
    result = torch.empty(rows, length - 1, device=device)
    start = 0
    for states in hidden_states(decoder, ids, device):
        stop = start + len(states)
        hidden = states.flatten(0, 1)
        target = ids[start:stop, 1:].flatten().to(device)
        parts = [
            F.cross_entropy(
                logits(hidden[at : at + HEAD_TOKENS]),
                target[at : at + HEAD_TOKENS],
                reduction="none",
            )
            for at in range(0, len(target), HEAD_TOKENS)
        ]
        result[start:stop] = torch.cat(parts).view(stop - start, -1)
        if tick is not None:
            tick(stop - start)
        start = stop
    return result.cpu()
