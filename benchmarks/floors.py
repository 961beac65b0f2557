"""How often a proven floor is broken, and how much the bounds give away.

    python benchmarks/floors.py [STORE ...] [--splits 200]
    python benchmarks/floors.py --skewed

STORE is a study's store or its archive (all that are committed). Each checkpoint's items are split
into two halves, again and again: a floor is broken where one half proves it and the other keeps
less. Then planted models, whose true share is known: how often the bound is above it, and the
median of true share less bound, in points, beside that of the best bound there could be (answers
of which none is gained: the randomised one of Stevens 1950; else the normal one of a spread that
is known).

With --skewed only likelihood on made-up losses, most of them small and few large: how often the
bound is above the true share and, in brackets, by how many points it is short of it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from calmix.errors import InputError
from calmix.evaluation import floors
from calmix.evaluation.behaviour import Pair
from calmix.evaluation.floors import (
    ACCURACY,
    ANSWERS,
    LIKELIHOOD,
    LOST,
    MEASURES,
    TestedFloor,
    check_floors,
    lower_bound,
    lower_mean,
    most_lost,
)
from calmix.evaluation.measures import Parts, TaskScores, has_signal, parts
from calmix.evaluation.scores import CapabilityScores
from calmix.study.results import StudyResults
from calmix.study.store import read_results

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
import rejudge

STORES = rejudge.RESULTS
FLOORS = np.arange(0.5, 0.951, 0.05)
ONE_SIDED, DRAWS = 1.6448536269514722, 400
PARTS = (
    "items",
    "values",
    "gold",
    "loglikelihoods",
    "bytes",
    "floors",
    "unigram",
    "answers",
    "ended",
)
Scores = Sequence[TaskScores]
PLANTED = defaultdict[str, list[tuple[float, float]]](list)  # by measure


def some(task: TaskScores, at: Any) -> TaskScores:
    """A task's scores on some of its items, each as often as it is named."""
    chosen: dict[str, Any] = {
        name: tuple(value[i] for i in at) for name in PARTS if (value := getattr(task, name))
    }
    return replace(task, **chosen | {"items": tuple(map(str, range(len(at))))})


def pair(dense: Scores, pruned: Scores) -> Pair:
    one, other = (
        CapabilityScores("", "", "", {"name": "", "version": 1, "hash": ""}, tuple(of))
        for of in (dense, pruned)
    )
    return one, other


def tested(dense: Scores, pruned: Scores) -> dict[str, TestedFloor]:
    """Every ability that can be tested, by its name."""
    try:
        found = check_floors({"": 1e-6}, [pair(dense, pruned)]).tested
    except InputError:  # no signal in any
        return {}
    return {one.ability: one for one in found}


def halves(results: StudyResults, splits: int, told: dict[str, list[Any]]) -> None:
    """Add (proven, broken) of checkpoints, abilities and floors to what is told of each measure."""
    for model, dense in results.dense.items():
        pruned = [results.scores[one.id] for one in results.trials if one.model == model]
        for measure, (fits, score, _) in MEASURES.items():
            at = [i for i, task in enumerate(dense) if fits(task)]
            # Alone, so that each measure is tested on whatever has it.
            bare: dict[str, Any] = {"values": ()} if measure == LIKELIHOOD else {}
            own = [replace(dense[i], **bare) for i in at]
            theirs = [[replace(of[i], **bare) for i in at] for of in pruned]
            made = [[parts(task, of[i], score) for of in theirs] for i, task in enumerate(own)]
            for seed in range(splits if at else 0):
                split(own, theirs, made, measure, seed, told[measure])


