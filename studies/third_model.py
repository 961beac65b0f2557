"""Judge the hypotheses of third-model.yaml that are no difference of two conditions.

    python studies/third_model.py STUDY [--model coder-1.5b]   # results/third-model/predictor.txt

H9: the curve of Qwen2.5-Coder-0.5B, logit(kept) = -0.60 - 0.88 ln(KL), against the share of right
answers that each trial keeps. H10: whether KL orders pairs of trials as right answers do: two texts
under one method, or two types or methods with one text, of one seed.

The study is not finished. To go on, beside a copy of third-model.yaml and its twins:

    tar xJf studies/results/third-model/store.tar.xz
    CALMIX_DATA=FOLDER calmix study run third-model.yaml -o third-model --allow-code-execution
"""

from __future__ import annotations

import argparse
import math
from itertools import combinations
from pathlib import Path

from calmix.evaluation.behaviour import count_items
from calmix.evaluation.retention import retention
from calmix.files import sha256_file
from calmix.study.results import StudyResults, Trial
from calmix.study.store import read_results

HERE = Path(__file__).parent
WITHIN, APART = 0.10, 0.05  # of the curve, and between the two of a pair


def curve(kl: float) -> float:
    """Return the share of right answers kept that Qwen2.5-Coder-0.5B's trials lead to expect."""
    return 1 / (1 + math.exp(0.60 + 0.88 * math.log(kl)))


def facts(results: StudyResults, trial: Trial) -> tuple[float, float, float] | None:
    """Return KL, the share of right answers kept and right answers relative to the dense model's;
    None if one was not measured."""
    tasks = zip(results.paired[trial.id], results.scores[trial.id], strict=True)
    written = [both for both in tasks if both[0].written]
    counts = count_items("all", written)
    kl = (trial.distance or {}).get("total", {}).get("kl_mean")
    if counts is None or kl is None or (kept := counts.share.value) is None:
        return None
    right = retention(*zip(*written, strict=True), measure="right").total.value
    return None if right is None else (kl, kept, right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--model", default="coder-1.5b")
    options = parser.parse_args()
    results = read_results(options.study)
    print(f"third-model.yaml: sha256 {sha256_file(HERE / 'third-model.yaml')[:12]}")
    trials = [one for one in results.trials if one.model == options.model]
    measured = ((one, facts(results, one)) for one in trials)
    known = {one.id: (one, *fact) for one, fact in measured if fact}
    if not known:
        print(f"{options.model}: no trial has right answers and KL yet")
        return
    near = [abs(curve(kl) - kept) <= WITHIN for _, kl, kept, _ in known.values()]
    print(
        f"H9: {sum(near)} of {len(near)} trials within 10 points of the curve "
        f"({100 * sum(near) / len(near):.0f} %; 70 % predicted, below 50 % refutes it)"
    )
    agreed = []
    for (one, kl, _, right), (other, kl_, _, right_) in combinations(known.values(), 2):
        alike = [
            (one.method, one.pattern) == (other.method, other.pattern),
            one.calibration == other.calibration,
        ]
        if one.seed == other.seed and sum(alike) == 1 and abs(right - right_) >= APART:
            agreed.append((kl < kl_) == (right > right_))
    if agreed:
        print(
            f"H10: KL picks the better of {sum(agreed)} of {len(agreed)} pairs "
            f"({100 * sum(agreed) / len(agreed):.0f} %; 75 % predicted, below 60 % refutes it)"
        )


if __name__ == "__main__":
    main()
