"""Full rows of tokens through a model: the fast path under perplexity and distance.

The blocks run in micro-batches that stay in cache, and the output head in slices, so that no
full-vocabulary tensor of a whole batch is ever held. What the head gives is turned into float32
and worked on in smaller slices again: a vocabulary of 262,144 outgrows a cache in a few rows, and
out of it softmax takes longer than the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calmix.machine import tokens_at_once, values_at_once

HEAD_TOKENS = 512


@dataclass(frozen=True)
class Head:
    """A causal LM's output head, from hidden states to logits in two steps.

    `logits` reproduces what the model does behind its head: gemma's final soft-capping and
    granite's or cohere's scaling of logits.

    Attributes:
        product: from hidden states to what the head's module puts out, in the module's dtype.
        cap, scale, divisor: of `logit_settings`.
    """

    product: Callable[[Tensor], Tensor]
    cap: float | None = None
    scale: float | None = None
    divisor: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the float32 logits of hidden states."""
        return self.logits(self.product(hidden))

    def logits(self, product: Tensor) -> Tensor:
        """Return the float32 logits of the module's output, or of a part of it."""
        value = product.float()
        if self.scale is not None:
            value = value * self.scale
        if self.divisor is not None:
            value = value / self.divisor
        if self.cap is not None:
            value = torch.tanh(value / self.cap) * self.cap
        return value


def in_cache(product: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of a head's product in slices whose float32 logits stay in cache."""
    return product.split(max(1, values_at_once(product.device) // product.shape[-1]))


def peaks_and_sums(head: Head, product: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of the largest logit of every row, and logsumexp of the row.

    Args:
        head: whose product it is.
        product: shape (rows, vocabulary); it may be overwritten.
    """
    tops, sums = [], []
    for part in in_cache(product):
        logits = head.logits(part)
        peak, top = logits.max(-1)
        sums.append(logits.sub_(peak[:, None]).exp_().sum(-1).log_().add_(peak))
        tops.append(top)
    return torch.cat(tops), torch.cat(sums)


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before || after) of every row of logits, in nats; both become their softmax.

    Args:
        before, after: float32 logits, shape (rows, vocabulary); both are overwritten.
    """
    apart = before - after
    sums = []
    for logits in (before, after):
        peak = logits.amax(-1, keepdim=True)
        whole = logits.sub_(peak).exp_().sum(-1, keepdim=True)
        logits.div_(whole)
        sums.append((whole.log_() + peak)[:, 0])
    # Rounding may leave it a hair below zero.
    return (torch.linalg.vecdot(before, apart) + sums[1] - sums[0]).clamp_min(0)


def decoder_and_head(model: Any) -> tuple[Any, Head]:
    """Return a causal LM's decoder and its output head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    # Some call their output head a decoder.
    if decoder is None or decoder is model or not hasattr(decoder, "get_input_embeddings"):
        decoder = model.base_model
    return decoder, Head(model.get_output_embeddings(), *logit_settings(model))


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
    decoder, head = decoder_and_head(model)
    result = torch.empty(rows, length - 1, device=device)
    start = 0
    for states in hidden_states(decoder, ids, device):
        stop = start + len(states)
        hidden = states.flatten(0, 1)
        target = ids[start:stop, 1:].flatten().to(device)
        parts = []
        for at in range(0, len(target), HEAD_TOKENS):
            product = head.product(hidden[at : at + HEAD_TOKENS])
            own = target[at : at + HEAD_TOKENS, None]
            right = head.logits(product.gather(1, own))[:, 0]
            parts.append(peaks_and_sums(head, product)[1] - right)
        result[start:stop] = torch.cat(parts).view(stop - start, -1)
        if tick is not None:
            tick(stop - start)
        start = stop
    return result.cpu()
