"""Seconds to prune the builtin model: calmix, llm-compressor, and the floor of the machine.

    python benchmarks/speed.py [--rival PYTHON] [--repeats 3] [--pattern 2:4]

Everything is timed in one run on the same ids, the engines in turn. The floor is one forward pass
of the blocks as transformers runs them, plus one Gram matrix per distinct input as plain products
of this machine; Wanda's floor is the forward pass alone. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine, run_rival

from calmix.calibration.build import build
from calmix.machine import MICRO_TOKENS
from calmix.models.blocks import find_blocks
from calmix.models.opening import open_model
from calmix.pruning.engine import prune
from calmix.pruning.patterns import Pattern, Unstructured, as_pattern
from calmix.pruning.trace import Calls, observe_block
from calmix.sources.mixes import parse_mix

MODEL = "builtin:smollm2-135m"
SIXTY = Unstructured(0.6)
MIX = "uniform:python-stdlib,encyclopedia,math-solutions,stories"


@torch.inference_mode()
def floor(ids: torch.Tensor, name: str = MODEL) -> tuple[float, float]:
    """Seconds of one forward pass of the blocks, and of one Gram matrix per distinct input."""
    model = open_model(name).model
    device = next(model.parameters()).device
    found, ids = find_blocks(model), ids.to(device)
    with torch.inference_mode(False):
        few = ids[:1, :8].clone()
        calls = Calls(model, found, few)
        states, batch = calls.record(few)
        layout = [observe_block(found, i, batch, states)[0] for i in range(len(found))]
    hidden, batches = zip(*map(calls.record, ids.split(MICRO_TOKENS // ids.shape[1])), strict=True)
    hidden = list(hidden)
    for number in range(2):  # a warm-up: the first products of a process are slow
        batches[number % len(batches)].run(0, hidden[number % len(batches)], keep=False)
    began = now(device)
    for index in range(len(found)):
        for number, batch in enumerate(batches):
            hidden[number] = batch.run(index, hidden[number])
    forward = now(device) - began
    torch.set_float32_matmul_precision("medium")
    gram = 0.0
    for inputs in layout:
        for shared in inputs:
            columns = shared[0].shape[1]
            x = torch.randn(MICRO_TOKENS, columns, device=device).bfloat16().float()
            total = torch.zeros(columns, columns, device=device)
            began = now(device)
            for _ in range(ids.numel() // MICRO_TOKENS):
                total.addmm_(x.T, x)
            gram += now(device) - began
    torch.set_float32_matmul_precision("highest")
    return forward, gram


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def ours(ids: torch.Tensor, method: str, propagation: str, pattern: Pattern) -> dict[str, float]:
    """Seconds of one prune by activity."""
    model = open_model(MODEL).model
    report = prune(model, ids, method=method, pattern=pattern, propagation=propagation)
    return report.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rival", help="interpreter with llmcompressor")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda"])
    parser.add_argument("--sequential-only", action="store_true", help="leave block out")
    parser.add_argument("--pattern", action="append", default=[], help="an N:M pattern, timed too")
    options = parser.parse_args()
    targets: list[tuple[str, str, Pattern]] = [("sequential", "sequential", SIXTY)]
    if not options.sequential_only:
        targets.append(("block", "block", SIXTY))
    for text in options.pattern:
        targets.append((f"sequential {text}", "sequential", as_pattern(text)))
    opened = open_model(MODEL)
    ids = build(parse_mix(MIX), opened, rows=options.rows, length=options.length).ids
    print(f"{datetime.date.today()}, commit {commit()}, {machine()}")
    print(f"{MODEL}, {options.rows} x {options.length} tokens, 60 %, {options.repeats} repeats\n")
    floors: list[tuple[float, float]] = []
    times: dict[str, list[dict[str, float]]] = {}
    rivals: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        floors.append(floor(ids))
        for method in options.methods:
            for name, propagation, pattern in targets:
                times.setdefault(f"{method} {name}", []).append(
                    ours(ids, method, propagation, pattern)
                )
            for dtype in ("bfloat16", "float32") if options.rival else ():
                told = run_rival(
                    options.rival,
                    ids,
                    model=opened.folder,
                    method=method,
                    sparsity=0.6,
                    dtype=dtype,
                )
                rivals.setdefault(f"{method} {dtype}", []).append(told["seconds"])
    forward = statistics.median(f for f, _ in floors)
    gram = statistics.median(g for _, g in floors)
    print("| what | seconds (median) | spread | over the floor |\n|---|---|---|---|")
    print(f"| floor: forward of the blocks | {forward:.1f} | | |")
    print(f"| floor: Gram matrices | {gram:.1f} | | |")
    medians = {}
    for name, runs in times.items():
        totals = [run["total"] for run in runs]
        medians[name] = statistics.median(totals)
        base = forward + gram if name.startswith("sparsegpt") else forward
        print(
            f"| calmix {name} | {medians[name]:.1f} | {min(totals):.1f}-{max(totals):.1f} "
            f"| {medians[name] / base:.2f} |"
        )
    for name, totals in rivals.items():
        print(
            f"| llm-compressor {name} | {statistics.median(totals):.1f} "
            f"| {min(totals):.1f}-{max(totals):.1f} | |"
        )
    print()
    for method in options.methods:
        fastest = [statistics.median(v) for k, v in rivals.items() if k.startswith(method)]
        if fastest:
            ratio = medians[f"{method} sequential"] / min(fastest)
            print(f"{method}: calmix takes {ratio:.2f} of llm-compressor's faster dtype")


if __name__ == "__main__":
    main()
