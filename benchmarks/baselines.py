"""What a study's retention is against each baseline of its likelihoods, and by accuracy.

    python benchmarks/baselines.py STORE [--pattern 60%]

STORE is a study, run or exported. For each condition of the pattern: the total of every set, in
percent, counted from a code of single tokens; from the better, item by item, of that code and the
dense model without the question, where the scores hold both; and in accuracy above chance, items
pooled. Then the leads of each mix and written set over the best single source and the first set,
in points with 95 % intervals over items and seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from calmix.analysis.analyse import ConditionAnalysis, Settings, analyse
from calmix.analysis.bootstrap import Estimate
from calmix.evaluation.measures import Measure
from calmix.study import StudyResults, read_results

COLUMNS = ("single tokens", "better of two", "accuracy")


def anchored(results: StudyResults, column: str, pattern: str) -> dict[str, ConditionAnalysis]:
    """The analysis of each condition of a pattern under one of the columns."""
    measure: Measure = "accuracy" if column == "accuracy" else "primary"
    if column == "single tokens":
        dense = {
            model: tuple(replace(task, floors=()) if task.unigram else task for task in tasks)
            for model, tasks in results.dense.items()
        }
        results = results.model_copy(update={"dense": dense})
    found = analyse(results, Settings(measure=measure, permutations=20), sparsity=pattern)
    return {one.condition.label: one for one in found.conditions}


def told(one: Estimate | None) -> str:
    if one is None or one.value is None:
        return "-"
    interval = "" if one.low is None else f" [{100 * one.low:.1f}, {100 * one.high:.1f}]"
    return f"{100 * one.value:.1f}{interval}"


def show(found: list[ConditionAnalysis]) -> None:
    first = found[0]
    names, dimensions = first.joint.cells.sets, first.joint.cells.dimensions
    print(f"\n## {first.condition.label}\n\n| set | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---|' * len(COLUMNS)}")
    order = sorted(range(len(names)), key=lambda at: -found[1].joint.values[at, 0])
    for at in order:
        cells = [told(one.joint.mean([at], 0).estimate()) for one in found]
        print(f"| {names[at]} | {' | '.join(cells)} |")
    best = names[order[0]]
    for number, dimension in enumerate(dimensions, 1):
        cells = [told(one.joint.mean([order[0]], number).estimate()) for one in found]
        print(f"| {best}: {dimension} | {' | '.join(cells)} |")
    leads = [
        {(d.left, d.right.split(",")[0]): d.gap for d in one.differences if d.quantity == "total"}
        for one in found
    ]
    for left, right in leads[1]:
        gaps = [one.get((left, right)) for one in leads]
        print(f"| {left} - {right} | {' | '.join(map(told, gaps))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--pattern", default="60%")
    options = parser.parse_args()
    results = read_results(options.store)
    by_column = [anchored(results, column, options.pattern) for column in COLUMNS]
    print(f"# {results.name}, {options.pattern}: retention in %")
    for label in by_column[0]:
        show([found[label] for found in by_column])


if __name__ == "__main__":
    main()
