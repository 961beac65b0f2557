"""Measures: each score by hand, anchors, nothing clipped, and what a record must hold for them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from calmix.errors import InputError
from calmix.evaluation.measures import (
    floor_scores,
    has_signal,
    item_scores,
    parts,
    score_of,
)
from tests.evaluation.helpers import accuracy, bits, choices

DENSE = choices([[-1.0, -3.0, -2.0], [-4.0, -2.0, -2.5]], [0, 1], [[-2.0] * 3, [-2.0, -3.0, -4.0]])
TEXT, GONE = bits([10, 30], [20, 20], floor=2.0), bits([90, 90], [20, 20])
TWICE = bits([20, 60], [20, 20])
MOST, FEW = accuracy([1.0] * 75 + [0.0] * 25), accuracy([1.0] * 10 + [0.0] * 90)
E, LN2 = math.exp, math.log(2)


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        ("probability", [E(-1) / (E(-1) + E(-3) + E(-2)), E(-2) / (E(-4) + E(-2) + E(-2.5))]),
        ("margin", [1 / LN2 / 4, 0.5 / LN2 / 4]),
        ("bits", [1 / LN2, 2 / LN2]),
        ("accuracy", [1, 1]),
    ],
)
def test_every_score_by_hand(score, wanted):
    assert item_scores(DENSE, score).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("dense", "pruned", "measure", "kept"),
    [
        # A score below the floor is less than nothing.
        (MOST, FEW, "primary", (0.10 - 0.25) / (0.75 - 0.25)),
        (MOST, FEW, "ratio", 10 / 75),
        (TEXT, GONE, "primary", (80 - 180) / (80 - 40)),
        (TEXT, TWICE, "primary", (80 - 80) / (80 - 40)),
        # Bits by the paper's reading are dense over pruned.
        (TEXT, TWICE, "ratio", 0.5),
        (TEXT, bits([40, 40], [20, 20]), "smoothed", 0.0),
        *((DENSE, DENSE, measure, 1.0) for measure in ("probability", "margin", "smoothed")),
        *((DENSE, replace(DENSE, loglikelihoods=DENSE.floors), measure, 0.0)
          for measure in ("probability", "margin")),
    ],
)  # fmt: skip
def test_retention_by_hand(dense, pruned, measure, kept):
    assert parts(dense, pruned, measure).retention == pytest.approx(kept)


def test_the_baseline_of_bits_is_the_better_of_two():
    worst = replace(DENSE, loglikelihoods=((-8.0,) * 3,) * 2)  # as a code of single tokens
    assert parts(replace(DENSE, floors=()), worst, "bits").retention == pytest.approx(0.0)
    assert parts(DENSE, worst, "bits").retention < 0
    ignorant = replace(DENSE, loglikelihoods=DENSE.floors)
    for score in ("bits", "probability"):
        assert floor_scores(DENSE, score).tolist() == item_scores(ignorant, score).tolist()


def test_smoothed_bits_lose_one_bit_at_most_on_an_answer():
    gone = bits([900, 30], [20, 20])
    assert parts(TEXT, gone, "bits").retention < 0
    gain = [30 / LN2, 10 / LN2]  # of the dense model over the floor, in bits
    whole = [bits - 1 + math.log2(1 + 2**-bits) for bits in gain]
    assert parts(TEXT, TEXT, "smoothed").whole.tolist() == pytest.approx(whole)
    assert parts(TEXT, gone, "smoothed").kept.tolist() == pytest.approx([-1.0, whole[1]])
    assert parts(TEXT, TEXT, "smoothed").dense == pytest.approx(1 / LN2)  # printed as it is


def test_which_score_judges_which_task():
    contexts = choices([[-1.0, -2.0]], [0])  # one answer after two contexts
    for task, wanted in (
        (DENSE, {"primary": "probability", "margin": "margin", "ratio": "accuracy"}),
        (TEXT, dict.fromkeys(("primary", "probability", "accuracy"), "bits")),
        (MOST, dict.fromkeys(("primary", "bits", "ratio"), "accuracy")),
        (contexts, {"bits": "bits"}),
    ):
        assert {measure: score_of(task, measure) for measure in wanted} == wanted
    assert floor_scores(contexts, "probability").tolist() == [0.5]
    assert floor_scores(contexts, "margin").tolist() == [0.0]


def test_what_a_record_lacks_is_said():
    old = replace(DENSE, gold=(), loglikelihoods=(), bytes=(), floor="none", floors=(), unigram=())
    assert parts(old, old, "accuracy").retention == 1.0
    pruned_alone = replace(DENSE, floors=(), unigram=())
    with pytest.raises(InputError, match="no score without the knowledge"):
        parts(pruned_alone, DENSE)
    assert parts(DENSE, pruned_alone).retention == 1.0  # a pruned model needs no floors


def test_signal_is_a_dense_score_beyond_its_noise_of_knowing_nothing():
    blind = np.random.default_rng(0).normal(-3, 0.1, (60, 4))
    for more, signal in ((0, False), (2, True)):
        rows = np.add(blind, [more, 0, 0, 0])
        assert has_signal(choices(rows.tolist(), [0] * 60, blind.tolist())) is signal
    assert has_signal(bits([1.0, 2.0], [5, 5]), "ratio")
    assert not has_signal(accuracy([1.0]))  # one item tells nothing
