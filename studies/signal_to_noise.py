"""How well a suite tells calibration sets apart, and by which score of each task it does best.

    python studies/signal_to_noise.py STORE [--sparsity 0.6] [--agreement 0.5] [--method ...]

STORE is a study with sets that were drawn twice or more. First, for the suite's own scores: signal
(spread of the single sources), noise of one draw and of the items, their ratio, and the draws of
each set that tell 2 points and 1 point apart (80 % power), of the total, the dimensions and the
tasks. Then, for every task with choices, the ratio under each score it could be judged by, and how
far that score puts the sets in the order in which accuracy puts them (Spearman), at the sparsity
`--agreement`, where accuracy has most to tell.

The difference of two means over k seeds each has the variance

    2 s^2 / k + v^2

where s is the standard deviation of one seed, pooled over sets, and v that of the paired difference
over other items; v^2 is inversely proportional to the number of items. There are two readings: on
these items (v = 0), and for other items too. A difference is *detectable* if its two-sided 95 %
interval by Student's t excludes 0 in 80 % of studies (noncentral t). The degrees of freedom are
those of s, or Satterthwaite's if items contribute to the error. The estimated s is taken as the
true one with its present degrees of freedom; more seeds would add some (ours: conservative).
"""

from __future__ import annotations

import argparse
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import get_args

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, spearmanr, t

from calmix.errors import InputError
from calmix.evaluation.measures import Z
from calmix.evaluation.retention import LEVEL
from calmix.options import Measure, Settings
from calmix.pruning.requests import printed, target_of
from calmix.study.bootstrap import Joint, joint, joints
from calmix.study.cells import TOTAL, shared, tables
from calmix.study.results import StudyResults, Trial
from calmix.study.store import read_results

SCORES: tuple[Measure, ...] = ("bits", "smoothed", "accuracy")
POWER = 0.80
Z_POWER = 0.8416212335729143  # normal quantile of POWER
MOST = 1_000_000  # most seeds considered; with more degrees of freedom t is taken as normal


@dataclass(frozen=True)
class Noise:
    """Signal and noise of one quantity under one condition, in retention (1.0 is 100 %).

    The difference between the means of two sets over k and m seeds, on `items` items, has the
    standard error sqrt(draw**2 * (1 / k + 1 / m) + item**2). With n times the items `item` is
    divided by sqrt(n); `draw` hardly changes (it includes the item-seed interaction).

    Attributes:
        draw: standard deviation of one seed on these items, pooled over sets as in `bootstrap`,
            with its degrees of `freedom`; None if no set has two seeds.
        item: standard error from items of the paired difference of two sets, without the item-seed
            interaction: the median over all pairs. None with one set.
        items: number of test items behind the quantity, counting only tasks with signal.
        signal: standard deviation between single sources after subtracting the noise variance, at
            least 0; None without `draw`, or with fewer than two sources.
        ratio: signal over the noise of one trial, sqrt(draw**2 + item**2 / 2).
    """

    condition: str
    quantity: str
    kind: str  # total, dimension or task
    sets: int
    draw: float | None
    freedom: int
    item: float | None
    items: int
    signal: float | None
    ratio: float | None


@dataclass(frozen=True)
class Needed:
    """Seeds and items needed to detect a difference (0.01 is one point of retention)."""

    difference: float
    draws: int  # seeds per set, on these items
    draws_items: int | None  # for other items too; None if no number of seeds is enough
    items: float  # multiple of the present items needed even with unlimited seeds