def split(
    own: Scores,
    theirs: Sequence[Scores],
    made: Sequence[Sequence[Parts]],
    measure: str,
    seed: int,
    told: list[Any],
) -> None:
    """One split of the items of one dense model and its checkpoints, all at once."""
    rng = np.random.default_rng(seed)
    cuts = [np.array_split(rng.permutation(len(task.items)), 2) for task in own]
    first = [some(task, cut[0]) for task, cut in zip(own, cuts, strict=True)]
    score = MEASURES[measure][1]
    for one in tested(first, first).values():
        if one.measure != measure:
            continue
        use = [
            i
            for i, task in enumerate(first)
            if task.dimension == one.ability and has_signal(task, score)
        ]
        kept, whole = (
            {
                i: [np.stack([getattr(of, name)[cut] for of in made[i]]) for cut in cuts[i]]
                for i in use
            }
            for name in ("kept", "whole")
        )
        sums = [np.stack([one[i][1].sum(1) for i in use]) for one in (kept, whole)]
        if measure == LIKELIHOOD:
            shares = (sums[0] / sums[1]).mean(0)
        else:  # pooled
            shares = sums[0].sum(0) / sums[1].sum(0)
        rows = [(kept[i][0], whole[i][0]) for i in use]
        if measure == LIKELIHOOD:
            times = LOST if any(own[i].primary == "bits" for i in use) else 1.0
            lost = [most_lost(*both, times) for both in rows]
        else:
            rows = [(np.hstack([k for k, _ in rows]), np.hstack([w for _, w in rows]))]
            lost = [np.ones(len(theirs))]
        bounds = np.minimum(lower_mean(rows, lost), one.provable)
        intact = np.all([(k >= w).all(1) for k, w in rows], 0)
        bounds[intact] = one.provable
        if not seed:  # this is the test that calmix makes
            cut = [some(task, cut[0]) for task, cut in zip(theirs[0], cuts, strict=True)]
            official = tested(first, cut)[one.ability].bound  # by other random weights
            assert abs(official - bounds[0]) < 0.05
        proven = bounds[:, None] >= FLOORS
        told.append(np.stack([proven, proven & (shares[:, None] < FLOORS)]))


def best_share(kept: np.ndarray, of: int, rng: np.random.Generator) -> np.ndarray:
    """Stevens' randomised lower bounds of shares, by bisection."""
    low, high, luck = np.zeros(len(kept)), np.ones(len(kept)), rng.random(len(kept))
    for _ in range(50):
        middle = (low + high) / 2
        rare = binom.sf(kept, of, middle) + luck * binom.pmf(kept, of, middle) < 0.05
        low, high = np.where(rare, middle, low), np.where(rare, high, middle)
    return low


def row(what: str, true: float, bounds: Any, best: float) -> None:
    """Print what the bounds of a planted model are, and keep it by measure."""
    bounds = np.asarray(bounds)
    slack, above = float(np.median(true - bounds)), float(np.mean(bounds > true + 1e-9))
    PLANTED[what.partition(",")[0]].append((above, slack - best))
    print(
        f"| {what} | {100 * true:.1f} | {100 * above:.1f} | {100 * slack:.1f} | {100 * best:.1f} |",
        flush=True,
    )


def planted_answers(rng: np.random.Generator) -> None:
    """Answers lost and gained: prompts of which the dense model has a share right."""
    for of in (30, 60, 120, 240):
        for lost, gained in ((0.4, 0), (0.1, 0), (0.05, 0), (0.05, 0.05), (0.15, 0.05), (0.3, 0.1)):
            draw = functools.partial(drawn_answers, rng, of, lost, gained)
            planted(f"{ANSWERS}, {of} right", 1 - lost + gained, draw, of * (not gained))


