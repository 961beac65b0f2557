"""Ways to calibrate against each other, from a study's results: the tables of docs/results.md.

Prints, for one method and sparsity, total and worst-dimension retention of the named calibration
sets with 95 % intervals, and the differences between the first and the others. Only seeds that
every named set has are used, so that all are averaged over the same draws.

    python studies/strategies.py out/smollm2-offline igsp self-cal sgs mix-15 math-solutions
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from calmix.analysis import ConditionAnalysis, Settings, analyse
from calmix.analysis.bootstrap import Estimate
from calmix.analysis.differences import BEST
from calmix.study.results import StudyResults
from calmix.study.store import read_results


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def shown(one: Estimate) -> str:
    """A mean with its interval for other draws and other items."""
    return f"{percent(one.value)} [{percent(one.low)}, {percent(one.high)}]"


def signed(one: Estimate, sign: int) -> str:
    """A difference, turned where `sign` is -1, with its interval and p."""
    ends = (one.low, one.high) if sign > 0 else (one.high, one.low)
    value, low, high = (None if part is None else 100 * sign * part for part in (one.value, *ends))
    interval = "" if low is None or high is None else f" [{low:+.1f}, {high:+.1f}]"
    return "-" if value is None else f"{value:+.1f}{interval}"


def chosen(results: StudyResults, sets: Sequence[str], method: str, pattern: str) -> StudyResults:
    """Return the trials of some sets under one method, at the seeds all of them have."""
    trials = [
        trial
        for trial in results.trials
        if trial.calibration in sets and trial.method == method and trial.pattern == pattern
    ]
    seeds = set.intersection(*({t.seed for t in trials if t.calibration == s} for s in sets))
    kept = tuple(trial for trial in trials if trial.seed in seeds)
    return results.model_copy(update={"trials": kept, "planned": len(kept), "failed": ()})


def table(condition: ConditionAnalysis, dimensions: Sequence[str]) -> None:
    print("| calibration | seeds | total | worst dimension | " + " | ".join(dimensions) + " |")
    print("|---" * (4 + len(dimensions)) + "|")
    for row in condition.ranking:
        parts = " | ".join(percent(row.dimensions[name].value) for name in dimensions)
        print(
            f"| {row.calibration} | {row.total.draws} | {shown(row.total)} "
            f"| {row.worst} {shown(row.lowest)} | {parts} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="a study's folder, or its exported results")
    parser.add_argument("sets", nargs="+", help="calibration sets; the first against the others")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--pattern", default="60%")
    options = parser.parse_args()
    results = chosen(read_results(options.study), options.sets, options.method, options.pattern)
    found = analyse(results, Settings())
    (condition,) = found.conditions
    print(f"{options.method} {options.pattern}, seeds {list(condition.cells.seeds)}\n")
    table(condition, found.dimensions)
    first = options.sets[0]
    print(f"\n| {first} less | quantity | points | p | p for other draws alone |")
    print("|---|---|---|---|---|")
    for other in options.sets[1:]:
        for one in condition.differences:
            sides = {one.left, one.right.removeprefix(BEST)}
            if sides != {first, other} or one.quantity not in ("total", "worst"):
                continue
            told = signed(one.gap, 1 if one.left == first else -1)
            p = ["-" if part is None else f"{part:.3f}" for part in (one.gap.p, one.gap.draw_p)]
            print(f"| {other} | {one.quantity} | {told} | {p[0]} | {p[1]} |")


if __name__ == "__main__":
    main()
