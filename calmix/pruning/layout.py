"""Learn from one tiny forward pass how a model's blocks are wired.

Which linear maps share one input, in which order inputs appear, what a block returns, and with
which arguments the decoder calls it: all observed, nothing assumed about the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calmix.capability.likelihood import decoder_and_head
from calmix.errors import ModelError
from calmix.models.blocks import DecoderBlocks, Prunable


@dataclass(frozen=True)
class SharedInput:
    """Linear maps of one block that read the very same input, in the order they are called."""

    layers: list[Prunable]


@dataclass(frozen=True)
class Layout:
    """Per block the distinct inputs in order of appearance, and whether it returns a tuple."""

    inputs: list[list[SharedInput]]
    returns_tuple: list[bool]


@dataclass
class BlockCall:
    """The arguments a decoder calls one block with, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call the block on hidden states and return its hidden states."""
        return first_tensor(block(hidden, *self.args, **self.kwargs))


@torch.no_grad()
def observe(model: Any, found: DecoderBlocks, ids: Tensor) -> Layout:
    """Run a tiny forward pass and observe the layout.

    Args:
        model: causal language model.
        found: its decoder blocks.
        ids: a few token ids, shape (1, tokens).

    Raises:
        ModelError: the blocks are no plain chain, or a linear map in them is never called or
            is called more than once a pass.
    """
    calls: list[list[tuple[Prunable, tuple[Any, ...]]]] = [[] for _ in found.blocks]
    kept: list[Tensor] = []  # keeps inputs alive, so that no address is used twice
    tuples: list[bool] = []
    chain: list[tuple[Tensor, Tensor]] = []
    handles = []

    def on_linear(index: int, layer: Prunable) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            value = args[0]
            kept.append(value)
            key = (value.data_ptr(), value._version, value.numel(), value.dtype)
            calls[index].append((layer, key))

        return hook

    def on_block(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        tuples.append(isinstance(result, tuple))
        chain.append((_hidden_of(args, kwargs)[0].clone(), first_tensor(result).clone()))

    try:
        for index, block in enumerate(found.blocks):
            handles.append(block.register_forward_hook(on_block, with_kwargs=True))
            for layer in found.prunables(index):
                handles.append(layer.module.register_forward_pre_hook(on_linear(index, layer)))
        decoder_and_head(model)[0](input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(chain) != len(found) or not all(
        torch.equal(chain[i][1], chain[i + 1][0]) for i in range(len(chain) - 1)
    ):
        raise ModelError(
            f"the blocks in {found.name} do not pass hidden states straight from one to the "
            "next: the engine cannot prune this architecture yet"
        )
    inputs = [_shared(calls[i], found.prunables(i)) for i in range(len(found))]
    return Layout(inputs, tuples)


def _shared(
    calls: list[tuple[Prunable, tuple[Any, ...]]], layers: list[Prunable]
) -> list[SharedInput]:
    names = [layer.name for layer, _ in calls]
    for layer in layers:
        if names.count(layer.name) != 1:
            often = "never" if layer.name not in names else "more than once"
            raise ModelError(f"{layer.name} is called {often} in a forward pass: cannot prune it")
    groups: dict[tuple[Any, ...], list[Prunable]] = {}
    for layer, key in calls:
        groups.setdefault(key, []).append(layer)
    return [SharedInput(group) for group in groups.values()]


class Calls:
    """What the decoder hands to its blocks for each micro-batch, without running the blocks."""

    def __init__(self, model: Any, found: DecoderBlocks, layout: Layout) -> None:
        self._decoder = decoder_and_head(model)[0]
        self._found = found
        self._layout = layout
        self._first: dict[tuple[int, str], Tensor] = {}

    def record(self, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return the first block's hidden states and every block's other arguments.

        Equal tensors of different micro-batches (masks, position embeddings) are kept once.
        """
        recorded: list[tuple[Tensor, BlockCall]] = []

        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = _hidden_of(args, kwargs)
                args = tuple(self._shared((index, str(i)), value) for i, value in enumerate(args))
                kwargs = {key: self._shared((index, key), v) for key, v in kwargs.items()}
                recorded.append((hidden, BlockCall(args, kwargs)))
                return (hidden,) if self._layout.returns_tuple[index] else hidden

            return forward

        with _forwards([(b, stub(i)) for i, b in enumerate(self._found.blocks)]):
            self._decoder(input_ids=ids, use_cache=False)
        return recorded[0][0], [call for _, call in recorded]

    def _shared(self, key: tuple[int, str], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._shared((key[0], f"{key[1]}.{i}"), v) for i, v in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        # Blocks mostly share their arguments too, so the first block's copy is tried as well.
        for known in (self._first.get((0, key[1])), self._first.get(key)):
            if (
                known is not None
                and known.shape == value.shape
                and known.dtype == value.dtype
                and torch.equal(known, value)
            ):
                return known
        return self._first.setdefault(key, value)


@contextmanager
def _forwards(pairs: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forward of modules for a while."""
    before = [module.__dict__.get("forward") for module, _ in pairs]
    try:
        for module, forward in pairs:
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), old in zip(pairs, before, strict=True):
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def _hidden_of(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split a block's arguments into hidden states and the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def first_tensor(result: Any) -> Tensor:
    """Return a block's hidden states out of what it returned."""
    return result[0] if isinstance(result, tuple) else result
