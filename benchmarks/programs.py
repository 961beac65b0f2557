"""Whether a better solver writes worse programs, and which measure would have told.

    python benchmarks/programs.py STORE [STORE ...] [--methods sparsegpt,admm]

STOREs hold trials asked the items that the dense model gets right. First a row for each model,
pattern, text and seed that both methods were run on: programs kept (of the dense model's right
ones), KL on code (mean and 99th percentile, in nats), top-1 agreement, answers that end by
themselves, and the share of the dense model's own answer written before the first other character.
Then, for each model and measure: its rank correlation with programs kept over all trials of both
methods, and how often it prefers the method that keeps more programs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from calmix.evaluation.behaviour import proportion
from calmix.study import read_results

MEASURES = ("KL", "KL p99", "top1", "ended", "same as dense")
LOW = ("KL", "KL p99")  # lower is better


def alike(one: str, other: str) -> int:
    """Characters that two texts have in common from the start."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def measured(results: Any, trial: Any) -> dict[str, float]:
    """Programs kept and right in the dense model, and each measure."""
    kept, ended, same = [], [], []
    for dense, pruned in zip(results.paired[trial.id], results.scores[trial.id], strict=True):
        if dense.metric != "pass@1":
            continue
        for at, wanted in enumerate(dense.answers):
            if dense.values[at] >= 1:
                kept.append(pruned.values[at] >= 1)
                ended.append(pruned.ended[at])
                same.append(alike(wanted, pruned.answers[at]) / len(wanted))
    far = ((trial.distance or {}).get("dimensions") or {}).get("code") or {}
    return {
        "kept": sum(kept),
        "right": len(kept),
        "share": float(np.mean(kept)),
        "KL": far.get("kl_mean", np.nan),
        "KL p99": far.get("kl_p99", np.nan),
        "top1": far.get("top1", np.nan),
        "ended": float(np.mean(ended)),
        "same as dense": float(np.mean(same)),
    }


def main() -> None:
    """Print the rows of every pair, their sums, and the table of measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--methods", default="sparsegpt,admm")
    options = parser.parse_args()
    methods = options.methods.split(",")
    found: dict[tuple[Any, ...], dict[str, dict[str, float]]] = defaultdict(dict)
    for store in options.stores:
        results = read_results(store)
        for trial in results.trials:
            key = trial.model, trial.pattern, trial.calibration, trial.seed
            if trial.method in methods and trial.method not in found[key]:
                found[key][trial.method] = measured(results, trial)
    pairs = {key: both for key, both in sorted(found.items()) if len(both) == len(methods)}
    print(
        f"| model, pattern, text, seed | programs kept: {' | '.join(methods)} |",
        " | ".join(MEASURES),
        "|",
    )
    print("|---" * (1 + len(methods) + len(MEASURES)) + "|")
    for key, both in pairs.items():
        cells = [f"{both[name]['kept']}/{both[name]['right']}" for name in methods]
        for measure in MEASURES:
            cells.append("; ".join(f"{both[name][measure]:.2f}" for name in methods))
        print(f"| {', '.join(map(str, key))} | {' | '.join(cells)} |")
    for model in dict.fromkeys(key[0] for key in pairs):
        some = [both for key, both in pairs.items() if key[0] == model]
        print(f"\n{model}, {len(some)} pairs")
        for name in methods:
            kept, right = (int(sum(one[name][part] for one in some)) for part in ("kept", "right"))
            share = proportion(kept, right)
            print(f"  {name}: {kept} of {right} programs kept, {100 * share.value:.1f} %")
        apart = [one[methods[1]]["share"] - one[methods[0]]["share"] for one in some]
        for measure in MEASURES:
            sign = -1 if measure in LOW else 1
            every = [(sign * one[measure], one["share"]) for both in some for one in both.values()]
            told = [sign * (one[methods[1]][measure] - one[methods[0]][measure]) for one in some]
            right_sign = [a * b > 0 for a, b in zip(told, apart, strict=True) if b]
            rank = spearmanr(*zip(*every, strict=True)).statistic
            print(
                f"  {measure}: rank {rank:+.2f}, prefers the better one in {sum(right_sign)} of "
                f"{len(right_sign)}"
            )


if __name__ == "__main__":
    main()
