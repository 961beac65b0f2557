"""Experts: the inputs of each one, found without knowing how a model routes tokens.

The module that routes tokens runs its original code, one expert after another, while every product
with an expert's weights is intercepted. A weight, or any indexed or transposed view of a parameter
that holds all experts, is identified by its memory address. Products that are not needed are
skipped and return zeros.

An expert is pruned on the tokens routed to it and, with a small weight, on all: H_e + SMOOTHING
H_all / n_all. So an expert with few tokens, or none, has a statistic too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calmix.errors import ModelError
from calmix.models.blocks import Mixture, Prunable

SMOOTHING = 32.0  # weight of the all-token average, in tokens
MATMULS = frozenset(
    {
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.mm,
        torch.Tensor.mm,
        torch.bmm,
        torch.Tensor.bmm,
    }
)

# Takes the parameter's name, the expert (None: all at once) and the input; returns whether to
# compute the product.
Seen = Callable[[str, int | None, Tensor], bool]
Add = Callable[[int, Tensor], None]  # expert and its inputs
Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # arguments of a mixture


def call_tensors(call: Call) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the hidden states, the tensor of each token's experts (or None), and all tensors."""
    args, kwargs = call
    tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    whole = (torch.int64, torch.int32, torch.int16)
    index = next((one for one in tensors if one.ndim > 1 and one.dtype in whole), None)
    return tensors[0], index, tensors


