"""Where the time of a study trial goes: seconds by stage, and by kind of operation.

    python benchmarks/profile_trial.py [--suite offline] [--full]

A trial on the builtin model: open, draw a mix, measure it, prune by SparseGPT to 60 %, score the
quick slice of a suite (`--full`: all of it); then 64 rows of 171 tokens are written, what a
self-generated set adds. The stages are timed without the profiler, scoring and writing run once
more under it. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import commit, machine
from torch.profiler import ProfilerActivity, profile

import calmix
from calmix.calibration.measuring import measure_set
from calmix.calibration.selfgen.writing import Request, write

MODEL = "builtin:smollm2-135m"
MIX = "uniform:python-stdlib,encyclopedia,math-solutions,stories"
WRITTEN = (64, 171)  # rows and tokens
# The kind of an operation is the first whose word its name contains.
KINDS = {
    "attention": ("attention",),
    "matrix products": ("mm", "linear", "matmul", "mkldnn"),
    "softmax, sorting, sums": ("softmax", "logsumexp", "sort", "topk", "sum", "max"),
    "copies": ("copy", "cat", "index", "gather", "scatter", "select", "clone"),
}


def kind_of(name: str) -> str:
    """Return the kind of an operation."""
    found = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(found, "the rest: element by element, and Python")


def profiled(work: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Run something; return its seconds, and those of its operations by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        began = time.perf_counter()
        work()
        whole = time.perf_counter() - began
    kinds: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = kind_of(event.key)
        kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    rest = kind_of("")
    kinds[rest] = whole - sum(value for kind, value in kinds.items() if kind != rest)
    return whole, kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="offline")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    print(f"commit {commit()}, {machine()}\n")
    stages: dict[str, float] = {}

    def stage(name: str, work: Callable[[], object]) -> object:
        began = time.perf_counter()
        done = work()
        stages[name] = time.perf_counter() - began
        return done

    def score() -> object:
        return calmix.evaluate(opened, options.suite, quick=not options.full)

    def generate() -> object:
        # Nothing is read from earlier runs.
        with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, CALMIX_CACHE=empty):
            rows, length = WRITTEN
            request = Request([[[9906]]] * rows, length, [1.0] * rows, seed=0)
            return write(opened, request, batch=rows)

    opened = stage("open the model", lambda: calmix.open_model(MODEL))
    drawn = stage("draw 64 x 512 tokens", lambda: calmix.resolve(MIX, opened, rows=64, length=512))
    stage("measure them", lambda: measure_set(drawn, opened))
    report = stage(
        "prune",
        lambda: calmix.prune(
            opened.model, drawn.ids, method="sparsegpt", pattern=calmix.Unstructured(0.6)
        ),
    )
    part = "whole" if options.full else "quick slice"
    stage(f"score suite {options.suite}, {part}", score)
    stage(f"write {WRITTEN[0]} x {WRITTEN[1]} tokens", generate)
    print("| stage | seconds |\n|---|---|")
    for name, taken in stages.items():
        print(f"| {name} | {taken:.1f} |")
    parts = ("prepare", "forward", "statistics", "solve")
    print("\nprune: " + ", ".join(f"{key} {report.seconds[key]:.1f} s" for key in parts))
    found = {"scoring": profiled(score), "writing": profiled(generate)}
    print("\n| seconds of | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    for kind in [*KINDS, kind_of("")]:
        print(
            f"| {kind} | " + " | ".join(f"{k.get(kind, 0):.1f}" for _, k in found.values()) + " |"
        )
    print(
        "| all, with the profiler | "
        + " | ".join(f"{all_:.1f}" for all_, _ in found.values())
        + " |"
    )


if __name__ == "__main__":
    main()
