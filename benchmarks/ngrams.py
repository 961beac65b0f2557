"""Time and memory of exact 4-gram counting on 10 million tokens, on one core.

    taskset -c 0 python benchmarks/ngrams.py

The ids are drawn from a Zipf law over a vocabulary of 49,152 or 262,144, which is harder than
text: nearly every 4-gram is distinct, and with the larger vocabulary it does not fit into 64 bits.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from calmix.calibration.text_metrics import count_ngrams


def main() -> None:
    """Print seconds and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--length", type=int, default=2000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for vocabulary in (49_152, 262_144):
        weights = 1 / np.arange(1, vocabulary + 1)
        ids = rng.choice(vocabulary, size=arguments.tokens, p=weights / weights.sum())
        ids = rng.permutation(vocabulary)[ids].reshape(-1, arguments.length)
        for n in (1, 2, 3, 4):
            start = time.perf_counter()
            distinct, total = count_ngrams(ids, n)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"vocabulary {vocabulary}, n = {n}: {distinct} distinct of {total} in "
                f"{seconds:.1f} s, peak memory of the process {peak:.2f} GiB"
            )


if __name__ == "__main__":
    main()
