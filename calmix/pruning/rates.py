"""Bits by layer: more where rounding moves the model's predictions further (`kl`, ours).

Half a block at a time (its attention, its MLP) is rounded to the nearest in an otherwise dense
model, at `ROUNDED` bits, and the KL divergence from the dense model is measured on a few rows of
the calibration set. If each bit divided a part's divergence by four, the total would be least at

    bits of a part = mean + log4(divergence / weights of the part) - mean of these

Half of that distance from the mean is taken, which keeps more than the whole of it. The mean is
over weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from calmix.errors import ModelError
from calmix.evaluation.likelihood import decoder_and_head, divergences, hidden_states
from calmix.models.blocks import DecoderBlocks, Prunable
from calmix.pruning.patterns import Rate

ROWS = 8  # of the calibration set, and
STRIDE = 4  # every which position of them, the divergence is measured on
ROUNDED = 3.0  # bits
DAMPED = 0.5
LEAST, MOST = 1.0, 8.0  # bits of a part
POSITIONS = 128  # whose logits are in memory at a time
RATE = math.log2(2 * math.pi * math.e) / 2  # bits of a normal variable rounded to its own deviation


@torch.no_grad()
def rates_by_kl(
    model: torch.nn.Module,
    found: DecoderBlocks,
    ids: Tensor,
    bits: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Rate]:
    """Return the bits of each layer, `bits` on average over weights.

    Args:
        model: dense, in memory; unchanged at the end.
        found: its blocks.
        ids: int64 token ids (rows, length).
        progress: called with parts measured and in all.
    """
    decoder, head = decoder_and_head(model)
    few = ids[np.unique(np.linspace(0, len(ids) - 1, ROWS).round().astype(int))]

    def states() -> Tensor:
        parts = [part[:, ::STRIDE].flatten(0, 1) for _, part in hidden_states(decoder, few)]
        return torch.cat(parts)

    dense, parts, apart = states(), _parts(found), {}
    for number, (name, layers) in enumerate(parts.items(), start=1):
        with _rounded(layers):
            pairs = zip(dense.split(POSITIONS), states().split(POSITIONS), strict=True)
            kl = [divergences(head(old).float(), head(new).float()).sum() for old, new in pairs]
        apart[name] = float(sum(kl)) / len(dense)
        progress(number, len(parts))
    if not np.isfinite(list(apart.values())).all():
        raise ModelError("the model's predictions are not finite where a part of it is rounded")
    sizes = {name: sum(one.view().numel() for one in layers) for name, layers in parts.items()}
    chosen = balanced(apart, sizes, bits)
    return {one.name: Rate(chosen[name]) for name, layers in parts.items() for one in layers}


def balanced(apart: Mapping[str, float], sizes: Mapping[str, int], bits: float) -> dict[str, float]:
    """Return the bits of parts from the divergence that rounding each causes, and its weights."""
    weights = np.array([sizes[name] for name in apart], float)
    divergence = np.maximum([*apart.values()], 1e-9)
    wanted = DAMPED * np.log2(divergence / weights) / 2
    low, high = bits - wanted.max() - MOST, bits - wanted.min() + MOST
    for _ in range(60):  # the mean grows with what is added
        middle = (low + high) / 2
        rates = np.clip(wanted + middle, min(LEAST, bits), max(MOST, bits))
        low, high = (middle, high) if rates @ weights < bits * weights.sum() else (low, middle)
    return dict(zip(apart, rates.round(3).tolist(), strict=True))


def _parts(found: DecoderBlocks) -> dict[str, list[Prunable]]:
    """Return the layers by the child of a block that holds them."""
    parts: dict[str, list[Prunable]] = {}
    for index in range(len(found)):
        block = f"{found.name}.{index}."
        for layer in found.prunables(index):
            parts.setdefault(block + layer.name.removeprefix(block).split(".")[0], []).append(layer)
    return parts


@contextmanager
def _rounded(layers: list[Prunable]) -> Iterator[None]:
    """Round the weights of layers, and put them back."""
    kept = [layer.view().clone() for layer in layers]
    try:
        for layer in layers:
            weight = layer.view().float()
            step = weight.std(1, keepdim=True).clamp_min_(1e-12) * 2 ** (RATE - ROUNDED)
            layer.assign((weight / step).round_().mul_(step))
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.assign(weight)