class _Products(TorchFunctionMode):
    """Intercepts products with weights of experts, whose views share their memory."""

    def __init__(self, layers: Iterable[Prunable], seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        self._sources: dict[int, list[tuple[Prunable, Tensor]]] = {}
        for layer in {layer.parameter_name: layer for layer in layers}.values():
            stored = layer.whole().transpose(1, 2) if layer.transposed else layer.whole()
            self._sources.setdefault(_memory(stored), []).append((layer, stored))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        linear = func is nn.functional.linear
        if (linear or func in MATMULS) and len(args) > 1 and isinstance(args[1], Tensor):
            inputs, weight = args[:2]
            near = self._sources.get(_memory(weight), ())
            for layer, stored in near if _memory(inputs) != _memory(weight) else ():
                offset = int(weight.storage_offset() - stored.storage_offset())
                if 0 <= offset < stored.numel():
                    used = weight if linear else weight.transpose(-1, -2)
                    if not self._seen(*_place(layer, stored, used, offset), inputs):
                        return inputs.new_zeros(*inputs.shape[:-1], used.shape[-2])
                    break
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """Return an identifier of the storage of a live tensor."""
    return int(tensor.untyped_storage()._cdata)


def _place(layer: Prunable, stored: Tensor, used: Tensor, offset: int) -> tuple[str, int | None]:
    """Return the parameter and expert (None: all) of a used weight (outputs, inputs), which lies at
    an offset in the stored one, (experts, outputs, inputs)."""
    at, rest = divmod(offset, int(stored.stride(0)))
    like = stored if used.ndim == 3 else stored[at]
    if rest or used.shape != like.shape or used.stride() != like.stride():
        raise ModelError(
            f"a part of the experts' {layer.parameter} of shape {tuple(used.shape)} is used "
            "separately: the engine cannot prune these experts"
        )
    return layer.parameter, None if used.ndim == 3 else at


@dataclass
class Step:
    """The linear maps of every expert that read the same input.

    Attributes:
        layers: the ones to prune, by expert.
        keys: all parameters, in order of use.
        common: whether all experts see the same input for a token.
    """

    layers: dict[int, list[Prunable]]
    keys: tuple[str, ...]
    common: bool = False


class Routed:
    """A mixture of experts, traced.

    Attributes:
        mixture: the experts.
        layers: the linear maps in it to prune.
        name, module: of the module that routes tokens.
        device: of its weights.
        steps: the inputs, in the order in which they can be pruned.
        counted: number of tokens that reach each expert, by micro-batch.
        chosen: experts per token.
        kind: how the module is called: `indexed` (hidden states, and the experts of each token),
            `stacked` (the experts' hidden states one after another, zero where not chosen) or
            `shared` (all experts see all tokens).
    """

    def __init__(self, mixture: Mixture, layers: list[Prunable]) -> None:
        self.mixture, self.layers = mixture, layers
        self.name, self.module = mixture.name, mixture.module
        self.device = layers[0].view().device
        self.steps: list[Step] = []
        self.counted: dict[int, Tensor] = {}
        self.kind, self.chosen = "", 1

    def learn(self, call: Call) -> Any:
        """Run the module on a few tokens to find the steps; return its output."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        alive: list[Tensor] = []  # keeps inputs alive, so that no address is reused

        def seen(key: str, expert: int | None, inputs: Tensor) -> bool:
            alive.append(inputs)
            where = _memory(inputs), inputs.storage_offset(), inputs._version
            groups.setdefault((expert, *where, inputs.shape, inputs.stride()), []).append(key)
            return True

        result = self._watched(call, seen)
        done: set[str] = set()
        for keys in groups.values():
            if done.isdisjoint(keys) and len(set(keys)) == len(keys):
                self.steps.append(Step({}, tuple(keys)))
            elif not done.issuperset(keys):
                raise ModelError(f"the experts in {self.name} are not all wired alike")
            done |= set(keys)
        if missing := {layer.parameter for layer in self.mixture.layers} - done:
            raise ModelError(
                f"the input of {min(missing)} of the experts in {self.name} cannot be traced: the "
                "engine cannot prune them"
            )
        hidden, index, tensors = call_tensors(call)
        self.kind = "stacked" if len(tensors) == 1 else "shared" if index is None else "indexed"
        tokens = hidden.numel() // hidden.shape[-1]
        tokens //= self.mixture.count if self.kind == "stacked" else 1
        self.chosen = round(int(self.counts(call).sum()) / tokens)
        for step in self.steps:
            for layer in self.layers:
                if layer.parameter in step.keys:
                    step.layers.setdefault(layer.expert or 0, []).append(layer)
            experts = list(step.layers)[:2]
            if experts and self.kind != "shared":
                inputs: dict[int, Tensor] = {}
                every = torch.arange(tokens, device=hidden.device)
                self.everything(step, experts, every, call, inputs.__setitem__)
                step.common = len(inputs) < 2 or torch.equal(*inputs.values())
        return result

    def _watched(self, call: Call, seen: Seen) -> Any:
        """Run the module and call `seen` for every product with its experts' weights.

        A product is computed if `seen` returns True. A product of all experts has the expert None.
        """
        args, kwargs = call
        config: Any = getattr(self.module, "config", None)
        before = getattr(config, "_experts_implementation", None)
        if before is not None:
            config._experts_implementation = "eager"
        try:
            with _Products(self.mixture.layers, seen):
                return self.module.forward(*args, **kwargs)
        finally:
            if before is not None:
                config._experts_implementation = before

    def collect(self, step: Step, experts: Collection[int], call: Call, add: Add) -> None:
        """Run the module up to a step's inputs and call `add` with those of some experts."""
        earlier = {key for one in self.steps[: self.steps.index(step)] for key in one.keys}

        def seen(key: str, expert: int | None, inputs: Tensor) -> bool:
            here = key == step.keys[0]
            if expert is None:
                for one in experts if here else ():
                    add(one, inputs[one][(inputs[one] != 0).any(-1)])
            elif here and expert in experts:
                add(expert, inputs)
            return key in earlier and (expert is None or expert in experts)

        self._watched(call, seen)

    def everything(
        self, step: Step, experts: Sequence[int], tokens: Tensor, call: Call, add: Add
    ) -> None:
        """Do the same as if the tokens at the given positions were routed to all these experts."""
        (hidden, index, tensors), count = call_tensors(call), self.mixture.count
        flat = hidden.reshape(-1, hidden.shape[-1])
        if index is None:
            apart = flat.view(count, -1, flat.shape[-1])
            chosen = (apart != 0).any(-1).sum(0).clamp(min=1)
            flat = (apart.sum(0) / chosen[:, None]).to(hidden.dtype)
            new = {id(hidden): flat[tokens].repeat(count, 1)}
        else:
            # Some modules cannot route a token to a single expert.
            sent = [*experts, (experts[0] + 1) % count] if len(experts) == 1 else experts
            numbers = torch.tensor(sent, dtype=index.dtype, device=index.device)
            numbers = numbers.expand(len(tokens), -1)
            new = dict.fromkeys(map(id, tensors), hidden.new_ones(numbers.shape))  # gates
            flat = flat[tokens]
            new |= {id(hidden): flat[None] if hidden.ndim == 3 else flat, id(index): numbers}
        args = tuple(new.get(id(value), value) for value in call[0])
        kwargs = {key: new.get(id(value), value) for key, value in call[1].items()}
        self.collect(step, experts, (args, kwargs), add)

    def counts(self, call: Call) -> Tensor:
        """Return the number of tokens that reach each expert."""
        (hidden, index, _), count = call_tensors(call), self.mixture.count
        if index is not None:
            each = index.flatten().long().clamp(max=count)  # some exceed it
            counted = each.new_zeros(count + 1)  # 1-d: scatter_add_ is deterministic there
            return counted.scatter_add_(0, each, torch.ones_like(each))[:count]
        if self.kind == "stacked":
            return (hidden.reshape(count, -1, hidden.shape[-1]) != 0).any(-1).sum(-1)
        return torch.full((count,), hidden.numel() // hidden.shape[-1])


def starved(layers: Iterable[Any], rows: int) -> str | None:
    """Return a warning about experts that see fewer tokens than they have inputs, or None.

    Args:
        layers: with name, columns and tokens (None outside experts), such as `LayerReport`.
        rows: calibration rows.
    """
    seen: dict[str, tuple[int, int]] = {}
    for layer in layers:
        if layer.tokens is not None:
            name = layer.name.rpartition(".")[0]
            seen[name] = layer.tokens, max(layer.columns, seen.get(name, (0, 0))[1])
    few = {name: pair for name, pair in seen.items() if pair[0] < pair[1]}
    if not few:
        return None
    least = min(few, key=lambda one: few[one][0] / few[one][1])
    tokens, width = few[least]
    advice = "use sources that reach it"
    if tokens:
        advice = f"use {math.ceil(rows * width / tokens)} rows"
    return (
        f"{len(few)} of {len(seen)} experts see fewer tokens than they have inputs, at worst "
        f"{least} with {tokens} for {width}: {advice}"
    )
