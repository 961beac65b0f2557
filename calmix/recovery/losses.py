"""What recovery makes small: the divergence of two heads' logits, and a block's relative error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calmix.capability.likelihood import Head, divergences, in_cache

CHUNK = 2**23  # logits of one model held at a time
LEAST = 128  # tokens, whatever the vocabulary: of fewer, reading the head outweighs its product


class _Divergence(torch.autograd.Function):
    """The sum of KL(dense || pruned), its gradient made chunk by chunk on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, head: Head, dense_head: Head, chunk: int
    ) -> Tensor:
        wanted = bool(ctx.needs_input_grad[0])
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            piece = hidden[part].detach().requires_grad_(wanted)
            with torch.no_grad():
                dense = dense_head.product(target[part])
            with torch.set_grad_enabled(wanted):
                product = head.product(piece)
            slopes: list[Tensor] = []
            for theirs, ours in zip(in_cache(dense), in_cache(product.detach()), strict=True):
                ours.requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    logits = head.logits(ours)
                p, q = dense_head.logits(theirs), logits.detach()
                total += divergences(p, q).sum()
                if wanted:
                    # The derivative of KL by the pruned model's logits is q - p.
                    slopes += torch.autograd.grad(logits, ours, q.sub_(p))
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(product, piece, torch.cat(slopes))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


def divergence(
    hidden: Tensor, target: Tensor, head: Head, dense_head: Head, vocabulary: int
) -> Tensor:
    """Return the sum over tokens of KL(dense || pruned), in nats.

    Logits are made for a few tokens at a time, and never kept: the gradient by `hidden` is made
    with them. Nothing behind the heads (their weights) gets a gradient.

    Args:
        hidden: what the pruned model's head sees, shape (tokens, width).
        target: what the dense model's head sees, same shape.
        head, dense_head: the models' output heads.
        vocabulary: width of the logits.

    Returns:
        float32 scalar.
    """
    chunk = max(LEAST, CHUNK // vocabulary)
    return _Divergence.apply(hidden, target, head, dense_head, chunk)


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
