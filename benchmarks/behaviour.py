"""What each trial of a study keeps of the answers that its dense model gets right.

    python benchmarks/behaviour.py STORE [--tasks]

A row a trial: kept of all right answers, and by dimension, or by task, each as kept/right; answers
gained (none with `right_only`, which asks no other items); the share of answers that ended by
themselves, of those that are not empty; and choices that are right beside the dense model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calmix.evaluation.behaviour import counted
from calmix.evaluation.suites import WRITTEN
from calmix.study import read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--tasks", action="store_true")
    arguments = parser.parse_args()
    results, by = read_results(arguments.store), "name" if arguments.tasks else "dimension"
    first = results.paired[results.trials[0].id]
    asked = list(dict.fromkeys(getattr(one, by) for one in first if one.metric in WRITTEN))
    print(
        "| model | text | method | seed | answers kept, % |",
        " | ".join(asked),
        "| gained | ended, % | choices right |",
    )
    print("|---" * (9 + len(asked) - 1), "|", sep="")
    for trial in results.trials:
        pairs = list(zip(results.paired[trial.id], results.scores[trial.id], strict=True))
        written = [(a, b) for a, b in pairs if a.metric in WRITTEN]
        chosen = [(a, b) for a, b in pairs if a.metric not in WRITTEN]
        whole = counted("all", written)
        parts = [
            counted(name, [two for two in written if getattr(two[0], by) == name]) for name in asked
        ]
        assert whole is not None
        share = whole.share
        ended = [
            one for _, b in written for one, text in zip(b.ended, b.answers, strict=True) if text
        ]
        choices = counted("choices", chosen)
        assert choices is not None
        cells = [f"{part.kept}/{part.dense}" if part else "-" for part in parts]
        print(
            f"| {trial.model} | {trial.calibration} | {trial.method} {trial.pattern} | {trial.seed}"
            f" | {100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
            f" | {' | '.join(cells)} | {whole.gained} | {100 * sum(ended) / len(ended):.0f}"
            f" | {choices.pruned} of {choices.asked}, dense {choices.dense} |"
        )


if __name__ == "__main__":
    main()
