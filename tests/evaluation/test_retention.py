import hashlib
import math
from dataclasses import astuple, replace

import numpy as np
import pytest

from calmix.evaluation.measures import baseline_scores, has_signal, item_scores, parts, score_of
from calmix.evaluation.retention import flips, interval, item_weights, resampled, retention
from tests.evaluation.helpers import accuracy, bits, choices, refuses, written


def right(count, of, name="quiz", dimension="general", chance=0.25):
    return accuracy([1.0] * count + [0.0] * (of - count), name, dimension, chance)


def test_tasks_without_signal_are_skipped():
    dense = [right(80, 100, "good"), right(27, 100, "weak"), right(0, 40, "written", "code", 0.0)]
    found = retention(dense, [right(60, 100, "good"), *dense[1:]], resamples=100)
    assert [task.signal for task in found.tasks] == [True, False, False]
    assert [task.kept.value is None for task in found.tasks] == [False, True, True]
    general, code = found.dimensions
    assert (general.tasks, general.without_signal, code.kept.value) == (2, ("weak",), None)
    # Its resamples are ignored like its value.
    assert found.total == general.kept == found.tasks[0].kept
    silent = retention(dense[1:], dense[1:], resamples=50)
    assert (found.worst, silent.total.value, silent.worst) == ("general", None, None)


def test_confidence_level_and_worst():
    dense = [right(80, 100, "a"), right(9, 10, "b", "code")]
    pruned = [right(60, 100, "a"), right(7, 10, "b", "code")]
    wide, narrow = (retention(dense, pruned, resamples=200, level=level) for level in (0.95, 0.5))
    for one, other in ((wide.total, narrow.total), (wide.of("code"), narrow.of("code"))):
        assert one.low < other.low < other.high < one.high
    # By what is kept, not by the ends of intervals: those of ten items are wider.
    assert wide.worst == "general"
    assert wide.of("code").low < wide.of("general").low
    assert wide.of("math").value is None
    few = [right(1, 1, "c", "math", 0.0)]  # known, and in every resample
    assert retention(dense + few, pruned + few, resamples=9).worst == "general"


def test_accuracy_skips_unjudged_tasks():
    text = bits([2.0, 3.0], [9, 9], "c", "code")
    found = retention([right(8, 10), text], [right(6, 10), text], measure="accuracy", resamples=9)
    assert [one.name for one in found.tasks] == ["quiz"]
    assert found.total.value == pytest.approx((0.6 - 0.25) / (0.8 - 0.25))
    says = "no task has right or wrong answers"
    refuses(says, retention, [text], [text], measure="accuracy")


def test_other_items_are_refused():
    a, b, c = (right(5, 10, name) for name in "abc")
    for dense, pruned, first in (([a], [b], "a"), ([c, b], [c], "b"), ([a, b], [b, a], "b")):
        refuses(rf"different tasks \(first: {first}\): eval", retention, dense, pruned)
    for act in (retention, flips):
        says = r"different items of task quiz \(10 and 20\)"
        refuses(says, act, [right(5, 10)], [right(5, 20)])


@pytest.mark.parametrize("measure", ["primary", "ratio"])
def test_dimension_and_total_are_means(measure):
    rng = np.random.default_rng(0)
    nats, sizes = rng.uniform(2, 6, 40), rng.integers(9, 20, 40)
    dense, pruned = (
        [right(count, 80, "a"), right(count, 50, "b"), bits(times * nats, sizes, "c", "code")]
        for count, times in ((40, 1.0), (30, 1.3))
    )
    found = retention(dense, pruned, measure=measure, resamples=50)
    made = {one.name: parts(one, two, measure) for one, two in zip(dense, pruned, strict=True)}
    points = [resampled(*one, resamples=50, seed=0) for one in made.items()]
    assert [one.kept for one in found.tasks] == list(map(interval, points))
    baselines = [0.25, 0.25, 3 / LN2] if measure == "primary" else [None] * 3
    assert [one.baseline for one in found.tasks] == pytest.approx(baselines)
    # Items are pooled, except for the paper's measures.
    shares = [1.0, 1.0] if measure == "ratio" else [made[name].whole.sum() for name in "ab"]
    rolled = [np.average(points[:2], axis=0, weights=shares), points[2]]
    told = [*(one.kept for one in found.dimensions), found.total]
    for one, point in zip(told, [*rolled, np.mean(rolled, 0)], strict=True):
        assert (one.value, one.low) == pytest.approx((point[0], interval(point).low))
    assert found.worst == min(found.dimensions, key=lambda one: one.kept.value).name


