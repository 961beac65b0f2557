"""Sampling from logits: what a method of self-generation sets, and one step of it.

Pure: tensors in, tensors out. The randomness is a uniform number a row, given from outside, so
that a row's outcome depends on its own seed and not on what shares its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from calmix.errors import InputError

STRETCH = 256  # entries of a distribution that are summed before the running sum is taken


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits.
        start_temperature: of a text's first sampled token; then linear to `temperature` over
            `ramp` tokens (Self-Cal, arXiv 2410.17170: t_i = t_0 + i/n (t_1 - t_0)).
        ramp: sampled tokens that takes; 0 for no schedule.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the fewest tokens that hold this much probability.
        repetition_penalty: divides positive logits of tokens the text already holds, and
            multiplies negative ones (CTRL, arXiv 1909.05858).
    """

    temperature: float = 1.0
    start_temperature: float | None = None
    ramp: int = 0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raise InputError for a value out of range, or half a schedule."""
        for name in ("temperature", "start_temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"--{name.replace('_', '-')} {value} is not a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k {self.top_k} leaves no token: use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p} is not in (0, 1]")
        if self.ramp < 0:
            raise InputError(f"--ramp {self.ramp} is negative")
        if (self.start_temperature is None) != (self.ramp == 0):
            raise InputError("--start-temperature and --ramp only have an effect together")

    def temperatures(self, position: Tensor, base: Tensor) -> Tensor:
        """Return the temperature of each row.

        Args:
            position: number of tokens already sampled of each row's text, shape (rows,).
            base: each row's temperature once the schedule is over, float32 (rows,).
        """
        if self.start_temperature is None:
            return base
        done = (position.to(base.dtype) / self.ramp).clamp(max=1)
        return self.start_temperature + done * (base - self.start_temperature)


def penalised(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Return logits with the tokens of each row's text made less likely (arXiv 1909.05858).

    Args:
        logits: float32 (rows, vocabulary).
        ids: token ids each row's text holds, (rows, any); repeats count once.
        penalty: above 1 discourages.
    """
    if penalty == 1:
        return logits
    held = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(held > 0, held / penalty, held * penalty))


def draw(
    logits: Tensor,
    temperatures: Tensor,
    uniform: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: float32 (rows, vocabulary).
        temperatures: float32 (rows,), positive.
        uniform: float64 (rows,), in [0, 1).
        top_k, top_p: as in `Sampling`, applied in this order after the temperature.

    Returns:
        int64 (rows,). A token of no probability is never drawn.
    """
    if (top_k is None or top_k >= logits.shape[1]) and (top_p is None or top_p >= 1):
        weights = (logits - logits.amax(-1, keepdim=True)).div_(temperatures[:, None]).exp_()
        return _inverted(weights, uniform)
    scaled = logits / temperatures[:, None]
    order: Tensor | None = None
    if top_k is not None and top_k < scaled.shape[1]:
        scaled, order = scaled.topk(top_k)
    if top_p is not None and top_p < 1:
        if order is None:
            scaled, order = scaled.sort(descending=True)
        share = scaled.softmax(-1)
        # A token stays if what comes before it does not hold top_p yet.
        scaled = scaled.masked_fill(share.cumsum(-1) - share >= top_p, -torch.inf)
    place = _inverted(scaled.softmax(-1), uniform)
    return place if order is None else order.gather(1, place[:, None])[:, 0]


def _inverted(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return for each row the entry where the cumulative weights pass `uniform` of their total.

    Running sums over a whole vocabulary are slow, so stretches of it are summed first and the
    running sum is taken over those, then within one.

    Args:
        weights: float32 (rows, entries), not negative, at least one positive a row.
        uniform: float64 (rows,), in [0, 1).
    """
    rows, entries = weights.shape
    weights = F.pad(weights, (0, -entries % STRETCH))
    parts = weights.view(rows, -1, STRETCH)
    ends = parts.sum(-1).double().cumsum(-1)
    target = (uniform.to(ends.dtype) * ends[:, -1])[:, None]
    which = _passed(ends, target)
    inner = parts.gather(1, which[:, :, None].expand(-1, -1, STRETCH))[:, 0].double().cumsum(-1)
    before = torch.where(which > 0, ends.gather(1, (which - 1).clamp(min=0)), 0.0)
    return (which * STRETCH + _passed(inner, target - before))[:, 0]


def _passed(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first entry of each row above `target`, of positive weight in any case."""
    place = torch.searchsorted(cumulative, target, right=True)
    # Rounding may bring the target up to the total: take the last entry with any weight.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(place, last)
