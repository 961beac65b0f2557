"""How well a suite tells calibration sets apart, and by which score of each task it does best.

    python benchmarks/signal_to_noise.py STORE [--sparsity 0.6] [--agreement 0.5] [--method ...]

STORE is a study with sets that were drawn twice or more. First, for the suite's own scores: signal
(spread of the single sources), noise of one draw and of the items, their ratio, and the draws of
each set that tell 2 points and 1 point apart (80 % power), of the total, the dimensions and the
tasks. Then, for every task with choices, the ratio under each score it could be judged by, and how
far that score puts the sets in the order in which accuracy puts them (Spearman), at the sparsity
`--agreement`, where accuracy has most to tell.
"""

from __future__ import annotations

import argparse
import math
from typing import get_args

import numpy as np
from scipy.stats import spearmanr

from calmix.analysis.bootstrap import joint
from calmix.analysis.cells import select, tables
from calmix.analysis.power import Noise, needed, noises
from calmix.options import Measure
from calmix.study import StudyResults, read_results

SCORES: tuple[Measure, ...] = ("bits", "smoothed", "accuracy")


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None or math.isnan(value) else f"{scale * value:.{digits}f}"


def draws(noise: Noise, points: float) -> str:
    if noise.draw is None:
        return "-"
    found = needed(points / 100, noise.draw, noise.freedom, noise.item or 0.0)
    joint = found.draws_items if found.draws_items is not None else f"{found.items:.0f}x"
    return f"{found.draws}/{joint}"


def overview(results: StudyResults, method: str, sparsity: str, measure: Measure) -> None:
    found = noises(results, method=method, sparsity=sparsity, measure=measure)
    print(f"\n{found[0].condition}, by {measure}: {found[0].sets} sets, points of retention")
    form = "{:<18} {:>6} {:>7} {:>6} {:>6} {:>7} {:>10} {:>10}"
    print(form.format("", "items", "signal", "draw", "item", "s/n", "2 points", "1 point"))
    for one in found:
        name = one.quantity if one.kind != "task" else f"  {one.quantity}"
        print(
            form.format(
                name,
                one.items,
                number(one.signal, 1, 100),
                number(one.draw, 2, 100),
                number(one.item, 2, 100),
                number(one.ratio),
                draws(one, 2),
                draws(one, 1),
            )
        )


def scores(results: StudyResults, method: str, sparsity: str, agreement: str) -> None:
    """Print for every task with accuracies the ratio and the agreement of each score."""
    ratios = {
        score: {
            n.quantity: n.ratio
            for n in noises(results, method=method, sparsity=sparsity, measure=score)
            if n.kind == "task"
        }
        for score in SCORES
    }
    there = {"trials": select(results, method=method, sparsity=agreement)}
    means = {score: tables(results.model_copy(update=there), score)[0] for score in SCORES}
    cells = means["accuracy"]
    first = 1 + len(cells.dimensions)
    suite = next(iter(results.dense.values()))
    print("\nsignal over noise of one trial by score; in brackets the rank correlation with")
    print(f"accuracy over {len(cells.sets)} sets at {cells.condition.label}")
    form = "{:<18} {:>14} {:>14} {:>14}   {}"
    print(form.format("task", *SCORES, "primary"))
    for at, task in enumerate(suite):
        if not task.values:
            continue
        row = []
        truth = cells.means[:, first + at]
        for score in SCORES:
            kept = means[score].means[:, first + at]
            known = ~np.isnan(truth) & ~np.isnan(kept)
            rho = spearmanr(kept[known], truth[known]).statistic if known.sum() > 3 else math.nan
            text = number(ratios[score].get(task.name))
            row.append(text if score == "accuracy" else f"{text} ({number(rho, 2)})")
        print(form.format(task.name, *row, task.primary))


def of_kinds(results: StudyResults, method: str, sparsity: str) -> None:
    """Print how much a draw of the total moves by how a set is made, and what that tells apart."""
    trials = select(results, method=method, sparsity=sparsity)
    cells = tables(results.model_copy(update={"trials": trials}), "primary")[0]
    item = noises(results, method=method, sparsity=sparsity)[0].item or 0.0
    found = joint(cells, resamples=2, seed=0)
    more, squares = found.counts - 1, found.deviations[:, 0] ** 2
    print(
        "\none draw of the total by how the set is made (degrees of freedom), draws to tell apart"
    )
    written = "self-written", "igsp", "self-cal", "sgs"
    kinds = {"single source": ["single"], "mix": ["mix"], "written by the model": written}
    for kind, made in kinds.items():
        own = [at for name in made for at in cells.of(name) if more[at]]
        freedom = int(more[own].sum())
        if not freedom:
            continue
        draw = math.sqrt(squares[own] @ more[own] / freedom)
        told = [needed(points / 100, draw, freedom, item).draws for points in (2, 1)]
        print(f"{kind:<21} {100 * draw:.2f} ({freedom})  2 points {told[0]}, 1 point {told[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", default="0.6")
    parser.add_argument("--agreement", help="sparsity of the order by accuracy")
    parser.add_argument("--measure", default="primary", choices=get_args(Measure))
    options = parser.parse_args()
    results = read_results(options.store)
    overview(results, options.method, options.sparsity, options.measure)
    for measure in ("accuracy", "ratio"):
        if options.measure == "primary":
            overview_total(results, options.method, options.sparsity, measure)
    of_kinds(results, options.method, options.sparsity)
    scores(results, options.method, options.sparsity, options.agreement or options.sparsity)


def overview_total(results: StudyResults, method: str, sparsity: str, measure: Measure) -> None:
    found = noises(results, method=method, sparsity=sparsity, measure=measure)
    total = next(one for one in found if one.kind == "total")
    print(
        f"the total by {measure}: signal {number(total.signal, 1, 100)}, draw "
        f"{number(total.draw, 2, 100)}, item {number(total.item, 2, 100)}, "
        f"s/n {number(total.ratio)}"
    )


if __name__ == "__main__":
    main()
