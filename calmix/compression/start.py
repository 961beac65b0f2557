"""Which candidate a walk begins with: the one above the fewest bits that may do. All of it is ours.

No candidate's answer is looked at for that, so that all items decide. In the study of bits
(studies/frontier.yaml) a model at a distance KL keeps some exp(-2 KL) of its answers, up to a tenth
less where KL is small; a bit less a weight is four times the distance; levels that are solved on
text come to half the distance of plain rounding, more or less, and recovered ones, of SmolLM2,
to 0.3 of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from calmix.calibration.texts import texts
from calmix.evaluation.distance import distance, reference
from calmix.evaluation.floors import Tested, lower_bound
from calmix.models import find_blocks, open_model

BITS = 4  # that weights are rounded to
LOST = 0.05  # of the answers, at any distance
RECOVERED = 0.6  # of the distance that solved levels have


def plain_distance(model: str, device: str, trust_remote_code: bool) -> float:
    """Return KL(dense || rounded) on the builtin texts, in nats a token: weights of the blocks are
    rounded to a grid of even steps on which normal ones take 4 bits.

    Raises:
        CalmixError: the distance cannot be measured, or the model not be opened.
    """
    opened = open_model(model, device=device, trust_remote_code=trust_remote_code)
    dense = reference(opened, texts(opened), cache=True)
    for layer in find_blocks(opened.model).layers:
        weight = layer.view().float()
        step = weight.std(1, keepdim=True) * math.sqrt(2 * math.pi * math.e) / 2**BITS
        layer.assign(torch.where(step > 0, (weight / step).round() * step, weight))
    return float(distance(opened, dense)["total"]["kl_mean"])


def expected(plain: float, bits: float, recovered: bool = False) -> float:
    """Return the share of answers that a candidate is thought to keep."""
    left = RECOVERED if recovered else 1.0
    return (1 - LOST) * math.exp(-left * plain * 4 ** (BITS - bits))


def begin(
    rungs: Sequence[float],
    tested: Sequence[Tested],
    plain: float,
    confidence: float,
    levels: float,
) -> float:
    """Return the bits to begin with, of `rungs` from most to fewest: those above the fewest with
    which what is thought to be kept would prove every floor. Models of `levels` or fewer are
    recovered."""

    def proves(bits: float) -> bool:
        kept = expected(plain, bits, bits <= levels)
        return all(lower_bound(round(kept * one.items), one.items, confidence) >= one.floor
                   for one in tested)  # fmt: skip

    fits = [at for at, bits in enumerate(rungs) if proves(bits)]
    return rungs[max(*fits, 1) - 1] if fits else rungs[0]
