"""How often the gate on a user's prompts trips without cause, and how often with one.

    python benchmarks/false_alarms.py FILE.json [...] [--floor 0.95] [--runs 200] [--items N]

FILE is written by `calmix evaluate --against DENSE --prompts mine.jsonl -o FILE`. Its items are
drawn again with replacement, `--runs` times, and `calmix check --keep-at-least` judges each draw:
the dense model's second answers (a trip is a false alarm), then the smaller model's. No model runs.
`--items` draws another number of items than the file has, to learn how many prompts a gate needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from calmix.errors import InputError
from calmix.evaluation.floors import check_floors
from calmix.evaluation.measures import TaskScores
from calmix.evaluation.scores import CapabilityScores, load_pairs

FIELDS = ("items", "values", "answers", "ended", "prompts", "properties")


def drawn(task: TaskScores, at: Sequence[int]) -> TaskScores:
    """Return a task with the items at these places; one that is drawn twice gets two names."""
    fields = {name: tuple(getattr(task, name)[n] for n in at) for name in FIELDS}
    fields["items"] = tuple(f"{item}/{n}" for n, item in enumerate(fields["items"]))
    return replace(task, **fields)


def sampled(
    one: CapabilityScores, tasks: Sequence[TaskScores], places: Sequence[Sequence[int]]
) -> CapabilityScores:
    """Return scores of drawn items, with the repeat, if any, drawn alike."""
    pairs = [(task, at) for task, at in zip(tasks, places, strict=True)]
    again = {task.name: task for task in one.repeat}
    repeat = tuple(drawn(again[task.name], at) for task, at in pairs if task.name in again)
    return replace(one, tasks=tuple(drawn(*pair) for pair in pairs), repeat=repeat)


def trips(
    dense: CapabilityScores, other: Sequence[TaskScores], floor: float, runs: int, items: int | None
) -> tuple[float, float]:
    """Return the shares of draws that trip the gate, and in which it can prove nothing."""
    rng, tripped, silent = np.random.default_rng(0), 0, 0
    names = {task.name for task in other}
    tasks = [task for task in dense.tasks if task.name in names]
    for _ in range(runs):
        places = [
            rng.integers(len(task.items), size=items or len(task.items)).tolist() for task in tasks
        ]
        before = sampled(dense, tasks, places)
        after = sampled(replace(dense, repeat=()), other, places)
        try:
            tripped += not check_floors({"": floor}, [(before, after)]).passed
        except InputError:
            silent += 1
    return tripped / runs, silent / runs


def main() -> None:
    """Print both shares for each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--floor", type=float, default=0.95)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--items", type=int)
    given = parser.parse_args()
    for path, (dense, small) in zip(given.files, load_pairs_each(given.files), strict=True):
        for name, tasks in (("dense again", dense.repeat), (small.model, small.tasks)):
            if tasks:
                tripped, silent = trips(dense, tasks, given.floor, given.runs, given.items)
                print(f"{path.name}  {name}: trips {tripped:.1%}, proves nothing {silent:.1%}")


def load_pairs_each(files: Sequence[Path]) -> list[tuple[CapabilityScores, CapabilityScores]]:
    """Read files that need not be about the same models."""
    return [pair for path in files for pair in load_pairs([path])]


if __name__ == "__main__":
    main()
