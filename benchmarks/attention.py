"""Attention in slices beside PyTorch's own: processor time and error, forward and there and back.

    python benchmarks/attention.py [--repeats 8]

Causal attention over rows of bfloat16, and behind a sliding window's mask, in the shapes of models;
the error is that of the output and of the gradients beside float64, relative, the largest of them.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from common import commit, machine
from torch import Tensor

from calmix.models.attention import sliced_attention

SHAPES = {  # rows, heads, key heads, positions, width, sliding window
    "SmolLM2-135M, 2 x 512": (2, 9, 3, 512, 64, None),
    "Gemma-3-270M, 4 x 512": (4, 4, 1, 512, 256, None),
    "the same, its local layers": (4, 4, 1, 512, 256, 512),
    "LLaMA-3.1-8B, 1 x 1024": (1, 32, 8, 1024, 128, None),
}


def torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend as transformers lets PyTorch do on a CPU."""
    wide = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
    made = F.scaled_dot_product_attention(query, *wide, attn_mask=mask, is_causal=mask is None)
    return made.transpose(1, 2)


def run(
    attend: Callable[..., Tensor], given: list[Tensor], mask: Tensor | None, back: Tensor
) -> tuple[float, float, list[Tensor]]:
    """Return the seconds of one pass there and of there and back, and what comes of it."""
    leaves = [one.clone().requires_grad_() for one in given]
    began = time.process_time()
    made = attend(*leaves, mask)
    there = time.process_time() - began
    made.backward(back)
    whole = time.process_time() - began
    return there, whole, [made.detach(), *(one.grad for one in leaves if one.grad is not None)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=8, help="the fastest is taken")
    options = parser.parse_args()
    print(f"{machine()}, commit {commit()}\n")
    print("| shape | PyTorch: ms there | and back | error | slices: there | and back | error |")
    print("|---|---|---|---|---|---|---|")
    for name, (rows, heads, shared, positions, width, window) in SHAPES.items():
        torch.manual_seed(0)
        given = [torch.randn(rows, n, positions, width).bfloat16() for n in (heads, shared, shared)]
        back = torch.randn(rows, positions, heads, width).bfloat16()
        mask = None
        if window is not None:
            at, of = torch.arange(positions)[:, None], torch.arange(positions)
            mask = ((of <= at) & (of > at - window)).expand(rows, 1, -1, -1)
        exact = run(torchs, [one.double() for one in given], mask, back.double())[2]
        cells = [name]
        for attend in (torchs, sliced_attention):
            runs = [run(attend, given, mask, back) for _ in range(options.repeats)]
            off = max(
                ((one.double() - truth).norm() / truth.norm()).item()
                for one, truth in zip(runs[0][2], exact, strict=True)
            )
            there, whole = (1000 * min(one[at] for one in runs) for at in (0, 1))
            cells += [f"{there:.1f}", f"{whole:.1f}", f"{off:.4f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
