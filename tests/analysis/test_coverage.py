"""Studies made from a known truth: intervals cover it as often as they say, and no more is
claimed of equal sets than the level allows.

Items shift all sets alike, and each set by itself; draws shift the dimensions of a trial
together, and single items under one trial.
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from calmix.study.bootstrap import Seeds, corrected, joint
from calmix.study.cells import Cells, Condition, Task, all_quantities
from calmix.study.differences import compare
from calmix.study.ranking import shrink
from tests.tiny import quick

AT = Condition("m", "wanda", 0.5, "50%", None, 64, 512, "offline", "Wanda 50%", "Wanda")
TASKS = tuple(
    Task(name, name[0], "probability", 60, 0.6, True) for name in ("a1", "a2", "b1", "b2")
)
RESAMPLES = 200


@dataclass(frozen=True)
class Truth:
    """Seeds of each set, their retention of every task, and the four standard deviations."""

    draws: tuple[int, ...] = (3, 2, 1, 3, 1, 2, 1, 3)
    kept: float | np.ndarray = 0.5
    items: float = 0.5
    own_items: float = 0.15
    draw: float = 0.02
    draw_items: float = 0.15
    others: int = 0  # number of sets, at the end, that are not single sources


def made(truth, rng):
    """Return a study's cells, and its sets' expected retention of these items over all seeds."""
    count = len(truth.draws)
    trials = [(f"s{at}", seed) for at, draws in enumerate(truth.draws) for seed in range(draws)]
    of = np.repeat(range(count), truth.draws)
    levels = np.broadcast_to(truth.kept, (count, len(TASKS)))
    moved = {name: truth.draw * rng.standard_normal(len(trials)) for name in "ab"}
    both = 0.5 * truth.draw * rng.standard_normal(len(trials))
    items, expected = {}, []
    for at, task in enumerate(TASKS):
        whole = 0.5 + rng.random(task.items)
        main = truth.items * rng.standard_normal(task.items)
        own = truth.own_items * rng.standard_normal((count, task.items))
        chance = truth.draw_items * rng.standard_normal((len(trials), task.items))
        of_set = whole * (levels[:, [at]] + main + own)
        each = of_set[of] + whole * (chance + (moved[task.dimension] + both)[:, None])
        items[at] = each, whole
        expected.append(of_set.sum(1) / whole.sum())
    singles = count - truth.others
    nothing = np.zeros((count, 0))  # unused
    sets = tuple(
        SimpleNamespace(calibration=f"s{at}", strategy="single" if at < singles else "mix")
        for at in range(count)
    )
    cells = Cells(AT, sets, ("a", "b"), TASKS, tuple(trials), items, nothing, nothing, {})
    return cells, all_quantities(np.stack(expected, 1), TASKS, "ab")


def studies(truth, times, seed=0):
    rng = np.random.default_rng(seed)
    for number in range(times):
        cells, expected = made(truth, rng)
        yield joint(cells, resamples=RESAMPLES, seed=number % 8), expected


def slack(times, share=0.05):
    """Three standard errors of a proportion over this many studies."""
    return 3 * math.sqrt(share * (1 - share) / times)


CASES = quick(
    [Truth(draws=(2, 1, 1, 1, 2, 1), draw=0.04)],  # two degrees of freedom
    [
        Truth(),
        Truth(
            draws=(3,) * 6, draw_items=0.6, own_items=0.05, draw=0.0
        ),  # seeds change single items
        Truth(draws=(2, 2, 1, 1), own_items=0.6, draw=0.01),
    ],  # items matter most
)


@pytest.mark.parametrize("truth", CASES)
def test_interval_coverage(truth):
    """Coverage is at least 95 % and at most 98.5 %."""
    times, inside = 200, {name: [] for name in ("one", "one, draws", "gap", "gap, draws")}
    for actual, expected in studies(truth, times):
        for quantity in (0, 1, 3):
            one = actual.mean([2], quantity).estimate()
            real = expected[:, quantity]
            gap = (actual.mean([0], quantity) - actual.mean([2], quantity)).estimate(test=True)
            inside["one"].append(one.low <= 0.5 <= one.high)
            inside["one, draws"].append(one.draw_low <= real[2] <= one.draw_high)
            inside["gap"].append(gap.low <= 0 <= gap.high)
            inside["gap, draws"].append(gap.draw_low <= real[0] - real[2] <= gap.draw_high)
    for name, message in inside.items():
        assert 0.95 - slack(times) <= np.mean(message) <= 0.985 + slack(times, 0.015), name


def test_coverage_with_one_seed():
    """The same spread of seeds under a condition with two seeds of each set."""
    times, inside, alone = 200, [], []
    once, twice = Truth(draws=(1,) * 4, own_items=0.05), Truth(draws=(2,) * 6)
    rng = np.random.default_rng(5)
    for number in range(times):
        (cells, _), (others, _) = made(once, rng), made(twice, rng)
        for pool, covered in ((Seeds.of(others), inside), (None, alone)):
            actual = joint(cells, resamples=RESAMPLES, seed=number % 8, pool=pool)
            assert (actual.pooled, actual.freedom) == ((True, 6) if pool else (False, 0))
            gap = (actual.mean([0], 0) - actual.mean([2], 0)).estimate(test=True)
            covered.append(gap.low <= 0 <= gap.high)
    assert 0.95 - slack(times) <= np.mean(inside) <= 0.985 + slack(times, 0.015)
    assert np.mean(alone) < 0.9


def test_false_positive_rate():
    """Mixes, the best source (picked by its values) and the mean of the sources are all equal."""
    times, claimed, found_at_all = 60, [], []
    truth = Truth(draws=(1, 2, 1, 2, 1, 3, 3, 2), others=3)
    for one, seed in ((truth, 1), (replace(truth, own_items=0.0), 2)):
        found_at_all.append([])
        for actual, _ in studies(one, times, seed=seed):
            (gaps,) = corrected(compare(actual))
            claimed += [gap.p <= 0.05 for gap in gaps if gap.quantity == "total"]
            found_at_all[-1].append(any(gap.significant for gap in gaps if gap.quantity != "worst"))
    for message in (claimed, *found_at_all):
        assert np.mean(message) <= 0.05 + slack(times)


def test_picked_set_is_unbiased():
    """The raw total of the best of 12 sources is biased upwards, the shrunken one is not."""
    rng = np.random.default_rng(4)
    for spread in (0.0, 0.03):
        raw, drawn = [], []
        for number in range(150):
            level = 0.5 + spread * rng.standard_normal((12, 1))
            truth = Truth(draws=(2,) + (1,) * 9 + (2, 2), kept=level, items=0.2)
            cells, expected = made(truth, rng)
            actual = joint(cells, resamples=20, seed=number % 8)
            weight = np.eye(7)[0]
            best = int(actual.values[:, 0].argmax())
            centre = expected[:, 0].mean() - level.mean()  # the common effect of these items
            real = level[best, 0] + centre
            raw.append(actual.values[best, 0] - real)
            drawn.append(shrink(actual, weight)[1][best] - real)
        assert np.mean(raw) > 0.01
        assert abs(np.mean(drawn)) < 0.3 * np.mean(raw)
