"""What recovery makes small: the divergence of two heads' logits, and a block's relative error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calmix.evaluation.likelihood import Head, divergences, in_cache

CHUNK = 2**23  # logits of one model held at a time
LEAST = 128  # tokens, whatever the vocabulary: of fewer, reading the head outweighs its product


class _Given(torch.autograd.Function):
    """A loss whose gradient is known when it is computed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def divergence(
    hidden: Tensor, target: Tensor, head: Head, dense_head: Head, vocabulary: int
) -> Tensor:
    """Return the sum over tokens of KL(dense || pruned), in nats.

    Logits are made for a few tokens at a time, and never kept: the gradient by `hidden` is made
    with them. Nothing behind the heads (their weights) gets a gradient. A head may lie elsewhere.

    Args:
        hidden, target: what the pruned and the dense model's head see, shape (tokens, width).
        vocabulary: width of the logits.
    """
    learns = torch.is_grad_enabled() and hidden.requires_grad
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    chunk = max(LEAST, CHUNK // vocabulary)
    gradients: list[Tensor] = []
    for own, other in zip(hidden.detach().split(chunk), target.split(chunk), strict=True):
        own.requires_grad_(learns)
        with torch.no_grad():
            dense = dense_head(other)
        logits = head(own)
        slopes: list[Tensor] = []
        for theirs, ours in zip(in_cache(dense), in_cache(logits.detach()), strict=True):
            p, q = theirs.float().to(ours.device), ours.float()
            total += divergences(p, q).sum().to(total.device)
            if learns:
                # The derivative of KL by the pruned model's logits is q - p.
                slopes.append(q.sub_(p).to(ours.dtype))
        if learns:
            gradients += torch.autograd.grad(logits, own, torch.cat(slopes))
    if not learns:
        return total
    found: Tensor = _Given.apply(hidden, total, torch.cat(gradients))
    return found


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the sum over tokens of |output - target|^2 / |target|^2.

    A plain mean square belongs to the few tokens (mostly the first) whose states are a thousand
    times larger than the rest; here every token counts the same. Ours.

    Args:
        output, target: hidden states, shape (..., width).

    Returns:
        float32 scalar.
    """
    target = target.float()
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output.float() - target).square().sum(-1) / energy).sum()