def test_resamples_depend_on_seed_name_and_count():
    """The same on all machines and in all versions: published results are reproducible."""
    rng = np.random.default_rng([3, int.from_bytes(hashlib.sha256(b"quiz").digest()[:8], "little")])
    found = item_weights("quiz", 7, resamples=20, seed=3)
    assert np.array_equal(found, rng.multinomial(7, [1 / 7] * 7, size=20))
    assert found.dtype == float


def test_right_answers_by_ability():
    other = [right(80, 100), bits([3.0], [2])], [right(10, 100), bits([9.0], [2])]
    dense, pruned = map(list, other)
    for name, ability, before, after in (  # which answers the dense and the pruned get right
        ("a", "code", "1" * 8 + "0" * 8, "0" * 4 + "1" * 12),
        ("b", "code", "1" * 4 + "0" * 4, "1" * 3 + "0" * 5),
        ("c", "code", "0" * 6, "1" * 3 + "0" * 3),
        ("d", "math", "1" * 30 + "0" * 10, "1" * 15 + "0" * 25),
        ("e", "chat", "1" * 9, "0" * 9),
    ):
        dense.append(written(name, ability, [*map(int, before)]))
        pruned.append(written(name, ability, [*map(int, after)]))
    found = retention(dense, pruned, measure="right")
    # The dense model gets nothing of c right, where the pruned one gains, and too little of e.
    values = {one.name: one.kept.value for one in found.dimensions}
    assert values == {"code": 18 / 12, "math": 0.5, "chat": None}
    assert (found.total.value, found.worst) == (1.0, "math")
    sizes = [("code", 30, "right"), ("math", 40, "right"), ("chat", 9, "right")]
    assert [(one.name, one.items, one.score) for one in found.tasks] == sizes
    assert [one.without_signal for one in found.dimensions] == [(), (), ("chat",)]
    for name, size, _ in sizes[:2]:  # items are resampled within abilities
        values = ([one.values for one in some if one.dimension == name] for some in (dense, pruned))
        times = item_weights(name, size, resamples=2000, seed=0)
        before, after = (times @ np.concatenate(some) for some in values)
        wanted, one = np.quantile(after / before, [0.025, 0.975]), found.of(name)
        assert [one.low, one.high] == pytest.approx(wanted)
    # If no answer changed, the interval is Wilson's of all right answers, to both sides.
    whole, reach = retention(dense, dense, measure="right").total, 1.96**2 / (42 + 1.96**2)
    assert astuple(whole) == pytest.approx((1, 1 - reach, 1 + reach), abs=1e-4)
    refuses("no task has generated answers", retention, *other, measure="right")


def test_flips():
    def tasks(a, c, nats):
        return [accuracy(a, "a"), accuracy([1, 0], "b"), nats, accuracy(c, "c", "math")]

    dense = tasks([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0], bits([3.0], [2]))
    pruned = tasks([0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0], bits([9.0], [2]))
    found = flips(dense, pruned)
    values = {name: one.value for name, one in found.items()}
    assert values == {"general": 3 / 16, "math": 1 / 4, "total": (3 / 16 + 1 / 4) / 2}
    assert found["general"].low < 3 / 16 < found["general"].high
    assert astuple(flips([dense[1]], [pruned[1]])["total"]) == (0, 0, 0)
    assert flips(dense[2:3], pruned[2:3]) == {}


