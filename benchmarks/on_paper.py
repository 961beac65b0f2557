"""What the cost model says of large models on one accelerator that is not here.

    python benchmarks/on_paper.py [--tflops 989] [--memory-gb 80] [--bandwidth 3350]

For LLaMA-3.1-8B and 70B at 128 rows of 2,048 tokens: FLOP of every part by the formulas of
calmix/study/cost.py, seconds on the accelerator, and the memory plan of calmix/pruning/budget.py.
With `--traced`, what one block asks of a device: its operations are run on tensors without numbers
and counted (traced.py). Nothing is measured.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from traced import Work, empty_model, tracing
from transformers import AutoConfig

from calmix.machine import WIDE_TOKENS
from calmix.models import find_blocks
from calmix.pruning import Unstructured
from calmix.pruning.budget import GIB, make_plan, solver_bytes
from calmix.pruning.budget import Sizes as Held
from calmix.pruning.engine import Run
from calmix.pruning.gram import Gram, error_work
from calmix.pruning.methods import Method, Solution, get_method
from calmix.pruning.patterns import Pattern, parse_pattern
from calmix.pruning.reading import trusting
from calmix.study.cost import Machine, Sizes, on_paper, prune_seconds

ROWS, LENGTH = 128, 2048
MODELS = {
    "LLaMA-3.1-8B": Sizes(32, 4096, 14336, 4096, 1024, 128256),
    "LLaMA-3.1-70B": Sizes(80, 8192, 28672, 8192, 1024, 128256),
}


TRACED = ("sparsegpt", "sparsegpt@2:4", "admm", "wanda", "wanda,refit=10")
# Kernels that one operation starts where it is more than one. Those of sorting are the passes of a
# radix sort, those of the others what cuSOLVER and cuBLAS start; all assumed, not counted.
KERNELS = {"sort": 10, "argsort": 10, "linalg_cholesky_ex": 100, "linalg_solve_triangular": 6,
           "kthvalue": 2, "cumsum": 2, "scaled_dot_product_attention": 2}  # fmt: skip


def unsolved(self: Method, weights: Any, statistic: Any, patterns: Any) -> Solution:
    """Take a statistic, and leave weights as they are."""
    return Solution(list(weights), [0] * len(weights))


def print_traced(
    models: dict[str, Sizes],
    asked: Sequence[str],
    device: Machine,
    launch: float,
    *,
    kernel: bool,
) -> None:
    """Print kernels, bytes and seconds of one block by method, from traced operations.

    Args:
        models, asked, device, launch: what is counted, and what it is put to.
        kernel: whether kernels written in Triton are taken to run.
    """
    print(f"{device.name}; a block, {ROWS} x {LENGTH} tokens, {WIDE_TOKENS} at a time; "
          f"{launch * 1e6:g} us a kernel\n")  # fmt: skip
    print("| model | method | kernels | of the solve | GB moved | arithmetic, s | starting, s "
          "| share | reads |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name, sizes in models.items():
        config = AutoConfig.for_model(
            "llama", num_hidden_layers=2, vocab_size=64, hidden_size=sizes.hidden,
            intermediate_size=sizes.inner, num_attention_heads=sizes.query // 128, head_dim=128,
            num_key_value_heads=sizes.key // 128, max_position_embeddings=LENGTH,
        )  # fmt: skip
        for text in asked:
            method, _, pattern = text.partition("@")
            found = parse_pattern(pattern) if pattern else Unstructured(0.6)
            passes, solve, reads = traced_block(config, get_method(method), found, kernel=kernel)
            kernels = {part: launches(work) for part, work in (("all", passes + solve),
                                                                ("solve", solve))}  # fmt: skip
            whole = passes + solve
            moved = sum(work.moved * count for work, count in whole.items())
            busy = sum(seconds(work, device) * count for work, count in whole.items())
            start = kernels["all"] * launch
            print(
                f"| {name} | {text} | {kernels['all']} | {kernels['solve']} | {moved / 1e9:.0f} "
                f"| {busy:.2f} | {start:.3f} | {start / busy:.1%} | {reads} |", flush=True,
            )  # fmt: skip


def traced_block(
    config: Any, method: Method, pattern: Pattern, *, kernel: bool
) -> tuple[Counter[Work], Counter[Work], int]:
    """Return what passes and statistics of a block take, what its solves take, and host reads."""
    counts = []
    for batches in (1, 2):
        with mock.patch.object(type(method), "solve", unsolved), tracing(None) as traced:
            model = empty_model(config)
            run = Run(model, find_blocks(model), method, pattern, "sequential")
            ids = torch.zeros(batches * WIDE_TOKENS // LENGTH, LENGTH, dtype=torch.int64)
            run.states = dict(run.record(ids))
            traced.work.clear()
            run.block(0)
            counts.append(traced.work.copy())
    each = counts[1] - counts[0]  # what one micro-batch more takes
    once = counts[0] - each
    passes = once + Counter({w: c * (ROWS * LENGTH // WIDE_TOKENS) for w, c in each.items()})
    with tracing(None, kernel=kernel) as traced:
        model = empty_model(config)
        run = Run(model, find_blocks(model), method, pattern, "sequential")
        own = run.found.prunables(0)
        groups = [own[0:3], own[3:4], own[4:6], own[6:7]]  # of a llama's block, by input
        kind = method.needs
        statistics = [kind(g[0].shape[1], own[0].view().device).matrix() for g in groups]
        traced.work.clear()
        traced.reads.clear()
        with trusting():
            for layers, statistic in zip(groups, statistics, strict=True):
                run._prune((layers, statistic, None))
            run._settle()
        solve, reads = traced.work.copy(), traced.reads.total()
    return passes, solve, reads


def launches(works: Counter[Work]) -> int:
    """Return the kernels that operations start."""
    return sum(KERNELS.get(work.name, 1) * count for work, count in works.items())


def seconds(work: Work, device: Machine) -> float:
    """Return what an operation takes once started: its products or its bytes, whichever is more."""
    rates = {"half": device.forward_flops, "tf32": device.rounded_flops,
             "float32": device.solve_flops, "none": float("inf")}  # fmt: skip
    return max(work.flop / rates[work.precision], work.moved / device.memory_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=989)
    parser.add_argument("--memory-gb", type=float, default=80)
    parser.add_argument("--bandwidth", type=float, default=3350)
    parser.add_argument("--traced", nargs="*", metavar="METHOD[@N:M]", help="count kernels instead")
    parser.add_argument("--without-triton", action="store_true", help="as where it is missing")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--launch-us", type=float, default=5, help="microseconds a kernel's start")
    options = parser.parse_args()
    device = on_paper(options.tflops, options.memory_gb, options.bandwidth)
    if options.traced is not None:
        chosen = {name: MODELS[name] for name in options.models}
        print_traced(
            chosen, options.traced or TRACED, device, options.launch_us * 1e-6,
            kernel=not options.without_triton,
        )  # fmt: skip
        return
    tokens = ROWS * LENGTH
    print(f"{device.name}; {ROWS} x {LENGTH} tokens, SparseGPT 60 %\n")
    print("| model | part | FLOP | seconds |\n|---|---|---|---|")
    for name, sizes in MODELS.items():
        inputs, blocks = sizes.inputs, sizes.blocks
        method = get_method("sparsegpt")
        solves = [method.work(d, r) + error_work(d, r) for d, r in inputs]
        flop = {
            "forward": 2 * sizes.block_weights * tokens
            + 2 * tokens * LENGTH * sizes.query * blocks,
            "statistic": blocks * sum(Gram.work(d, tokens, cpu=False).gram for d, _ in inputs),
            "factor": blocks * sum(work.factor for work in solves),
            "solve": blocks * sum(work.products + work.gram for work in solves),
        }
        seconds = prune_seconds(sizes, ROWS, LENGTH, "sparsegpt", "sequential", device)
        for part, value in flop.items():
            print(f"| {name} | {part} | {value:.1e} | {seconds[part]:.0f} |")
        print(f"| {name} | all | {sum(flop.values()):.1e} | {sum(seconds.values()):.0f} |")
    print("\n| model | weights | one block | solver | peak on the device | paused of 128 |")
    print("|---|---|---|---|---|---|")
    for name, sizes in MODELS.items():
        key, up = sizes.key, sizes.inner
        layers = [(sizes.query, sizes.hidden), (key, sizes.hidden), (key, sizes.hidden),
                  (sizes.hidden, sizes.query), (up, sizes.hidden), (up, sizes.hidden),
                  (sizes.hidden, up)]  # fmt: skip
        held = Held(
            block_bytes=2 * sizes.block_weights // sizes.blocks,
            copies=1,
            outside_bytes=2 * sizes.vocabulary * sizes.hidden,
            layers=layers,
            hidden=sizes.hidden,
            rows=ROWS,
            length=LENGTH,
            value_bytes=2,
            methods=[method],
            accelerator=True,
        )
        plan = make_plan(held, int(options.memory_gb * 1e9), 0, WIDE_TOKENS, sequential=True)
        paused = "all" if plan.paused is None else plan.paused
        print(
            f"| {name} | {2 * sizes.weights / GIB:.0f} GiB | {held.block_bytes / GIB:.2f} GiB "
            f"| {solver_bytes(held) / GIB:.1f} GiB | {plan.needed / GIB:.1f} GiB | {paused} |"
        )


if __name__ == "__main__":
    main()
