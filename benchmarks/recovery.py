"""Time and memory of ADMM and of recovery, beside floors of this machine.

    python benchmarks/recovery.py -o DIR [--model builtin:smollm2-135m] [--ways ...]

Each way is a `calmix prune` in a process of its own, on the same 64 x 512 tokens of a mix of four
at 60 %: `sparsegpt`, `admm`, and ADMM with a `calmix recover` by `blocks` and `distill` behind it.
Peak resident memory (the operating system's) stands beside that of `--dry-run` and study plans.
Floors, by plain transformers and PyTorch in this process: one forward pass of the blocks and one
Gram matrix per distinct input (as in speed.py), and for an epoch of recovery one pass there and
back. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine
from speed import MIX, floor

from calmix.calibration.build import build
from calmix.memory import PROGRAM
from calmix.models.blocks import find_blocks
from calmix.models.empty import EmptyModel
from calmix.models.opening import open_model
from calmix.options import RECOVERIES
from calmix.pruning.requests import recover_request
from calmix.recovery.training import recovery_memory
from calmix.sources.mixes import parse_mix

WAYS = {
    "sparsegpt": ("sparsegpt", None),
    "admm": ("admm", None),
    "blocks": ("admm", "blocks"),
    "distill": ("admm", "distill"),
}


def there_and_back(model: str, ids: torch.Tensor) -> float:
    """Seconds of one pass of the blocks there and back, with the gradients of their weights."""
    base = open_model(model).model
    for block in find_blocks(base).blocks:
        block.requires_grad_(True)
    base.train()
    core = base.get_decoder()
    batches = ids.split(2048 // ids.shape[1])
    began = 0.0
    for number, batch in enumerate((batches[0], *batches)):
        if number == 1:  # the first products of a process are slow
            began = time.perf_counter()
        out = core(input_ids=batch, use_cache=False).last_hidden_state
        out.backward(torch.ones_like(out))
        base.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def measured(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """Run a way; return the memory planned before, and what it took."""
    method, recovery = WAYS[way]
    pruned, output = options.output / f"{way}-pruned", options.output / way
    program, rows = [sys.executable, "-m", "calmix"], str(options.rows)
    drawn = ["--calibration", MIX, "--rows", rows, "--overwrite"]
    prune = [
        *program,
        "prune",
        options.model,
        "-o",
        str(pruned),
        "--method",
        method,
        "--sparsity",
        "0.6",
        *drawn,
    ]
    commands = [prune]
    dry = subprocess.run([*prune, "--dry-run", "--json"], capture_output=True, check=True)
    memory = max(stage["memory"] for stage in json.loads(dry.stdout))
    if recovery:
        commands.append(
            [
                *program,
                "recover",
                str(pruned),
                "--against",
                options.model,
                "-o",
                str(output),
                "--method",
                recovery,
                *drawn,
            ]
        )
        request = recover_request(method=recovery, calibration=MIX)
        empty = EmptyModel(options.model)
        memory = max(memory, recovery_memory(empty, request, 512) + PROGRAM)
    began, peak = time.perf_counter(), 0.0
    for command in commands:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        peak = max(peak, usage.ru_maxrss / 2**20)
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    took = time.perf_counter() - began
    made = output if recovery else pruned
    run = json.loads((made / "calmix-run.json").read_text(encoding="utf-8"))
    for folder in (pruned, output):
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "took": took,
        "run": run["seconds"]["total"],
        "memory": memory / 2**30,
        "peak": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"commit {commit()}, {machine()}\n{options.model}, {options.rows} x 512 tokens, 60 %\n")
    # First, while this process is small: a child begins with its parent's peak on its account.
    found = {way: measured(options, way) for way in options.ways}
    opened = open_model(options.model)
    ids = build(parse_mix(MIX), opened, rows=options.rows, length=512).ids
    del opened
    forward, gram = floor(ids, options.model)
    both = there_and_back(options.model, ids)
    print("| floor | seconds |\n|---|---|")
    for name, value in (
        ("forward of the blocks", forward),
        ("Gram matrices", gram),
        ("the blocks there and back", both),
    ):
        print(f"| {name} | {value:.1f} |", flush=True)
    print("\n| way | seconds | recovery alone | peak, GiB (planned) | over its floor |")
    print("|---|---|---|---|---|")
    for way, one in found.items():
        recovery = WAYS[way][1]
        if recovery:
            part, over = f"{one['run']:.1f}", one["run"] / RECOVERIES[recovery][0] / both
        else:
            part, over = "", one["run"] / (forward + gram)
        print(
            f"| {way} | {one['took']:.1f} | {part} | {one['peak']:.2f} ({one['memory']:.2f}) | "
            f"{over:.2f} |",
        )


if __name__ == "__main__":
    main()
