"""What each trial of a study keeps of the answers that its dense model gets right.

    python benchmarks/behaviour.py STORE

A row a trial: kept of all right answers, and by dimension, each as kept/right; answers gained; the
share of answers that ended by themselves; and choices that are right beside the dense model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calmix.evaluation.behaviour import proportion
from calmix.evaluation.suites import WRITTEN
from calmix.study import read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    results = read_results(parser.parse_args().store)
    asked = [n for n in results.suite["dimensions"] if n != "commonsense"]
    print("| model | text | method | seed | answers kept, % |", " | ".join(asked),
          "| gained | ended, % | choices right |")  # fmt: skip
    print("|---" * (9 + len(asked) - 1), "|", sep="")
    for trial in results.trials:
        pairs = list(zip(results.dense[trial.model], results.scores[trial.id], strict=True))
        written = [(a, b) for a, b in pairs if a.metric in WRITTEN]
        chosen = [(a, b) for a, b in pairs if a.metric not in WRITTEN]

        def count(name: str | None, written: list = written) -> tuple[int, int, int]:
            items = [
                (x, y) for a, b in written if name in (None, a.dimension)
                for x, y in zip(a.values, b.values, strict=True)
            ]  # fmt: skip
            kept, right = sum(x * y for x, y in items), sum(x for x, _ in items)
            return round(kept), round(right), round(sum(y for _, y in items) - kept)

        kept, right, gained = count(None)
        share = proportion(kept, right)
        ended = [one for _, b in written for one in b.ended]
        choices = [round(sum(sum(t.values) for t in side)) for side in zip(*chosen, strict=True)]
        total = sum(len(a.values) for a, _ in chosen)
        cells = ["{}/{}".format(*count(name)[:2]) for name in asked]
        print(
            f"| {trial.model} | {trial.calibration} | {trial.method} {trial.pattern} | {trial.seed}"
            f" | {100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
            f" | {' | '.join(cells)} | {gained} | {100 * sum(ended) / len(ended):.0f}"
            f" | {choices[1]} of {total}, dense {choices[0]} |"
        )


if __name__ == "__main__":
    main()
