"""What the dense model scores on each task of a suite: is it above chance, and what does it cost?

    python benchmarks/suite_dense.py [--suite offline] [--model builtin:smollm2-135m] [--quick]

Tasks are timed one by one, so that their sum exceeds what `calmix evaluate` takes for all.
"""

from __future__ import annotations

import argparse

import torch

from calmix.capability.evaluate import choose, evaluate
from calmix.models import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="offline")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    suite = choose(options.suite, quick=options.quick, tasks=options.task)
    model = open_model(options.model, dtype=options.dtype)
    threads = torch.get_num_threads()
    print(f"{options.model} in {model.model.dtype}, suite {suite.name} version {suite.version}")
    print(f"{'quick slice, ' if options.quick else ''}{threads} threads, torch {torch.__version__}")
    head = ("dimension", "task", "metric", "n", "chance", "dense", "noise", "signal", "s")
    form = "{:<12} {:<18} {:<14} {:>5} {:>7} {:>7} {:>7} {:>7} {:>6}"
    print(form.format(*head))
    total = 0.0
    for name in suite.tasks:
        scores = evaluate(model, suite.only(tasks=[name]))
        task = scores.tasks[0]
        total += scores.seconds
        chance = f"{task.chance:.3f}" if task.kind == "accuracy" else "-"
        print(
            form.format(
                task.dimension,
                task.name,
                task.metric,
                len(task.items),
                chance,
                f"{task.score:.3f}",
                f"{task.noise:.3f}",
                "yes" if task.signal else "no",
                f"{scores.seconds:.1f}",
            ),
            flush=True,
        )
    whole = evaluate(model, suite)
    print(f"one by one {total:.1f} s, all in one run {whole.seconds:.1f} s (model loading aside)")


if __name__ == "__main__":
    main()
