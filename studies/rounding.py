"""What rounding alone does to retention: the same trials of one study run on two machines.

Only trials on given text are compared, whose calibration ids are the same on both; processors
differ in how they round, and pruning carries that into other masks. Prints, for every dimension
and in total, both values and the spread of one run that the differences amount to.

    python studies/rounding.py FIRST SECOND

FIRST and SECOND are studies' folders, or exported results.
"""

from __future__ import annotations

import argparse

from calmix.study.export import read_results
from calmix.study.results import StudyResults, Trial


def given(results: StudyResults) -> dict[str, Trial]:
    """Return the trials calibrated on given text, by id."""
    return {one.id: one for one in results.trials if one.strategy in ("single", "mix")}


def values(trial: Trial) -> list[float]:
    """Retention in total, then by dimension, in percent."""
    intervals = [trial.total, *trial.dimensions.values()]
    return [100 * one.value if one.value is not None else float("nan") for one in intervals]


def spread(differences: list[float]) -> float:
    """Standard deviation of one run, from differences of two: sqrt(mean of squares / 2)."""
    return (sum(one * one for one in differences) / len(differences) / 2) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first")
    parser.add_argument("second")
    options = parser.parse_args()
    first, second = (given(read_results(one)) for one in (options.first, options.second))
    shared = [one for one in first if one in second]
    if not shared:
        parser.error(f"{options.first} and {options.second} share no trial on given text")
    names = ["total", *first[shared[0]].dimensions]
    print("| trial | " + " | ".join(names) + " |")
    print("|---" * (1 + len(names)) + "|")
    differences: list[list[float]] = [[] for _ in names]
    for one in shared:
        pairs = list(zip(values(first[one]), values(second[one]), strict=True))
        for place, (left, right) in zip(differences, pairs, strict=True):
            place.append(right - left)
        trial = first[one]
        label = f"{trial.calibration}, {trial.method} {trial.pattern}, seed {trial.seed}"
        print(f"| {label} | " + " | ".join(f"{a:.1f}, {b:.1f}" for a, b in pairs) + " |")
    rows = {
        "mean difference": [sum(place) / len(place) for place in differences],
        "spread of one run": [spread(place) for place in differences],
    }
    for name, figures in rows.items():
        print(f"| {name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
