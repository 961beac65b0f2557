"""Where the noise of kept answers and of KL comes from: text, seed, item and task.

    python benchmarks/noise.py STORE [--points 2]

STORE is `studies/noise.yaml` as run: sets with several seeds each, asked the items that the dense
model gets right. For each method a row a text (mean and standard deviation over seeds of answers
kept and of KL), then standard deviations in points: between texts with the noise taken out, between
seeds of one text on these items (and by the same for KL, in nats and in per cent of the mean), and,
of the difference of two texts' means, from items and from tasks resampled (median over pairs).
Last, the seeds of each set that detect a difference of --points (80 % power, `analysis.power`), and
the same for a hundredth part of KL's mean times --points.
"""

from __future__ import annotations

import argparse
import math
from itertools import combinations
from pathlib import Path

import numpy as np

from calmix.analysis.power import needed
from calmix.evaluation.suites import WRITTEN
from calmix.study import StudyResults, read_results


def right(results: StudyResults, trial: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether each answer that the dense model gets right is right, and its task's number."""
    found, tasks = [], []
    pairs = zip(results.paired[trial], results.scores[trial], strict=True)
    for number, (dense, pruned) in enumerate(pair for pair in pairs if pair[0].metric in WRITTEN):
        both = zip(dense.values, pruned.values, strict=True)
        known = [float(after >= 1) for before, after in both if before >= 1]
        found += known
        tasks += [number] * len(known)
    return np.array(found), np.array(tasks)


def table(results: StudyResults, method: str, points: float) -> None:
    """Print the rows and the parts of the noise of one method."""
    trials = [trial for trial in results.trials if trial.method == method]
    texts = list(dict.fromkeys(trial.calibration for trial in trials))
    answers, distances = [], []
    print(f"\n| {method}: text | seeds | answers kept, % | KL, nats |\n|---|---|---|---|")
    for text in texts:
        alike = [trial for trial in trials if trial.calibration == text]
        answers.append(np.array([right(results, trial.id)[0] for trial in alike]))
        far = [trial.distance["total"]["kl_mean"] for trial in alike if trial.distance]
        distances.append(np.array(far))
        kept = 100 * answers[-1].mean(1)
        print(
            f"| {text} | {len(alike)} | {kept.mean():.1f} ± {kept.std(ddof=1):.1f} "
            f"| {np.mean(far):.3f} ± {np.std(far, ddof=1):.3f} |"
        )
    tasks = right(results, trials[0].id)[1]
    freedom = sum(len(each) - 1 for each in answers)
    seed, text = spread([100 * each.mean(1) for each in answers])
    items, by_task = zip(*(paired(a, b, tasks) for a, b in combinations(answers, 2)), strict=True)
    item, task = math.sqrt(max(0.0, np.median(items))), math.sqrt(max(0.0, np.median(by_task)))
    print(
        f"answers, {len(tasks)} right in the dense model: text {text:.1f}, seed {seed:.1f}, "
        f"items {item:.1f}, tasks {task:.1f} points"
    )
    wanted = needed(points / 100, seed / 100, freedom, item / 100)
    more = wanted.draws_items or f"none; {wanted.items:.0f} times the items"
    print(f"{points:g} points need {wanted.draws} seeds on these items, for others too: {more}")
    seed, text = spread(distances)
    mean = float(np.mean(np.concatenate(distances)))
    share = points / 100 * mean
    wanted = needed(share, seed, freedom, 0.0)
    print(
        f"KL, mean {mean:.3f}: text {text:.4f}, seed {seed:.4f} ({100 * seed / mean:.1f} %); "
        f"{points:g} % of it ({share:.4f}) need {wanted.draws} seeds"
    )


def spread(groups: list[np.ndarray]) -> tuple[float, float]:
    """The standard deviation within groups, and between them without that of their means."""
    within = sum(((each - each.mean()) ** 2).sum() for each in groups)
    within /= sum(len(each) - 1 for each in groups)
    between = np.var([each.mean() for each in groups], ddof=1)
    means = np.mean([within / len(each) for each in groups])
    return math.sqrt(within), math.sqrt(max(0.0, between - means))


def paired(one: np.ndarray, other: np.ndarray, tasks: np.ndarray) -> tuple[float, float]:
    """Variance of the difference of two sets' means, in points squared, over other items without
    what seeds add, and over other tasks."""
    apart = one.mean(0) - other.mean(0)
    chance = one.var(0, ddof=1) / len(one) + other.var(0, ddof=1) / len(other)
    count = len(apart)
    by_item = (apart.var(ddof=1) - chance.mean()) / count
    sums = np.array([(apart - apart.mean())[tasks == task].sum() for task in np.unique(tasks)])
    by_task = (sums**2).sum() / count**2 * len(sums) / (len(sums) - 1)
    return 1e4 * by_item, 1e4 * by_task


def main() -> None:
    """Print a table and the parts for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--points", type=float, default=2.0)
    options = parser.parse_args()
    results = read_results(options.store)
    for method in dict.fromkeys(trial.method for trial in results.trials):
        table(results, method, options.points)


if __name__ == "__main__":
    main()