def noise_of(joint: Joint) -> list[Noise]:
    """Return the noise of the total, of every dimension and of every task with signal."""
    cells, count, sets = joint.cells, len(joint.cells.sets), joint.cells.of("single")
    names = [
        (TOTAL, "total"),
        *((name, "dimension") for name in cells.dimensions),
        *((task.name, "task") for task in cells.tasks),
    ]
    sizes = np.array([task.items for task in cells.tasks])
    noises = []
    for (name, kind), weight, values in zip(names, cells.weights, joint.values.T, strict=True):
        if not weight.any():
            continue
        known = (joint.counts > 1).any()
        draw = math.sqrt(weight @ joint.by_draws @ weight) if known else None
        by_items = np.tensordot(weight**2, joint.by_items, 1)
        each = np.diag(by_items) - float(weight**2 @ joint.both) / np.maximum(joint.counts, 1)
        pairs = np.maximum(0.0, each[:, None] + each[None] - 2 * by_items)
        item = math.sqrt(np.median(pairs[np.triu_indices(count, 1)])) if count > 1 else None
        signal = ratio = None
        if draw is not None and len(sets) > 1:  # variance between sets, without noise
            from_items = pairs[np.ix_(sets, sets)].sum() / (len(sets) * (len(sets) - 1)) / 2
            from_draws = draw**2 * float(np.mean(1 / joint.counts[sets]))
            variance = float(values[sets].var(ddof=1)) - from_draws - from_items
            signal = math.sqrt(max(0.0, variance))
            noise = math.hypot(draw, (item or 0.0) / math.sqrt(2))
            ratio = signal / noise if noise else None
        noises.append(
            Noise(
                cells.condition.label,
                name,
                kind,
                count,
                draw,
                joint.freedom,
                item,
                int(sizes[weight > 0].sum()),
                signal,
                ratio,
            )
        )
    return noises


def detectable(draws: int, draw: float, freedom: float, item: float = 0.0) -> float:
    """Return the difference that `draws` seeds per set detect in 80 % of studies."""
    from_draws = draw * math.sqrt(2 / draws)
    error = math.hypot(from_draws, item)
    if error == 0:
        return 0.0
    share = (from_draws / error) ** 2  # of the variance
    return _noncentrality(freedom / share**2 if share > 0 else math.inf) * error


def _noncentrality(freedom: float) -> float:
    """Return the detectable difference in standard errors; 2.8 with many degrees of freedom."""
    if freedom >= MOST:
        return Z + Z_POWER
    critical = float(t.ppf((1 + LEVEL) / 2, freedom))
    return float(brentq(lambda far: nct.sf(critical, freedom, far) - POWER, 0, 4 * critical))


def needed(difference: float, draw: float, freedom: float, item: float) -> Needed:
    """Return the seeds and items that detect a difference; other arguments as for `detectable`."""
    on_these = 2 * (_noncentrality(freedom) * draw / difference) ** 2
    times = ((Z + Z_POWER) * item / difference) ** 2
    seeds = range(1, MOST if times < 1 else 1)
    at = bisect_left(seeds, True, key=lambda k: detectable(k, draw, freedom, item) <= difference)
    enough = seeds[at] if at < len(seeds) else None
    return Needed(difference, max(1, math.ceil(on_these * (1 - 1e-12))), enough, times)


def select(results: StudyResults, method: str, sparsity: str) -> tuple[Trial, ...]:
    """Return the finished trials of one method and sparsity, or pattern."""
    pattern = printed(target_of(sparsity))
    chosen = [one for one in results.trials if (one.method, one.pattern) == (method, pattern)]
    if not chosen:
        raise InputError(f"no finished trial has the method {method} at {pattern}")
    return tuple(chosen)


def noises(
    results: StudyResults, *, method: str, sparsity: str, measure: Measure | None = None
) -> list[Noise]:
    """Return the noise of every quantity under every condition of a method at a sparsity."""
    chosen = {shared(one) for one in select(results, method, sparsity)}
    every = joints(results, Settings(measure=measure, resamples=1))  # as few as possible
    some = (one for one in every if shared(one.cells.condition) in chosen)
    return [noise for one in some for noise in noise_of(one)]


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
    there = {"trials": select(results, method, agreement)}
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
    trials = select(results, method, sparsity)
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
