"""What recovery makes small: the divergence of two heads' logits, and a block's relative error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**23  # logits of one model held at a time: 32 MiB in float32

Logits = Callable[[Tensor], Tensor]


class _Divergence(torch.autograd.Function):
    """The sum of KL(dense || pruned), its gradient made chunk by chunk on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, logits: Logits, dense_logits: Logits, chunk: int
    ) -> Tensor:
        wanted = bool(ctx.needs_input_grad[0])
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            piece = hidden[part].detach().requires_grad_(wanted)
            with torch.no_grad():
                log_p = dense_logits(target[part]).log_softmax(-1)
            with torch.set_grad_enabled(wanted):
                scores = logits(piece)
            log_q = scores.detach().log_softmax(-1)
            p = log_p.exp()
            total += p.mul(log_p.sub_(log_q)).sum()
            if gradient is not None:
                # The derivative of KL by the pruned model's logits is q - p.
                slope = log_q.exp_().sub_(p)
                (gradient[part],) = torch.autograd.grad(scores, piece, slope)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


def divergence(
    hidden: Tensor, target: Tensor, logits: Logits, dense_logits: Logits, vocabulary: int
) -> Tensor:
    """Return the sum over tokens of KL(dense || pruned), in nats.

    Logits are made for a few tokens at a time, and never kept: the gradient by `hidden` is made
    with them. Nothing behind the heads (their weights) gets a gradient.

    Args:
        hidden: what the pruned model's head sees, shape (tokens, width).
        target: what the dense model's head sees, same shape.
        logits, dense_logits: from hidden states to float32 logits.
        vocabulary: width of the logits.

    Returns:
        float32 scalar.
    """
    chunk = max(16, CHUNK // vocabulary)
    return _Divergence.apply(hidden, target, logits, dense_logits, chunk)


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
