"""Attention on a CPU, and a key-value cache that is not copied while a model writes.

PyTorch's CPU attention takes every query head by itself, though several may share a key head
(grouped-query attention), and its bfloat16 products are slow without matrix units. Here all query
heads of a key head are one product, for a slice of the queries at a time: scores stay in cache,
and keys the slice cannot see are skipped. Scores, sums and softmax are float32; the backward pass
computes scores again. All other attention is PyTorch's.
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

MARK = "_calmix_attention"  # on modules that use it
SLICE = 64  # queries whose scores are held at a time
AT_ONCE = 2  # times `values_at_once`: scores that are held, of one row at least


def use_own_attention(model: nn.Module) -> None:
    """Let a model attend by `attention` where it attends by transformers' `sdpa`.

    The name stays, because models look at it; other models keep transformers' own.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        chosen = attention if MARK in vars(module) else sdpa_attention_forward
        return chosen(module, *args, **kwargs)

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
    """Attend as transformers' `sdpa`: in slices where that is faster and known to be the same.

    The query is (rows, heads, positions, width), key and value are (rows, key heads, tokens,
    width). Returns (rows, positions, heads, width), and None for the weights, which are not kept.
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
    if causal is None:  # as transformers has it without a mask; one may show what follows
        causal = getattr(module, "is_causal", attention_mask is None)
    if plain and causal and positions > 1 and _faster(query):
        return sliced_attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _faster(query: Tensor) -> bool:
    if torch.compiler.is_compiling() or query.device.type != "cpu":
        return False
    if query.dtype == torch.bfloat16:  # PyTorch's own uses matrix units where there are any
        return not capabilities().get("amx_bf16")
    return query.dtype == torch.float32


def sliced_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Return causal attention: the last token is the last query's, and none sees what follows it.

    Shapes are those of `attention`; the heads of a key head stand together. The mask (rows or 1, 1,
    positions, tokens) is boolean, False where a token is hidden, or what is added to the scores,
    and hides what follows a query too. Without a scale, 1 / sqrt(width).
    """
    if mask is not None and not mask.stride(0):  # one mask, expanded to all rows
        mask = mask[:1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    made: Tensor = _Sliced.apply(query, key, value, mask, scale)
    return made


class _Sliced(torch.autograd.Function):
    """`sliced_attention`, in slices on the way back too."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        made = query.new_empty(*query.shape[:3], value.shape[-1])
        for own, lines, _, _, values, shares in _parts(query, key, value, mask, scale):
            mixed = torch.bmm(shares.to(value.dtype), values)
            made[own, :, lines] = mixed.view_as(made[own, :, lines])
        return made.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        grad, scale = grads[0].transpose(1, 2), ctx.scale
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for own, lines, queries, keys, values, shares in _parts(query, key, value, mask, scale):
            seen, here = keys.shape[1], _together(grad[own, :, lines], key)
            with _fast(query):
                to_shares = torch.bmm(here.float(), values.float().transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(
                to_shares, shares, -1, torch.float32
            ).to(query.dtype)
            more = torch.bmm(to_scores, keys).mul_(scale)
            to_query[own, :, lines] = more.view_as(to_query[own, :, lines])
            more = torch.bmm(to_scores.transpose(1, 2), queries)
            to_key[own, :, :seen] += more.view_as(key[own, :, :seen])
            more = torch.bmm(shares.to(query.dtype).transpose(1, 2), here)
            to_value[own, :, :seen] += more.view_as(value[own, :, :seen])
        return to_query, to_key.mul_(scale).to(key.dtype), to_value.to(value.dtype), None, None


def _parts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield some rows and lines, their queries, keys and values of the tokens these may see, and
    how much of every token's value each query takes, float32: all but the first as `_together`."""
    rows, heads, positions, _ = query.shape
    tokens, bias = key.shape[2], mask
    if mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(torch.float32).min
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)
    step = max(1, AT_ONCE * values_at_once(query.device) // (heads * SLICE * tokens))
    for first in range(0, rows, step):
        own = slice(first, first + step)
        for start in range(0, positions, SLICE):
            lines = slice(start, min(start + SLICE, positions))
            count, seen = lines.stop - start, tokens - positions + lines.stop
            if bias is None:  # of the tokens seen only the last ones are hidden from some
                hidden = torch.full((1, 1, count, count), -torch.inf, device=key.device).triu_(1)
            else:
                hidden = (bias if len(bias) == 1 else bias[own])[:, :, lines, :seen].float()
            queries = _together(query[own, :, lines], key)
            keys, values = (one[own, :, :seen].flatten(0, 1) for one in (key, value))
            with _fast(query):
                scores = torch.bmm(queries.float() * scale, keys.float().transpose(1, 2))
            scores.view(-1, heads, count, seen)[..., -hidden.shape[-1] :] += hidden
            scores = scores.softmax(-1)
            yield own, lines, queries, keys, values, scores


def _together(some: Tensor, key: Tensor) -> Tensor:
    """Stack the query heads of a key head: (rows x key heads, heads x lines, width)."""
    return some.reshape(len(some) * key.shape[1], -1, some.shape[-1])


def _fast(query: Tensor) -> AbstractContextManager[None]:
    """Allow float32 products to round to bfloat16 where the inputs are bfloat16."""
    return bfloat16_products() if query.dtype == torch.bfloat16 else nullcontext()


def cache_argument(module: Any) -> str:
    """Return what a model calls its key-value cache: transformers renamed it within version 5."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def repeated_cache(cache: Any, rows: int) -> Any:
    """Return a cache of so many rows that are all the one of another, which stays as it is."""
    from transformers import DynamicCache

    made = DynamicCache()  # without a configuration: it keeps all, sliding windows included
    for number, layer in enumerate(cache.layers):
        parts = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        made.update(*parts, number)
    return made


def reserved_cache(model: Any, length: int) -> Any:
    """Return a cache with room for `length` tokens a row, so that no step copies it.

    Layers with a sliding window are left as they are.
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


def own_places(model: Any) -> Any:
    """Return a cache in which every row has a place of its own: rows enter by `fill`, and are
    written on a token at a time, each where its `at` is. `hold` says for how many of how many
    tokens there is room."""
    from transformers import DynamicCache, DynamicLayer

    class Places(DynamicCache):
        def __init__(self) -> None:
            super().__init__(config=model.config)
            self.layers: list[Any] = [Layer() for _ in self.layers]
            self.at = torch.zeros(0, dtype=torch.int64, device=model.device)
            self.last = 0

        def hold(self, rows: int, length: int, left: Tensor) -> None:
            """Make room for so many rows; of those that are there, `left` stay, as the first."""
            at = self.at.new_zeros(rows)
            at[: len(left)] = self.at[left]
            self.at, self.rows, self.length = at, rows, length
            self.move(0)
            for layer in self.layers:
                if layer.is_initialized:
                    layer.keys = self._room(layer.keys[left, :, : self.last])
                    layer.values = self._room(layer.values[left, :, : self.last])

        def _room(self, held: Tensor) -> Tensor:
            # What a mask hides must be finite all the same.
            made = held.new_zeros(self.rows, held.shape[1], self.length, held.shape[3])
            made[: len(held), :, : held.shape[2]] = held
            return made

        def fill(self, places: Tensor, cache: DynamicCache, seen: Tensor) -> None:
            """Copy the tokens of the rows of another cache that a mask (rows, tokens) shows."""
            shown = [line.nonzero().flatten() for line in seen]
            for own, other in zip(self.layers, cache.layers, strict=False):  # some share others'
                if not own.is_initialized:
                    own.keys = self._room(other.keys[:0, :, :0])
                    own.values = self._room(other.values[:0, :, :0])
                    own.is_initialized = True
                for held, new in ((own.keys, other.keys), (own.values, other.values)):
                    for place, row, which in zip(places.tolist(), new, shown, strict=True):
                        held[place, :, : len(which)] = row[:, which]
            self.at[places] = seen.sum(-1)
            self.move(0)

        def move(self, tokens: Tensor | int) -> None:
            """Go on by so many tokens a row; `last` is the furthest place that is written next."""
            self.at += tokens
            self.last = int(self.at.max())

    class Layer(DynamicLayer):
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            line = torch.arange(len(cache.at), device=cache.at.device)
            for held, new in ((self.keys, key_states), (self.values, value_states)):
                held[line, :, cache.at] = new[:, :, 0]
            stop = cache.last + 1
            return self.keys[..., :stop, :], self.values[..., :stop, :]

        def get_seq_length(self) -> int:
            return cache.last

    cache = Places()
    return cache
