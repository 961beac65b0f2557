"""For someone with a GPU: whether it computes what a CPU does, and how fast. One command.

    python benchmarks/gpu.py [--device cuda] [--tiny] [--rows 128] [--length 2048] [--only-own]

Layers of random weights are pruned on both by every method, and blocks in the shapes of known
models on the device alone: seconds by activity, and peak memory beside the
budget's. Then the benchmarks whose tables stand in docs/lab/performance.md run on the device
(`--only-own` leaves them out). Ends with one line to paste into an issue, and with status 1 if
something differs. `--tiny` is for trying the script itself, on a CPU too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import HERE, commit, machine
from transformers import AutoConfig, AutoModelForCausalLM

from calmix.machine import host_memory, tokens_at_once
from calmix.memory import GIB, device_memory, solver_bytes
from calmix.models.opening import device_of
from calmix.pruning.engine import prune
from calmix.pruning.gram import Gram, Squares, relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Pattern, SemiStructured, Unstructured


class Sizes(NamedTuple):
    """A shape of a decoder: widths of its parts."""

    blocks: int
    hidden: int
    inner: int
    query: int
    key: int
    vocabulary: int
    head: int = 64

    @property
    def inputs(self) -> list[tuple[int, int]]:
        """Width of a block's distinct inputs, and outputs of the maps that read each."""
        return [
            (self.hidden, self.query + 2 * self.key),
            (self.query, self.hidden),
            (self.hidden, 2 * self.inner),
            (self.inner, self.hidden),
        ]

    @property
    def block_weights(self) -> int:
        """Weights of all blocks."""
        return self.blocks * sum(width * outputs for width, outputs in self.inputs)


METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "admm", "wanda,refit=10")
PATTERNS: tuple[Pattern, ...] = (Unstructured(0.6), SemiStructured(2, 4))
SHAPES = {
    "tiny": Sizes(2, 64, 128, 64, 32, 320, head=16),
    "SmolLM2-135M": Sizes(2, 576, 1536, 576, 192, 320),
    "LLaMA-3.2-1B": Sizes(2, 2048, 8192, 2048, 512, 320),
    "LLaMA-3.1-8B": Sizes(2, 4096, 14336, 4096, 1024, 320, head=128),
    "LLaMA-3.1-70B": Sizes(2, 8192, 28672, 8192, 1024, 320, head=128),
}
OTHERS = (
    ("speed.py", "--repeats", "1", "--pattern", "2:4"),
    ("scaling.py",),
    ("generation.py",),
)
# Rounding may turn a choice between two weights of nearly the same saliency, and in ADMM's many
# steps what follows from it.
AGREE = {"admm": 0.97}
LEAST = 0.998


