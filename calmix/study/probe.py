"""A short probe of this machine for the cost model: products, factorisations, column steps, bytes.

It takes a few seconds and as much memory as one block of the model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from calmix.machine import device_memory, total_memory
from calmix.models.attention import attention
from calmix.models.opening import device_of
from calmix.precision import fast_half_precision, large_products, rounded, rounded_product
from calmix.pruning.gram import Gram, factor_flop, inverse_factor
from calmix.pruning.methods.sparsegpt import BLOCK, STEP_VALUES, SparseGPT
from calmix.pruning.patterns import Unstructured
from calmix.pruning.solvers.scaled import ROWS
from calmix.study.cost import Machine, Sizes

TOKENS = 2048  # the engine's micro-batch
LENGTH = 512  # of a row in it
SECONDS = 0.15  # spent on each rate, at least


def probe(sizes: Sizes, device: str = "auto") -> Machine:
    """Measure what this machine does a second at a model's sizes.

    Args:
        sizes: of the model.
        device: torch device; `auto` for an accelerator if there is one.
    """
    target = device_of(device)
    dtype = torch.bfloat16 if sizes.value_bytes == 2 else torch.float32
    if target.type == "cpu" and not fast_half_precision(dtype):
        dtype = torch.float32
    width = min(sizes.hidden, 4096)
    inner = min(sizes.inner, 16384)
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(target, kind)

    tokens, up, down = numbers(TOKENS, width), numbers(width, inner), numbers(inner, width)
    wide = tokens @ up
    with torch.inference_mode():
        once = seconds(lambda: (tokens @ up) @ down, target)
        forward = 4 * TOKENS * width * inner / once
        gram = Gram(width, target)
        once = seconds(lambda: gram.add(tokens), target)
        gram_rate = Gram.work(width, TOKENS, cpu=target.type != "cuda").gram / once
        left, right = numbers(ROWS, width, kind=torch.float32), rounded(gram.matrix())
        once = seconds(lambda: rounded_product(left, right), target)
        products = 2 * ROWS * width**2 / once
        widest = min(max(sizes.hidden, sizes.inner), 4096)  # takes longest by far
        matrix = torch.eye(widest, device=target)
        once = seconds(lambda: inverse_factor(matrix), target)
        factor = factor_flop(widest) / once
        solve = _correction(width, min(inner, 4096), target)
        attention = _attention(sizes, numbers, target)
        cached = _element_wise(wide, target)
        large = torch.zeros(64_000_000, dtype=torch.float32, device=target)
        memory = large.numel() * 4 / seconds(lambda: large.sum(), target)
        step = _step(cached, target, generator)
    named = getattr(torch.get_device_module(target), "get_device_name", lambda _: "this machine")
    return Machine(
        name=named(target),
        forward_flops=forward,
        attention_flops=attention,
        gram_flops=gram_rate,
        rounded_flops=products,
        factor_flops=factor,
        solve_flops=solve,
        step_seconds=step,
        cached_bytes=cached,
        memory_bytes=memory,
        memory=device_memory(target)[2] or total_memory(),
        device="cuda" if target.type == "cuda" else "cpu",
    )


def _attention(sizes: Sizes, numbers: Callable[..., torch.Tensor], device: torch.device) -> float:
    """Return the FLOP a second of causal attention over one micro-batch."""
    rows, heads = TOKENS // LENGTH, max(1, min(sizes.query, 4096) // sizes.head)
    query = numbers(rows, heads, LENGTH, sizes.head)
    once = seconds(lambda: attention(torch.nn.Module(), query, query, query, None), device)
    return 2 * TOKENS * LENGTH * heads * sizes.head / once


def _element_wise(wide: torch.Tensor, device: torch.device) -> float:
    """Return the bytes a second of a gated activation, in place: allocation is not meant."""
    once = seconds(lambda: functional.silu(wide, inplace=True).mul_(wide), device)
    return 5 * wide.numel() * wide.element_size() / once


def _correction(columns: int, outputs: int, device: torch.device) -> float:
    """Return the FLOP a second of correcting all columns after a block of them."""
    weights = torch.zeros(columns, outputs, device=device)
    upper = torch.ones(BLOCK, columns, device=device)
    errors = torch.zeros(BLOCK, outputs, device=device)
    with large_products():
        once = seconds(lambda: weights.addmm_(upper.T, errors, alpha=-1), device)
    return 2 * BLOCK * columns * outputs / once


def _step(cached: float, device: torch.device, generator: torch.Generator) -> float:
    """Return the fixed part of a column step, from solving a narrow layer."""
    columns, rows = 256, 512
    weight = torch.randn(rows, columns, generator=generator).to(device)
    gram = torch.eye(columns, device=device) * 4.0
    whole = seconds(lambda: SparseGPT().solve([weight], gram, [Unstructured(0.5)]), device)
    return max(1e-6, whole / columns - STEP_VALUES * rows * 4 / cached)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the median of as many as fit into a moment."""
    work()
    taken: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS or len(taken) < 3:
        at = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - at)
    return statistics.median(taken)