def drawn_answers(
    rng: np.random.Generator, of: int, lost: float, gained: float
) -> tuple[Scores, Scores]:
    """A quarter of the prompts is wrong in the dense model, and as many are gained as are given in
    shares of its right answers."""
    dense = np.arange(of + of // 3) < of
    luck = rng.random(len(dense))
    both = (answers(one) for one in (dense, np.where(dense, luck >= lost, luck < 3 * gained)))
    return next(both), next(both)


def planted(
    what: str, true: float, draw: Callable[[], tuple[Scores, Scores]], binomial: int = 0
) -> None:
    """Judge models whose true share is known; of `binomial` items that are kept or lost if any."""
    draws = DRAWS * (5 if what.startswith(ANSWERS) else 1)
    found = [one for _ in range(draws) for one in tested(*draw()).values()]
    kept = np.array([one.kept for one in found])
    best = ONE_SIDED * float(np.std(kept))
    if binomial:
        rng = np.random.default_rng(1)
        best = float(np.median(true - best_share(np.round(kept * binomial), binomial, rng)))
    row(what, true, [one.bound for one in found], best)


def choices(right: np.ndarray) -> list[TaskScores]:
    items = tuple(map(str, range(len(right))))
    return [TaskScores("quiz", "all", "acc", "accuracy", 0.25, items, tuple(map(float, right)))]


def answers(right: np.ndarray) -> list[TaskScores]:
    return [replace(one, metric="as_asked", chance=0.0) for one in choices(right)]


def drawn_choices(
    rng: np.random.Generator, count: int, known: float, lost: float, gained: float
) -> tuple[Scores, Scores]:
    dense, luck = rng.random(count) < known, rng.random(count)
    return choices(dense), choices(np.where(dense, luck >= lost, luck < gained))


def planted_choices(rng: np.random.Generator) -> None:
    for count in (100, 400):
        for known, lost, gained in (
            (0.6, 0.02, 0.0),
            (0.6, 0.1, 0.05),
            (0.8, 0.02, 0.02),
            (0.8, 0.05, 0.0),
            (0.8, 0.2, 0.1),
        ):
            kept = known * (1 - lost) + (1 - known) * gained - 0.25
            what = f"{ACCURACY}, {count} choices, {lost:.0%} lost, {gained:.0%} gained"
            draw = functools.partial(drawn_choices, rng, count, known, lost, gained)
            planted(what, kept / (known - 0.25), draw)


def planted_likelihood(results: StudyResults, rng: np.random.Generator) -> None:
    """A checkpoint's items are the world, and as many or a quarter are drawn of them."""

    def draw(share: float, own: Sequence[Scores]) -> tuple[Scores, Scores]:
        counts = [len(task.items) for task in own[0]]
        places = [rng.integers(0, count, round(share * count)) for count in counts]
        dense, pruned = (
            [some(task, at) for task, at in zip(of, places, strict=True)] for of in own
        )
        return dense, pruned

    for trial in results.trials[:: max(1, len(results.trials) // 3)][:3]:
        dense, pruned = results.dense[trial.model], results.scores[trial.id]
        for name in dict.fromkeys(task.dimension for task in dense):
            own = [
                [replace(task, values=()) for task in of if task.dimension == name]
                for of in (dense, pruned)
            ]
            whole = tested(own[0], own[1]).get(name)
            for share in (0.25, 1.0) if whole and whole.measure == LIKELIHOOD else ():
                items = round(share * whole.items) if whole else 0
                planted(
                    f"{LIKELIHOOD}, {name}, {items} items",
                    whole.kept if whole else 0.0,
                    functools.partial(draw, share, own),
                )


def skewed() -> None:
    """Print how often a bound is above the true share, by distribution of the losses (5 to 20 % of
    what the items have) and number of items in one task or three: first of losses limited to 1.2
    times what an item has, as those of smoothed bits are, then of losses without a limit."""
    rng, draws = np.random.default_rng(0), 2000

    def rare(share: float, lost: float, whole: np.ndarray) -> np.ndarray:
        return lost * whole * (rng.random(whole.shape) < share)

    losses: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
        "normal": (0.1, lambda whole: rng.normal(1, 0.5, whole.shape)),
        "exponential": (0.1, lambda whole: rng.exponential(1, whole.shape)),
        "gamma, shape 0.2": (0.1, lambda whole: rng.gamma(0.2, 5, whole.shape)),
        "log-normal, sigma 1": (0.1, lambda whole: rng.lognormal(-0.5, 1, whole.shape)),
        "log-normal, sigma 1.5": (0.1, lambda whole: rng.lognormal(-1.125, 1.5, whole.shape)),
        "log-normal, sigma 2": (0.1, lambda whole: rng.lognormal(-2, 2, whole.shape)),
        "Pareto, index 2.5": (0.1, lambda whole: 1.5 * rng.pareto(2.5, whole.shape)),
        "5 % of items lose all": (0.05, functools.partial(rare, 0.05, 1.0)),
        "20 % of items lose all": (0.2, functools.partial(rare, 0.2, 1.0)),
        "5 % lose all, the others a little": (
            0.1,
            lambda whole: 0.05 * whole * rng.exponential(1, whole.shape) + rare(0.05, 1, whole),
        ),
        "5 % lose twice it": (0.1, functools.partial(rare, 0.05, 2.0)),
        "2 % lose 2.5 times it, the others 5 %": (
            0.1,
            lambda whole: 0.05 * whole + rare(0.02, 2.5, whole),
        ),
        "5 % lose an exponential of twice it": (
            0.1,
            lambda whole: rng.exponential(1, whole.shape) * rare(0.05, 2, whole),
        ),
    }
    sizes = ((20, 1), (30, 1), (60, 1), (100, 1), (200, 1), (400, 1), (90, 3), (300, 3))
    heads = [f"{items}{f' in {tasks}' if tasks > 1 else ''}" for items, tasks in sizes]
    many = rng.gamma(4, 2.5, (1, 2_000_000))
    for times, most in ((1.0, 1.2), (LOST, np.inf)):
        print(f"\n| losses up to {most:g} | {' | '.join(heads)} |\n|---|{'---:|' * len(sizes)}")
        for name, (mean, draw) in losses.items():
            if most < np.inf:
                mean = float(np.minimum(draw(many), most * many).sum() / many.sum())
            cells = []
            for items, tasks in sizes:
                rows = []
                for _ in range(tasks):
                    whole = rng.gamma(4, 2.5, (draws, items // tasks))
                    rows.append((whole - np.minimum(draw(whole), most * whole), whole))
                best = 1 - times * (1 - lower_bound(items, items))
                bounds = lower_mean(rows, [most_lost(*both, times) for both in rows]).clip(max=best)
                above, short = (bounds > 1 - mean).mean(), np.median(1 - mean - bounds)
                cells.append(f"{100 * above:.1f} ({100 * short:.1f})")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", type=Path, nargs="*")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--skewed", action="store_true", help="made-up losses alone")
    options = parser.parse_args()
    floors.random_weights = functools.lru_cache(8)(floors.random_weights)
    if options.skewed:
        skewed()
        return
    rng, told, largest = np.random.default_rng(0), defaultdict[str, list[Any]](list), None
    with tempfile.TemporaryDirectory() as place:
        for path in options.stores or sorted(STORES.glob("*/store.tar.xz")):
            if path.is_file():
                with tarfile.open(path) as archive:
                    archive.extractall(Path(place) / path.parent.name, filter="data")
                path = next((Path(place) / path.parent.name).iterdir())
                rejudge.asked_in_part(path)
            try:
                results = read_results(path)
            except InputError as error:  # of dense scores that were not kept
                print(f"left out: {error}")
                continue
            counts = [len(task.items) for task in results.dense[results.trials[0].model]]
            if largest is None or sum(counts) > largest[0]:
                largest = sum(counts), results
            halves(results, options.splits, told)
            print(f"{results.name}: {len(results.trials)} checkpoints", flush=True)
    print("\n| measure | cases | proven, % | broken, % | broken of proven, % | worst floor, % |")
    print("|---|---:|---:|---:|---:|---:|")
    told["all"] = [one for some in list(told.values()) for one in some]
    for measure, found in told.items():
        if not found:
            continue
        proven, broken = np.concatenate(found, 1)
        print(
            f"| {measure} | {proven.size:,} | {100 * proven.mean():.1f} "
            f"| {100 * broken.mean():.2f} | {100 * broken.sum() / max(1, proven.sum()):.1f} "
            f"| {100 * broken.mean(0).max():.2f} |"
        )
    print("\n| planted | true, % | bound above it, % | slack, points | best possible |")
    print("|---|---:|---:|---:|---:|")
    planted_answers(rng)
    planted_choices(rng)
    assert largest is not None
    planted_likelihood(largest[1], rng)
    print(
        "\n| measure | planted | bound above it, mean % | most, % | slack beyond the best, median |"
    )
    print("|---|---:|---:|---:|---:|")
    for measure, rows in PLANTED.items():
        above, beyond = np.array(rows).T
        print(
            f"| {measure} | {len(rows)} | {100 * above.mean():.1f} | {100 * above.max():.1f} "
            f"| {100 * np.median(beyond):.1f} |"
        )


if __name__ == "__main__":
    main()