def check_statistics(device: torch.device, width: int) -> list[tuple[str, bool, str]]:
    """Sums of half-precision inputs beside those in float64."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = torch.randn(3, 257, width, generator=generator).to(dtype)
        flat = inputs.double().flatten(0, 1)
        exact = flat.T @ flat
        for kind, expected in ((Gram, exact), (Squares, exact.diagonal())):
            sums = kind(width, device)
            for batch in inputs:
                sums.add(batch.to(device))
            made = sums.matrix().cpu().double()
            error = float((made - expected).abs().max() / expected.max())
            name = f"{kind.__name__} of {str(dtype).removeprefix('torch.')}"
            found.append((name, error < 1e-5, f"error {error:.1e}"))
    return found


def check_solvers(device: torch.device, width: int) -> list[tuple[str, bool, str]]:
    """Masks, counts and errors of layers that share one input, beside a CPU's."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * width, width, generator=generator)
    inputs = inputs @ torch.randn(width, width, generator=generator).div_(width**0.5).add_(
        torch.eye(width)
    )
    weights = [torch.randn(rows, width, generator=generator) for rows in (width, width // 2)]
    found = []
    for name in METHODS:
        for pattern in PATTERNS:
            method = get_method(name)
            gram = inputs.T @ inputs
            statistic = {None: None, Gram: gram}.get(method.needs, gram.diagonal().clone())
            here = method.solve(weights, statistic, [pattern] * 2)
            there = method.solve(
                [weight.to(device) for weight in weights],
                None if statistic is None else statistic.to(device),
                [pattern] * 2,
            )
            masks = [
                (a == 0, b.cpu() == 0) for a, b in zip(here.weights, there.weights, strict=True)
            ]
            same = min(float((a == b).float().mean()) for a, b in masks)
            counted = [int(b.sum()) for _, b in masks] == there.pruned == here.pruned
            apart = 0.0
            if method.needs is Gram:
                for weight, a, b in zip(weights, here.weights, there.weights, strict=True):
                    one, other = (relative_error(weight, made, gram) for made in (a, b.cpu()))
                    apart = max(apart, abs(other - one) / one)
            right = counted and same >= AGREE.get(name, LEAST) and apart < 0.01
            told = f"masks agree to {same:.3%}, counts {'right' if counted else 'WRONG'}"
            found.append((f"{name} {pattern}", right, f"{told}, errors apart by {apart:.1e}"))
    return found


def measured(
    sizes: Sizes, method: str, rows: int, length: int, device: torch.device
) -> tuple[dict[str, float], float]:
    """Seconds by activity of two blocks of random weights, and the peak of the device's memory."""
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=2,
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.query // sizes.head,
        num_key_value_heads=sizes.key // sizes.head,
        head_dim=sizes.head,
        max_position_embeddings=max(length, 256),
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    ids = torch.randint(sizes.vocabulary, (rows, length))
    counts = device.type == "cuda"
    if counts:
        torch.cuda.reset_peak_memory_stats(device)
    report = prune(model, ids, method=method, pattern=Unstructured(0.6))
    peak = float(torch.cuda.max_memory_allocated(device)) if counts else float("nan")
    return report.seconds, peak


def print_blocks(device: torch.device, rows: int, length: int, shapes: list[str]) -> list[str]:
    """Print a table of blocks; return it in short."""
    print(f"\nTwo blocks, {rows} x {length} tokens, 60 %: seconds, GiB at the peak / by formula\n")
    print("| shape | method | forward | statistic | solve | all | memory |\n|" + "---|" * 7)
    short = []
    for name in shapes:
        sizes = SHAPES[name]
        total = device_memory(device)[2] or host_memory()[1]
        for method in ("sparsegpt", "wanda"):
            held = formula(sizes, method, rows, length, device)
            if held > total:
                print(f"| {name} | {method} | does not fit: {held / GIB:.1f} GiB ||||||")
                continue
            took, peak = measured(sizes, method, rows, length, device)
            # The last block is run no further than its last input.
            forward, statistic = f"{took['forward']:.2f}", f"{took['statistics']:.2f}"
            solve, whole = f"{took['solve']:.2f}", f"{took['total']:.2f}"
            memory = f"{peak / GIB:.1f} / {held / GIB:.1f}"
            print(f"| {name} | {method} | {forward} | {statistic} | {solve} | {whole} | {memory} |")
            short.append(f"{name} {method} {took['total']:.2f} s")
    return short


def formula(sizes: Sizes, method: str, rows: int, length: int, device: torch.device) -> float:
    """Bytes by the budget's formulas, all of a small model in memory."""
    layers = [(outputs, width) for width, outputs in sizes.inputs]
    paused = rows * length * (3 * sizes.hidden + 2 * sizes.inner) * 2
    running = 9 * tokens_at_once(device) * (sizes.hidden + sizes.inner) * 2
    weights = sizes.block_weights + 2 * sizes.vocabulary * sizes.hidden
    solver = solver_bytes(get_method(method), layers, accelerator=device.type != "cpu")
    return 2.0 * weights + paused + max(solver, running)


def others(tiny: bool) -> list[str]:
    """Run the other benchmarks; return those that failed."""
    small = (
        (
            "speed.py",
            "--repeats",
            "1",
            "--rows",
            "4",
            "--length",
            "64",
            "--methods",
            "wanda",
            "--sequential-only",
        ),
    )
    failed = []
    for script, *options in small if tiny else OTHERS:
        print(f"\n## {script} {' '.join(options)}\n", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *options]).returncode:
            failed.append(script)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only-own", action="store_true", help="leave the other benchmarks out")
    options: Any = parser.parse_args()
    device = device_of(options.device)
    rows, length, width = (4, 32, 64) if options.tiny else (options.rows, options.length, 1024)
    named = "CPU"
    if device.type != "cpu":
        named = f"{device.type} {torch.get_device_module(device).get_device_name(device)}"
    print(f"{named}; {machine()}; commit {commit()}\n")
    print("| what | right | how near |\n|---|---|---|")
    checks = check_statistics(device, width) + check_solvers(device, width)
    for name, right, near in checks:
        print(f"| {name} | {'yes' if right else 'NO'} | {near} |")
    shapes = ["tiny"] if options.tiny else [name for name in SHAPES if name != "tiny"]
    short = print_blocks(device, rows, length, shapes)
    failed = [] if options.only_own else others(options.tiny)
    wrong = [name for name, right, _ in checks if not right] + failed
    right = sum(right for _, right, _ in checks)
    told = [f"{named}, {rows} x {length}: {right} of {len(checks)} right", *short]
    if wrong:
        told.append(f"wrong: {', '.join(wrong)}")
    print(f"\nTo paste: calmix {commit()}, torch {torch.__version__}, {'; '.join(told)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
