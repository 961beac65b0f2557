"""What does the dense model score on each task of a suite, what knowing nothing, at what cost?

    python benchmarks/suite_dense.py [--suite offline] [--model builtin:smollm2-135m] [--quick]

Tasks are timed one by one, so that their sum exceeds what `calmix evaluate` takes for all.
"""

from __future__ import annotations

import argparse

import torch

from calmix.evaluation.evaluate import choose, evaluate
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
    head = ("dimension", "task", "scored by", "n", "floor", "dense", "signal", "accuracy", "s")
    form = "{:<12} {:<17} {:<12} {:>4} {:>7} {:>7} {:>7} {:>9} {:>6}"
    print(form.format(*head))
    total = 0.0
    for name in suite.tasks:
        scores = evaluate(model, suite, tasks=[name])
        task = scores.retention(scores, "primary", resamples=1).tasks[0]
        total += scores.seconds
        print(
            form.format(
                task.dimension,
                task.name,
                task.score,
                task.items,
                "-" if task.floor is None else f"{task.floor:.3f}",
                f"{task.dense:.3f}",
                "yes" if task.signal else "no",
                "-" if task.dense_accuracy is None else f"{task.dense_accuracy:.3f}",
                f"{scores.seconds:.1f}",
            ),
            flush=True,
        )
    whole = evaluate(model, suite)
    pruned = evaluate(model, suite, floors=False)
    print(
        f"one by one {total:.1f} s, all in one run {whole.seconds:.1f} s, "
        f"{pruned.seconds:.1f} s without the floors, as for a pruned model (loading aside)"
    )


if __name__ == "__main__":
    main()
