"""What an error at each calibration token costs: a backward pass of the dense model, by block.

A change D of a layer's weights changes KL(dense || changed) by about

    1/2 sum over tokens t of ||g_t||^2 / m ||D x_t||^2,

x_t the layer's input, g_t the gradient at its m outputs of the loss of next tokens drawn from the
dense model's own prediction: the Fisher information, where g_t g_t^T is replaced by a multiple of
the identity (GuidedQuant, arXiv 2505.07004, with one group per layer; the drawn tokens are ours).
So a solver minimises KL rather than the squared error of tokens whose inputs are large if it sums
w_t x_t x_t^T with w_t = c_t = ||g_t||^2 / m. Ours is w_t = c_t^(1/2): one draw estimates a cost
poorly, and a sum ruled by the costliest tokens fits these alone. With w_t = c_t, GPTQ at 3 bits is
as good, but ADMM at 50 % ends behind equal weights (benchmarks/tokens.py).

The model runs forward a block at a time, the states between blocks are kept, and then backward, a
block at a time: no more than one block's weights and activations need to be in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from calmix.errors import ModelError
from calmix.evaluation.likelihood import in_cache
from calmix.memory import LOGIT_POSITIONS, STORED, token_bytes
from calmix.models.blocks import DecoderBlocks, Prunable, evaluating, outer_layers
from calmix.precision import reproducible
from calmix.pruning.trace import TRACED_TOKENS, Batch, Calls

POWER = 0.5  # of a cost in a token's weight
# From layers that share an input (their outputs by name), calibration rows and their inputs: the
# inputs, each token times the square root of its weight.
Weighting = Callable[[Mapping[str, int], slice, Tensor], Tensor]
Loaded = Callable[[int | None], AbstractContextManager[Any]]  # a block, or None: all outside them


def token_weights(
    model: nn.Module,
    blocks: DecoderBlocks,
    ids: Tensor,
    *,
    device: torch.device,
    rows_at_once: int,
    loaded: Loaded = lambda index: nullcontext(),
    states: Callable[[], Any] = dict,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Return the cost of an error at every token, by layer: float32 (rows, tokens).

    Output head and embeddings are among the layers; those without a weight per token, such as
    experts, are left out.

    Args:
        model, blocks: the dense model and its blocks.
        ids: int64 (rows, length).
        device: of the model.
        rows_at_once: rows that run through a block at a time.
        loaded: a context in which a block's weights are in memory, or those outside the blocks.
        states: makes an empty store of hidden states, by number.
        progress: called with blocks done, forward and backward, and their total.

    Raises:
        ModelError: the gradient is not finite, or the architecture has none.
    """
    off = torch.autocast(device.type, enabled=False)
    gradients = torch.inference_mode(False), torch.no_grad(), reproducible(device), off
    with ExitStack() as stack:
        for one in (*gradients, evaluating(model)):
            stack.enter_context(one)
        with loaded(None), loaded(0):
            calls = Calls(model, blocks, ids[:1, :TRACED_TOKENS].clone().to(device))
            each = ids.shape[1] * token_bytes(model, blocks) * (len(blocks) + 1)
        at_once = max(rows_at_once, STORED // each // rows_at_once * rows_at_once)
        seeds = range(len(ids))  # of the drawn tokens: a row's own, whatever runs beside it
        outer = list(outer_layers(model))
        parts, total, done = [], 2 * len(blocks) * -(-len(ids) // at_once), count(1)

        def tick() -> None:
            progress(next(done), total)

        for start in range(0, len(ids), at_once):
            group = slice(start, start + at_once)
            batches = ids[group].split(rows_at_once)
            parts.append(
                _group(calls, blocks, outer, batches, loaded, states(), seeds[group], tick)
            )
    names = set.intersection(*(set(part) for part in parts))
    costs = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name in names}
    if not all(cost.isfinite().all() for cost in costs.values()):
        raise ModelError("the gradient of its loss is not finite")
    return costs


def _group(
    calls: Calls,
    blocks: DecoderBlocks,
    outer: Sequence[str],
    parts: Sequence[Tensor],
    loaded: Loaded,
    states: Any,
    seeds: Sequence[int],
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the costs for micro-batches whose hidden states are stored together."""
    groups, last = len(parts), len(blocks)
    written: dict[tuple[int, int], list[Any]] = {}
    costs: dict[str, list[Tensor]] = defaultdict(list)
    batches: list[Batch] = []
    with loaded(None), loaded(0):
        for number, part in enumerate(parts):
            states[number], batch = calls.record(part.to(calls.device))
            batches.append(batch)
    for index in range(last):
        with loaded(index):
            for number, batch in enumerate(batches):
                written[index, number] = batch.written
                hidden = batch.run(index, states[index * groups + number])
                states[(index + 1) * groups + number] = hidden
        tick()
    slopes: dict[int, Tensor] = {}
    with loaded(None):
        for number, batch in enumerate(batches):
            own, seeds = seeds[: batch.rows], seeds[batch.rows :]
            slopes[number], at_head = _of_head(calls, states[last * groups + number], own)
            costs[outer[0]].append(at_head.cpu())
    for index in reversed(range(last)):
        layers = [one for one in blocks.prunables(index) if one.expert is None]
        with loaded(index):
            for number, batch in enumerate(batches):
                batch.written = written[index, number]
                hidden = states[index * groups + number]
                slopes[number], own_costs = _of_block(batch, index, layers, hidden, slopes[number])
                for name, values in own_costs.items():
                    costs[name].append(values.view(batch.rows, -1).cpu())
        tick()
    if len(outer) > 1:
        costs[outer[1]] = [slopes[number].float().square().mean(-1).cpu() for number in slopes]
    return {name: torch.cat(some) for name, some in costs.items() if len(some) == groups}


def _of_head(calls: Calls, hidden: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the loss's gradient at the last block's outputs, (rows, length, width), and its
    expected mean square at the logits, (rows, length)."""
    if hidden.ndim != 3 or len(hidden) != len(seeds):
        raise ModelError("its blocks return more than one hidden state a token")
    slopes, costs = torch.empty_like(hidden), torch.empty(hidden.shape[:2], device=hidden.device)
    for row, seed in enumerate(seeds):
        rng = torch.Generator().manual_seed(seed)
        for start in range(0, hidden.shape[1], LOGIT_POSITIONS):
            at = (slice(row, row + 1), slice(start, start + LOGIT_POSITIONS))
            part = hidden[at].clone().requires_grad_(True)
            with torch.enable_grad():
                logits = calls.logits(part)
            if not logits.requires_grad:
                raise ModelError("its output head has no gradient")
            drawn, costs[at] = _drawn_slopes(logits.detach()[0], rng)
            (slopes[at],) = torch.autograd.grad(logits, part, drawn[None])
    return slopes, costs


def _drawn_slopes(logits: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the gradient of the loss of drawn tokens by their logits, shares minus one-hot, and
    its expected mean square."""
    slopes, costs = torch.empty_like(logits), torch.empty_like(logits[:, 0], dtype=torch.float32)
    at = 0
    for part in in_cache(logits):
        shares = part.float().softmax(-1)
        points = torch.rand(len(part), 1, generator=rng).to(part.device)
        costs[at : at + len(part)] = (1 - shares.square().sum(-1)) / shares.shape[-1]
        sums = shares.cumsum(-1)
        drawn = torch.searchsorted(sums, points * sums[:, -1:]).clamp_(max=shares.shape[-1] - 1)
        shares.scatter_(-1, drawn, shares.gather(-1, drawn) - 1)
        slopes[at : at + len(part)] = shares
        at += len(part)
    return slopes, costs


def _of_block(
    batch: Batch, index: int, layers: list[Prunable], hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient at a block's inputs, and at each layer's outputs its mean square."""
    outputs: dict[str, Tensor] = {}

    def see(name: str, module: Any, args: Any, output: Tensor) -> None:
        outputs[name] = output

    with torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hook = partial(see, layer.name)
            hooks.enter_context(layer.module.register_forward_hook(hook))
        hidden.requires_grad_(True)
        result = batch.run(index, hidden, keep=False)
        named = {name: output for name, output in outputs.items() if output.requires_grad}
        grads = torch.autograd.grad(
            result, [hidden, *named.values()], gradient.to(result.dtype), allow_unused=True
        )
    if grads[0] is None:
        raise ModelError("its blocks have no gradient")
    pairs = zip(named, grads[1:], strict=True)
    squares = {
        name: grad.float().square_().mean(-1).flatten() for name, grad in pairs if grad is not None
    }
    return grads[0], {name: one for name, one in squares.items() if len(one) % batch.rows == 0}


def weighting(costs: Mapping[str, Tensor], power: float = POWER) -> Weighting:
    """Return what an engine's run multiplies inputs with, given the costs of `token_weights`.

    Layers that share an input share its statistic: the weight of a token is a power of its mean
    cost to these layers, by outputs.
    """

    def weigh(outputs: Mapping[str, int], rows: slice, inputs: Tensor) -> Tensor:
        some = [(costs[name][rows], size) for name, size in outputs.items() if name in costs]
        if not some or some[0][0].numel() * inputs.shape[-1] != inputs.numel():
            return inputs
        sizes = sum(size for _, size in some)
        scale = torch.stack([cost * (size / sizes) for cost, size in some]).sum(0) ** (power / 2)
        scale = scale.to(inputs.device, inputs.dtype)
        return inputs * scale.reshape(*inputs.shape[:-1], 1)

    return weigh