LN2 = math.log(2)
DENSE = choices([[-1.0, -3.0, -2.0], [-4.0, -2.0, -2.5]], [0, 1], [[-2.0] * 3, [-2.0, -3.0, -4.0]])
TEXT, GONE = bits([10, 30], [20, 20], baseline=2.0), bits([90, 90], [20, 20])
TWICE = bits([20, 60], [20, 20])
MOST, FEW = right(75, 100), right(10, 100)


def test_retention_by_hand():
    for dense, pruned, measure, kept in (
        (MOST, FEW, "primary", (0.10 - 0.25) / (0.75 - 0.25)),
        (MOST, FEW, "ratio", 10 / 75),
        (TEXT, GONE, "primary", (80 - 180) / (80 - 40)),
        (TEXT, TWICE, "primary", (80 - 80) / (80 - 40)),
        (TEXT, TWICE, "ratio", 0.5),  # in the paper, dense over pruned
        (TEXT, bits([40, 40], [20, 20]), "smoothed", 0.0),
        (DENSE, DENSE, "smoothed", 1.0),
    ):
        assert parts(dense, pruned, measure).retention == pytest.approx(kept)


def test_bits_baseline():
    assert item_scores(DENSE, "bits").tolist() == pytest.approx([1 / LN2, 2 / LN2])
    worst = replace(DENSE, loglikelihoods=((-8.0,) * 3,) * 2)  # like a unigram code
    assert parts(replace(DENSE, baselines=()), worst, "bits").retention == pytest.approx(0.0)
    assert parts(DENSE, worst, "bits").retention < 0
    ignorant = replace(DENSE, loglikelihoods=DENSE.baselines)
    assert baseline_scores(DENSE, "bits").tolist() == item_scores(ignorant, "bits").tolist()


def test_smoothed_bits_lose_at_most_one_bit():
    gone = bits([900, 30], [20, 20])
    assert parts(TEXT, gone, "bits").retention < 0
    gain = [30 / LN2, 10 / LN2]  # of the dense model over the baseline, in bits
    whole = [bits - 1 + math.log2(1 + 2**-bits) for bits in gain]
    assert parts(TEXT, TEXT, "smoothed").whole.tolist() == pytest.approx(whole)
    assert parts(TEXT, gone, "smoothed").kept.tolist() == pytest.approx([-1.0, whole[1]])
    assert parts(TEXT, TEXT, "smoothed").dense == pytest.approx(1 / LN2)  # not smoothed


def test_score_per_task():
    contexts = choices([[-1.0, -2.0]], [0])  # one answer after two contexts
    for task, wanted in (
        (DENSE, {"primary": "smoothed", "bits": "bits", "ratio": "accuracy", "right": "right"}),
        (TEXT, dict.fromkeys(("primary", "accuracy"), "bits")),
        (MOST, dict.fromkeys(("primary", "bits", "ratio"), "accuracy")),
        (contexts, {"bits": "bits"}),
    ):
        assert {measure: score_of(task, measure) for measure in wanted} == wanted
    assert baseline_scores(contexts, "accuracy").tolist() == [0.5]


def test_missing_fields_are_named():
    old = replace(DENSE, gold=(), loglikelihoods=(), bytes=(), baselines=(), unigram=())
    assert parts(old, old, "accuracy").retention == 1.0
    pruned_alone = replace(DENSE, baselines=(), unigram=())
    refuses("lack the baseline without task knowledge", parts, pruned_alone, DENSE)
    assert parts(DENSE, pruned_alone).retention == 1.0  # a pruned model needs no baselines


def test_signal():
    blind = np.random.default_rng(0).normal(-3, 0.1, (60, 4))
    for more, signal in ((0, False), (2, True)):
        rows = np.add(blind, [more, 0, 0, 0])
        assert has_signal(choices(rows.tolist(), [0] * 60, blind.tolist())) is signal
    assert has_signal(bits([1.0, 2.0], [5, 5]), "ratio")
    assert not has_signal(accuracy([1.0]))  # one item is not enough
