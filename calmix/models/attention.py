"""Faster decoding: attention of one new token a row, and keys and values that are not moved.

Where several query heads share a key head (grouped-query attention), PyTorch's own attention on
a CPU computes every query head by itself. Seen as so many queries of one key head, they are
computed together, several times faster. Registered with transformers under a name of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

NAME = "calmix_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa`; a single query position sees its key heads once.

    Args:
        query: (rows, heads, positions, width).
        key, value: (rows, key heads, tokens, width).

    Returns:
        (rows, positions, heads, width), and None for the weights, which are not kept.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, positions, width = query.shape
    shared = key.shape[1]
    plain = attention_mask is None and not kwargs.get("dropout")
    plain &= kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    if positions > 1 or heads == shared or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    folded = query.reshape(rows, shared, heads // shared, width)
    attended = F.scaled_dot_product_attention(folded, key, value, scale=kwargs.get("scaling"))
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def grouped_decoding(model: Any) -> Iterator[None]:
    """Let a model that attends by `sdpa` attend by `grouped_attention` for a while."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = getattr(model.config, "_attn_implementation", None)
    if before != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        yield
        return
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def cache_argument(module: Any) -> str:
    """Return what a model calls its key-value cache: transformers renamed it within version 5."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def reserved_cache(model: Any, length: int) -> Any:
    """Return a cache with room for `length` tokens a row, so that no step copies what it holds.

    Only layers that keep every token are changed; a sliding window's keep to their own way.
    """
    from transformers import DynamicCache, DynamicLayer

    class ReservedLayer(DynamicLayer):
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.room = [
                    state.new_empty(*state.shape[:-2], length, state.shape[-1])
                    for state in (key_states, value_states)
                ]
            at = self.get_seq_length()
            stop = at + key_states.shape[-2]
            for held, new in zip(self.room, (key_states, value_states), strict=True):
                held[..., at:stop, :] = new
            self.keys, self.values = (held[..., :stop, :] for held in self.room)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    cache.layers = [
        ReservedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
