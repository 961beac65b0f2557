"""Time and memory of IGSP's selection on 10,000 candidates of 2,048 tokens.

    python benchmarks/selection.py

The candidates are windows of a long stream drawn from a Zipf law with copied stretches, so that
4-grams repeat within and between candidates as they do in text.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from calmix.calibration.selfgen.generators import objective, select_rows


def main() -> None:
    """Print seconds, peak memory and what the selection did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the candidates to choose")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 49_153)
    ids = rng.choice(49_152, size=(args.candidates, args.length), p=weights / weights.sum())
    for _ in range(3 * args.candidates):  # a stretch of one candidate copied into another
        source, target = rng.integers(0, args.candidates, 2)
        at, to = rng.integers(0, max(1, args.length - 64), 2)
        ids[target, to : to + 64] = ids[source, at : at + 64]
    groups = np.array([f"dimension {i % 4}" for i in range(args.candidates)])
    quota = {f"dimension {i}": int(args.share * args.candidates / 4) for i in range(4)}
    logs = rng.normal(2.5, 0.4, args.candidates) + np.arange(args.candidates) % 4 * 0.1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    tokens = np.full(args.candidates, args.length)
    found = select_rows(ids, groups, logs * args.length, tokens, quota)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(found)} of {args.candidates} candidates of {args.length} tokens in "
        f"{seconds:.1f} s, peak memory {peak:.2f} GiB ({before:.2f} before); J "
        f"{objective(ids[found], groups[found], logs[found] * args.length, tokens[found]):.5f}"
    )


if __name__ == "__main__":
    main()
