"""Bits by layer: more where rounding moves the model's predictions further (`kl`, ours).

One part of a block at a time, such as its attention or its MLP, is rounded to the nearest level at
`ROUNDED` bits; the rest of the model stays dense. The KL divergence from the dense model is
measured on a few calibration rows. If every bit divided a part's divergence by four, the total
would be smallest at

    bits of a part = mean + log4(divergence / weights of the part) - mean of these logarithms

with means over weights. Only half of that offset is used: models then keep more than with all of
it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from calmix.errors import ModelError
from calmix.evaluation.distance import logit_pairs
from calmix.evaluation.likelihood import decoder_and_head, divergences, hidden_states
from calmix.models.blocks import DecoderBlocks, Prunable, evaluating
from calmix.precision import reproducible
from calmix.pruning.patterns import Pattern, Rate

ROWS = 8  # calibration rows to measure on
STRIDE = 4  # every how many positions of a row
ROUNDED = 3.0  # bits to which a part is rounded
DAMPED = 0.5  # fraction of the optimal offset
LEAST, MOST = 1.0, 8.0  # bits of a part
RATE = math.log2(2 * math.pi * math.e) / 2  # bits of a normal variable at a step of its deviation


@torch.no_grad()
def rates_by_kl(
    model: torch.nn.Module,
    found: DecoderBlocks,
    ids: Tensor,
    targets: Sequence[Rate],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Pattern, dict[str, Rate]]:
    """Return the bits of each layer for each target, which is their mean over weights.

    Args:
        model: the dense model, in memory; unchanged at the end.
        found: its blocks.
        ids: int64 token ids (rows, length).
        progress: called with parts measured and their total.
    """
    few = ids[np.unique(np.linspace(0, len(ids) - 1, ROWS).round().astype(int))]
    apart: dict[str, float] = {}
    parts: dict[str, list[Prunable]] = defaultdict(list)  # by direct child of a block
    depth = found.name.count(".") + 3
    for layer in found.layers:
        parts[".".join(layer.name.split(".")[:depth])].append(layer)
    with evaluating(model), reproducible(next(model.parameters()).device):
        decoder, head = decoder_and_head(model)

        def states() -> Tensor:
            rows = [part[:, ::STRIDE].flatten(0, 1) for _, part in hidden_states(decoder, few)]
            return torch.cat(rows)

        dense = states()
        for number, (name, layers) in enumerate(parts.items(), start=1):
            with _rounded(layers):
                pairs = logit_pairs((head, head), (dense, states()))
                kl = torch.cat([divergences(*pair) for pair in pairs])
            apart[name] = float(kl.mean())
            if not math.isfinite(apart[name]):
                raise ModelError(
                    f"the model's predictions are not finite when {name} is rounded: check the "
                    "model's weights, or use --dtype float32"
                )
            progress(number, len(parts))
    sizes = {name: sum(one.view().numel() for one in layers) for name, layers in parts.items()}
    made: dict[Pattern, dict[str, Rate]] = {}
    for target in targets:
        bits = balanced(apart, sizes, target.bits)
        made[target] = {one.name: Rate(bits[name]) for name in parts for one in parts[name]}
    return made


def balanced(apart: Mapping[str, float], sizes: Mapping[str, int], bits: float) -> dict[str, float]:
    """Return the bits of each part from its divergence when rounded and its number of weights."""
    weights = np.array([sizes[name] for name in apart], float)
    divergence = np.maximum([*apart.values()], 1e-9)
    wanted = DAMPED * np.log2(divergence / weights) / 2
    low, high = bits - wanted.max() - MOST, bits - wanted.min() + MOST
    for _ in range(60):  # bisection: the mean grows with what is added to all parts
        middle = (low + high) / 2
        rates = np.clip(wanted + middle, min(LEAST, bits), MOST)
        low, high = (middle, high) if rates @ weights < bits * weights.sum() else (low, middle)
    return dict(zip(apart, rates.round(3).tolist(), strict=True))


@contextmanager
def _rounded(layers: list[Prunable]) -> Iterator[None]:
    """Round the weights of layers temporarily."""
    kept = [layer.view().clone() for layer in layers]
    try:
        for layer in layers:
            weight = layer.view().float()
            step = weight.std(1, keepdim=True).clamp_min_(1e-12) * 2 ** (RATE - ROUNDED)
            layer.view().copy_((weight / step).round_().mul_(step))
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.view().copy_(weight)
