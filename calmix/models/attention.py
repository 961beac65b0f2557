"""Faster attention on CPUs, and key-value caches that are not copied during generation.

PyTorch's CPU attention computes each query head separately, though several can share a key head
(grouped-query attention), and its bfloat16 products are slow without matrix units. Here all query
heads of a key head are one product, for a slice of the queries at a time: scores stay in cache,
and keys the slice cannot see are skipped. Scores, sums and softmax are float32; the backward pass
recomputes the scores. All other attention is PyTorch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from calmix.machine import values_at_once
from calmix.precision import bfloat16_products, capabilities

MARK = "_calmix_attention"  # attribute of modules that use it
SLICE = 64  # queries in a slice
AT_ONCE = 2  # times `values_at_once`: scores in memory at a time, but at least one row's


def use_own_attention(model: nn.Module) -> None:
    """Make a model use `attention` in place of transformers' `sdpa`.

    The name `sdpa` stays, because models check it; other models keep transformers' own.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        function = attention if MARK in vars(module) else sdpa_attention_forward
        return function(module, *args, **kwargs)

    if AttentionInterface._global_mapping["sdpa"] is sdpa_attention_forward:
        AttentionInterface.register("sdpa", attend)
    for module in model.modules():
        vars(module)[MARK] = True


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' `sdpa`, in slices where that is faster and equivalent.

    The query is (rows, heads, positions, width), key and value are (rows, key heads, tokens,
    width). Returns (rows, positions, heads, width), and None in place of the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, positions, width = query.shape
    shared, tokens, scale = key.shape[1], key.shape[2], kwargs.get("scaling")
    plain = not kwargs.get("dropout") and not any(
        kwargs.get(name) is not None for name in ("position_bias", "softcap")
    )
    if attention_mask is None:
        plain &= positions in (1, tokens)
    else:
        plain &= attention_mask.shape[0] in (1, rows)
        plain &= attention_mask.shape[1:] == (1, positions, tokens)
    if plain and positions == 1 and heads > shared:
        folded = query.reshape(rows, shared, heads // shared, width)
        attended = F.scaled_dot_product_attention(folded, key, value, attention_mask, scale=scale)
        return attended.reshape(rows, 1, heads, value.shape[-1]), None
    causal = kwargs.get("is_causal")
    if causal is None:  # as in transformers without a mask; a mask can show later tokens
        causal = getattr(module, "is_causal", attention_mask is None)
    if plain and causal and positions > 1 and _faster(query):
        return sliced_attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _faster(query: Tensor) -> bool:
    if torch.compiler.is_compiling() or query.device.type != "cpu":
        return False
    if query.dtype == torch.bfloat16:  # PyTorch uses matrix units if there are any
        return not capabilities().get("amx_bf16")
    return query.dtype == torch.float32


def sliced_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Return causal attention; the last query is at the last token.

    Shapes are those of `attention`; the query heads of a key head are adjacent. The mask (rows or
    1, 1, positions, tokens) is boolean, False for hidden tokens, or is added to the scores; it must
    also hide the tokens after each query. The default scale is 1 / sqrt(width).
    """
    if mask is not None and not mask.stride(0):  # one mask, expanded to all rows
        mask = mask[:1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _Sliced.apply(query, key, value, mask, scale)
    return output


class _Sliced(torch.autograd.Function):
    """`sliced_attention`, with a backward pass that is sliced too."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        for some, lines, _, _, values, weights in _parts(query, key, value, mask, scale):
            part = torch.bmm(weights.to(value.dtype), values)
            output[some, :, lines] = part.view_as(output[some, :, lines])
        return output.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        grad, scale, width = grads[0].transpose(1, 2), ctx.scale, value.shape[-1]
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for some, lines, queries, keys, values, weights in _parts(query, key, value, mask, scale):
            seen, d_output = keys.shape[1], grad[some, :, lines].reshape(len(keys), -1, width)
            with _fast(query):
                d_weights = torch.bmm(d_output.float(), values.float().transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(
                d_weights, weights, -1, torch.float32
            ).to(query.dtype)
            part = torch.bmm(d_scores, keys).mul_(scale)
            d_query[some, :, lines] = part.view_as(d_query[some, :, lines])
            part = torch.bmm(d_scores.transpose(1, 2), queries)
            d_key[some, :, :seen] += part.view_as(key[some, :, :seen])
            part = torch.bmm(weights.to(query.dtype).transpose(1, 2), d_output)
            d_value[some, :, :seen] += part.view_as(value[some, :, :seen])
        return d_query, d_key.mul_(scale).to(key.dtype), d_value.to(value.dtype), None, None


def _parts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield slices of rows and positions with their queries, the keys and values they can see, and
    the attention weights (float32).

    The query heads of a key head are stacked: (rows x key heads, heads x positions, width).
    """
    rows, heads, positions, width = query.shape
    tokens, bias = key.shape[2], mask
    if mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(torch.float32).min
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)
    step = max(1, AT_ONCE * values_at_once(query.device) // (heads * SLICE * tokens))
    for first in range(0, rows, step):
        some = slice(first, first + step)
        for start in range(0, positions, SLICE):
            lines = slice(start, min(start + SLICE, positions))
            count, seen = lines.stop - start, tokens - positions + lines.stop
            if bias is None:  # only the last tokens are hidden from some of the queries
                hidden = torch.full((1, 1, count, count), -torch.inf, device=key.device).triu_(1)
            else:
                hidden = (bias if len(bias) == 1 else bias[some])[:, :, lines, :seen].float()
            keys, values = (one[some, :, :seen].flatten(0, 1) for one in (key, value))
            queries = query[some, :, lines].reshape(len(keys), -1, width)
            with _fast(query):
                scores = torch.bmm(queries.float() * scale, keys.float().transpose(1, 2))
            scores.view(-1, heads, count, seen)[..., -hidden.shape[-1] :] += hidden
            yield some, lines, queries, keys, values, scores.softmax(-1)


def _fast(query: Tensor) -> AbstractContextManager[None]:
    """Allow float32 products to round to bfloat16 if the inputs are bfloat16."""
    return bfloat16_products() if query.dtype == torch.bfloat16 else nullcontext()


def cache_argument(module: Any) -> str:
    """Return the name of a model's cache argument, which transformers changed within version 5."""
    parameters = inspect.signature(module.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def mixes_rows(module: Any) -> bool:
    """Whether the rows of a batch change each other while text is written: RWKV's do in
    transformers 5, whose state has no axis of tokens."""
    return "state" in inspect.signature(module.forward).parameters


def repeated_cache(cache: Any, rows: int) -> Any:
    """Return a cache that repeats the one row of `cache`, which stays unchanged."""
    from transformers import DynamicCache

    # Without a configuration it keeps all tokens of sliding windows.
    layers = ((layer.keys, layer.values) for layer in cache.layers)
    return DynamicCache([[part.expand(rows, -1, -1, -1) for part in parts] for parts in layers])


def reserved_cache(model: Any, length: int) -> Any:
    """Return a cache with room for `length` tokens per row, so that no step copies it.

    Layers with a sliding window are transformers' own.
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
            for state, new in zip(self.room, (key_states, value_states), strict=True):
                state[..., at:stop, :] = new
            self.keys, self.values = (state[..., :stop, :] for state in self.room)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    cache.layers = [
        ReservedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def own_places(model: Any) -> Any:
    """Return a cache whose rows have separate positions: `hold` makes room, `fill` adds rows, and
    each step writes one token per row at the row's position `at`."""
    from transformers import DynamicCache, DynamicLayer

    class Places(DynamicCache):
        def __init__(self) -> None:
            super().__init__(config=model.config)
            self.layers: list[Any] = [Layer() for _ in self.layers]
            self.at = torch.zeros(0, dtype=torch.int64, device=model.device)
            self.last = 0

        def hold(self, rows: int, length: int, left: Tensor) -> None:
            """Make room for `rows` rows of `length` tokens; the rows `left` stay and come first."""
            at = self.at.new_zeros(rows)
            at[: len(left)] = self.at[left]
            self.at, self.rows, self.length = at, rows, length
            self.move(0)
            for layer in self.layers:
                if layer.is_initialized:
                    layer.keys = self._room(layer.keys[left, :, : self.last])
                    layer.values = self._room(layer.values[left, :, : self.last])

        def _room(self, tensor: Tensor) -> Tensor:
            # Zeros, because masked values must be finite too.
            room = tensor.new_zeros(self.rows, tensor.shape[1], self.length, tensor.shape[3])
            room[: len(tensor), :, : tensor.shape[2]] = tensor
            return room

        def fill(self, places: Tensor, cache: DynamicCache, seen: Tensor) -> None:
            """Copy the rows of another cache, without the tokens hidden by the mask `seen`."""
            shown = [line.nonzero().flatten() for line in seen]
            for own, other in zip(self.layers, cache.layers, strict=False):  # some are shared
                if not own.is_initialized:
                    own.keys = self._room(other.keys[:0, :, :0])
                    own.values = self._room(other.values[:0, :, :0])
                    own.is_initialized = True
                for tensor, new in ((own.keys, other.keys), (own.values, other.values)):
                    for place, row, which in zip(places.tolist(), new, shown, strict=True):
                        tensor[place, :, : len(which)] = row[:, which]
            self.at[places] = seen.sum(-1)
            self.move(0)

        def move(self, tokens: Tensor | int) -> None:
            """Advance each row by `tokens`; `last` is the furthest position to write next."""
            self.at += tokens
            self.last = int(self.at.max())

    class Layer(DynamicLayer):
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            line = torch.arange(len(cache.at), device=cache.at.device)
            for tensor, new in ((self.keys, key_states), (self.values, value_states)):
                tensor[line, :, cache.at] = new[:, :, 0]
            stop = cache.last + 1
            return self.keys[..., :stop, :], self.values[..., :stop, :]

        def get_seq_length(self) -> int:
            return cache.last

    cache = Places()
    return cache
