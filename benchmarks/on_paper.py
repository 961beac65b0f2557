"""What the cost model says of large models on one accelerator that is not here.

    python benchmarks/on_paper.py [--tflops 989] [--memory-gb 80] [--bandwidth 3350]

For LLaMA-3.1-8B and 70B at 128 rows of 2,048 tokens: FLOP of every part by the formulas of
calmix/study/cost.py, seconds on the accelerator, and the memory plan of calmix/pruning/budget.py.
Nothing is measured.
"""

from __future__ import annotations

import argparse

from calmix.pruning.budget import GIB, make_plan, solver_bytes
from calmix.pruning.budget import Sizes as Held
from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from calmix.study.cost import Sizes, on_paper, prune_seconds

ROWS, LENGTH, MICRO = 128, 2048, 2048
MODELS = {
    "LLaMA-3.1-8B": Sizes(32, 4096, 14336, 4096, 1024, 128256),
    "LLaMA-3.1-70B": Sizes(80, 8192, 28672, 8192, 1024, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=989)
    parser.add_argument("--memory-gb", type=float, default=80)
    parser.add_argument("--bandwidth", type=float, default=3350)
    options = parser.parse_args()
    device = on_paper(options.tflops, options.memory_gb, options.bandwidth)
    tokens = ROWS * LENGTH
    print(f"{device.name}; {ROWS} x {LENGTH} tokens, SparseGPT 60 %\n")
    print("| model | part | FLOP | seconds |\n|---|---|---|---|")
    for name, sizes in MODELS.items():
        inputs, blocks = sizes.inputs, sizes.blocks
        method = get_method("sparsegpt")
        solves = [method.work(d, r) for d, r in inputs]
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
            copies=False,
            outside_bytes=2 * sizes.vocabulary * sizes.hidden,
            layers=layers,
            hidden=sizes.hidden,
            rows=ROWS,
            length=LENGTH,
            value_bytes=2,
            methods=[method],
        )
        plan = make_plan(held, int(options.memory_gb * 1e9), 0, MICRO, sequential=True)
        paused = "all" if plan.paused is None else plan.paused
        print(
            f"| {name} | {2 * sizes.weights / GIB:.0f} GiB | {held.block_bytes / GIB:.2f} GiB "
            f"| {solver_bytes(held) / GIB:.1f} GiB | {plan.needed / GIB:.1f} GiB | {paused} |"
        )


if __name__ == "__main__":
    main()
