"""Our scorer against lm-evaluation-harness's own HFLM: the same scores, and how much faster?

    python benchmarks/eval_parity.py [--dtype float32] [--limit N] [--batch-sizes 4,16]
        [--tasks ...] [-o FILE]

Both are asked the same requests of the `offline` suite with the same model in memory, task by task
one after the other; without --limit the whole suite. HFLM is first tried at each batch size on a
few items of every task, and then runs with its fastest. Times are the process's processor
seconds, which other work on the machine hardly changes, and the wall clock's. With -o what is
measured is kept, a line a task, and a later run goes on from there (`--tasks` for a part of them).
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import commit, machine
from lm_eval.models.huggingface import HFLM

from calmix.evaluation.evaluate import accuracies
from calmix.evaluation.scorer import Scorer
from calmix.evaluation.suites import Suite, choose
from calmix.evaluation.tasks import load_items
from calmix.models.opening import open_model
from calmix.progress import quiet

TIE = 1e-3  # choices whose log-likelihoods are this close, relatively, may swap by rounding


def run(lm: Any, suite: Suite) -> tuple[float, float, dict[str, list[list[float]]]]:
    """Return processor seconds, seconds on the wall, and log-likelihoods by task and item."""
    items = {name: load_items(spec) for name, spec in suite.tasks.items()}
    asked = [(name, *one) for name in items for i in items[name] for one in i.requests]
    ours = isinstance(lm, Scorer)
    requests: Any = asked if ours else [SimpleNamespace(args=request[1:]) for request in asked]
    with quiet():
        start, wall = time.process_time(), time.perf_counter()
        found = lm.loglikelihood(requests, **({} if ours else {"disable_tqdm": True}))
        seconds = time.process_time() - start, time.perf_counter() - wall
    answers = iter(found if ours else [value for value, _ in found])
    return *seconds, {
        name: [list(islice(answers, len(item.requests))) for item in held]
        for name, held in items.items()
    }


def hflm(opened: Any, batch_size: int) -> HFLM:
    import lm_eval.models.huggingface as module

    module.tqdm = lambda *a, **k: _Silent(*a)
    with quiet():
        return HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)


class _Silent:
    """Stands in for a progress bar."""

    def __init__(self, items: Any = ()) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)

    def update(self, _: int = 1) -> None: ...

    def close(self) -> None: ...


def beside(lm: Scorer, rival: HFLM, suite: Suite, task: str) -> dict[str, Any]:
    """Run one task with both, and return how they compare."""
    alone = choose(suite, tasks=[task])
    ours_seconds, ours_wall, ours = run(lm, alone)
    theirs_seconds, theirs_wall, theirs = run(rival, alone)
    a, b = ours[task], theirs[task]
    difference = max(
        abs(x - y) / abs(y)
        for mine, other in zip(a, b, strict=True)
        for x, y in zip(mine, other, strict=True)
    )
    spec, items = suite.tasks[task], load_items(suite.tasks[task])
    same = ties = 0
    for item, mine, other, scores in zip(
        items, accuracies(spec, items, a), accuracies(spec, items, b), b, strict=True
    ):
        same += mine == other
        if mine != other:
            sizes = [len(c) - 1 if spec.metric == "acc_norm" else 1 for _, c in item.requests]
            first, second = sorted(np.divide(scores, sizes))[-2:][::-1]
            ties += abs(first - second) <= TIE * abs(first)
    return {
        "task": task,
        "items": len(items),
        "requests": sum(map(len, a)),
        "difference": difference,
        "same": same,
        "ties": int(ties),
        "ours": [ours_seconds, ours_wall],
        "theirs": [theirs_seconds, theirs_wall],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-sizes", default="4,16")
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    opened = open_model(options.model, dtype=options.dtype)
    suite = choose("offline", tasks=options.tasks, limit=options.limit)
    there = options.output is not None and options.output.is_file()
    found = [json.loads(line) for line in options.output.read_text().splitlines()] if there else []
    print(machine(), f"commit {commit()}")
    print(
        f"{options.model} in {opened.model.dtype}, suite offline version {suite.version}, "
        f"{options.limit or 'all'} items a task"
    )
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    if len(sizes) > 1:
        trial = choose("offline", limit=2)
        seconds = {size: run(hflm(opened, size), trial)[0] for size in sizes}
        told = ", ".join(f"batch {size} {value:.1f}" for size, value in seconds.items())
        print(f"HFLM, 2 items a task, processor seconds: {told}")
        sizes = [min(seconds, key=seconds.__getitem__)]
    form = "{:<18} {:>6} {:>9} {:>12} {:>6} {:>5} {:>9} {:>7} {:>6}"
    print(
        form.format(
            "task",
            "items",
            "requests",
            "max rel diff",
            "same",
            "ties",
            "HFLM, s",
            "ours, s",
            "times",
        )
    )
    done = {one["task"]: one for one in found if one["task"] in suite.tasks}
    scorer, rival = Scorer(opened), hflm(opened, sizes[0])
    for task in suite.tasks:
        one = done.get(task) or beside(scorer, rival, suite, task)
        if task not in done:
            done[task] = one
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(one) + "\n")
        mine, other = one["ours"][0], one["theirs"][0]
        print(
            form.format(
                task,
                one["items"],
                one["requests"],
                f"{one['difference']:.1e}",
                one["same"],
                one["ties"],
                f"{other:.1f}",
                f"{mine:.1f}",
                f"{other / mine:.1f}",
            ),
            flush=True,
        )
    wrong = sum(one["items"] - one["same"] - one["ties"] for one in done.values())
    print(
        f"largest relative difference of a log-likelihood: "
        f"{max(one['difference'] for one in done.values()):.1e}"
    )
    print(f"results that differ, ties aside: {wrong}")
    mine, other = (
        np.sum([one[who] for one in done.values()], axis=0) for who in ("ours", "theirs")
    )
    print(
        f"HFLM (batch {sizes[0]}) {other[0]:.0f} processor seconds, calmix {mine[0]:.0f}: "
        f"{other[0] / mine[0]:.1f} times as fast ({other[1] / mine[1]:.1f} by the wall clock)"
    )


if __name__ == "__main__":
    main()
