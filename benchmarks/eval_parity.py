"""Our scorer against lm-evaluation-harness's own HFLM: the same scores, and how much faster?

    python benchmarks/eval_parity.py [--dtype float32] [--limit N] [--batch-sizes 4,16]

Both run the same task objects of the `offline` suite with the same model in memory, one after
the other; without --limit the whole suite. HFLM is first tried at each batch size on a few items
of every task, and then runs with its fastest.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.huggingface import HFLM

from calmix.capability.evaluate import choose
from calmix.capability.scorer import Scorer
from calmix.capability.suites import Suite
from calmix.capability.tasks import build_tasks, quiet_harness
from calmix.models import open_model

TIE = 1e-3  # choices whose log-likelihoods are this close, relatively, may swap by rounding


def run(lm: Any, suite: Suite) -> tuple[float, dict[str, Any]]:
    tasks = {built.name: built.parts[built.name] for built in build_tasks(suite)}
    with quiet_harness():
        start = time.perf_counter()
        results = harness_evaluate(lm, tasks, bootstrap_iters=0, log_samples=True)
        return time.perf_counter() - start, results["samples"]


def hflm(opened: Any, batch_size: int) -> HFLM:
    import lm_eval.models.huggingface as module

    module.tqdm = lambda *a, **k: _Silent(*a)
    with quiet_harness():
        return HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)


class _Silent:
    """Stands in for a progress bar."""

    def __init__(self, items: Any = ()) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)

    def update(self, _: int = 1) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-sizes", default="4,16")
    options = parser.parse_args()
    opened = open_model(options.model, dtype=options.dtype)
    suite = choose("offline", limit=options.limit)
    threads = torch.get_num_threads()
    items = f"{options.limit or 'all'} items a task"
    print(f"{options.model} in {opened.model.dtype}, offline suite, {items}")
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    if len(sizes) > 1:
        trial = choose("offline", limit=2)
        seconds = {size: run(hflm(opened, size), trial)[0] for size in sizes}
        print(
            "HFLM, 2 items a task:", ", ".join(f"batch {b} {s:.1f} s" for b, s in seconds.items())
        )
        best = min(seconds, key=seconds.__getitem__)
    else:
        best = sizes[0]
    ours_seconds, ours = run(Scorer(opened), suite)
    theirs_seconds, theirs = run(hflm(opened, best), suite)
    form = "{:<18} {:>6} {:>9} {:>14} {:>12} {:>6}"
    print(form.format("task", "items", "requests", "max rel diff", "same result", "ties"))
    worst, wrong = 0.0, 0
    for name, rows in ours.items():
        pairs = list(zip(rows, theirs[name], strict=True))
        a = [np.array([float(r[0][0]) for r in row["resps"]]) for row, _ in pairs]
        b = [np.array([float(r[0][0]) for r in row["resps"]]) for _, row in pairs]
        difference = max(
            float(np.max(np.abs(x - y) / np.abs(y))) for x, y in zip(a, b, strict=True)
        )
        metric = rows[0]["metrics"][0]
        same = ties = 0
        for (mine, other), scores in zip(pairs, b, strict=True):
            if metric == "bits_per_byte" or mine[metric] == other[metric]:
                same += 1
                continue
            first, second = sorted(scores / _lengths(mine, metric))[-2:][::-1]
            ties += abs(first - second) <= TIE * abs(first)
        worst, wrong = max(worst, difference), wrong + len(pairs) - same - ties
        requests = sum(map(len, a))
        print(form.format(name, len(pairs), requests, f"{difference:.1e}", same, ties))
    print(f"largest relative difference of a log-likelihood: {worst:.1e}")
    print(f"results that differ, ties aside: {wrong}")
    print(
        f"HFLM (batch {best}) {theirs_seconds:.1f} s, calmix {ours_seconds:.1f} s: "
        f"{theirs_seconds / ours_seconds:.1f} times as fast ({threads} threads)"
    )


def _lengths(row: Any, metric: str) -> Any:
    texts = [argument[1] for argument in row["arguments"]]
    return np.array([len(text) - 1 if metric == "acc_norm" else 1 for text in texts])


if __name__ == "__main__":
    main()
