"""Key-value caches that are not copied during generation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


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
            positions = [line.nonzero().flatten() for line in seen]
            for layer, other in zip(self.layers, cache.layers, strict=False):  # some are shared
                if not layer.is_initialized:
                    layer.keys = self._room(other.keys[:0, :, :0])
                    layer.values = self._room(other.values[:0, :, :0])
                    layer.is_initialized = True
                for tensor, new in ((layer.keys, other.keys), (layer.values, other.values)):
                    for place, row, indices in zip(places.tolist(), new, positions, strict=True):
                        tensor[place, :, : len(indices)] = row[:, indices]
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
