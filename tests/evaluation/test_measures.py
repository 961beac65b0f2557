"""Measures: each score by hand, anchors, nothing clipped, and what a record must hold for them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmix.errors import InputError
from calmix.evaluation.measures import (
    floor_scores,
    has_signal,
    item_scores,
    mean_score,
    parts,
    score_of,
)
from tests.evaluation.helpers import accuracy, bits, choices

DENSE = choices([[-1.0, -3.0, -2.0], [-4.0, -2.0, -2.5]], [0, 1], [[-2.0] * 3, [-2.0, -3.0, -4.0]])


def softmax(row, at):
    return math.exp(row[at]) / sum(map(math.exp, row))


def test_every_score_by_hand():
    assert item_scores(DENSE, "probability").tolist() == pytest.approx(
        [softmax([-1, -3, -2], 0), softmax([-4, -2, -2.5], 1)]
    )
    assert item_scores(DENSE, "margin").tolist() == pytest.approx(
        [1 / math.log(2) / 4, 0.5 / math.log(2) / 4]
    )
    assert item_scores(DENSE, "bits").tolist() == pytest.approx([1 / math.log(2), 2 / math.log(2)])
    assert mean_score(DENSE, "bits") == pytest.approx(3 / math.log(2) / 8)
    assert item_scores(DENSE, "accuracy").tolist() == [1, 1]


def test_nothing_is_kept_at_the_score_without_the_question():
    ignorant = replace(DENSE, loglikelihoods=DENSE.floors)
    for measure in ("probability", "margin"):
        assert parts(DENSE, ignorant, measure).retention == pytest.approx(0.0), measure
        assert parts(DENSE, DENSE, measure).retention == 1.0
    worst = replace(DENSE, loglikelihoods=((-8.0,) * 3,) * 2)  # as a code of single tokens
    alone = replace(DENSE, floors=())
    assert parts(alone, worst, "bits").retention == pytest.approx(0.0)
    assert parts(DENSE, worst, "bits").retention < 0  # the better of the two is the baseline
    assert floor_scores(DENSE, "bits").tolist() == item_scores(ignorant, "bits").tolist()
    floor = item_scores(ignorant, "probability")
    assert floor_scores(DENSE, "probability").tolist() == floor.tolist()


def test_a_score_below_the_floor_is_less_than_nothing():
    dense = accuracy([1.0] * 75 + [0.0] * 25)
    worse = accuracy([1.0] * 10 + [0.0] * 90)
    assert parts(dense, worse).retention == pytest.approx((0.10 - 0.25) / (0.75 - 0.25))
    assert parts(dense, worse, "ratio").retention == pytest.approx(10 / 75)
    text, gone = bits([10, 30], [20, 20], floor=2.0), bits([90, 90], [20, 20])
    assert parts(text, gone).retention == pytest.approx((80 - 180) / (80 - 40))


def test_bits_by_the_papers_reading_are_dense_over_pruned():
    dense, pruned = bits([10.0, 30.0], [20, 20]), bits([20.0, 60.0], [20, 20])
    for measure in ("accuracy", "ratio"):
        assert parts(dense, pruned, measure).retention == pytest.approx(0.5)
    assert parts(dense, pruned).retention == pytest.approx((120 - 80) / (120 - 40))


def test_smoothed_bits_lose_one_bit_at_most_on_an_answer():
    dense, gone = bits([10, 30], [20, 20], floor=2.0), bits([900, 30], [20, 20])
    assert parts(dense, gone, "bits").retention < 0
    gain = [30 / math.log(2), 10 / math.log(2)]  # of the dense model over the floor, in bits
    whole = [bits - 1 + math.log2(1 + 2**-bits) for bits in gain]
    assert parts(dense, dense, "smoothed").whole.tolist() == pytest.approx(whole)
    assert parts(dense, gone, "smoothed").kept.tolist() == pytest.approx([-1.0, whole[1]])
    unknowing = bits([40, 40], [20, 20])
    assert parts(dense, unknowing, "smoothed").retention == pytest.approx(0.0)
    assert mean_score(dense, "smoothed") == mean_score(dense, "bits")  # printed as they are


def test_which_score_judges_which_task():
    assert score_of(DENSE, "primary") == "probability"
    assert score_of(DENSE, "margin") == "margin"
    assert score_of(DENSE, "ratio") == "accuracy"
    text, written = bits([1], [1]), accuracy([1.0])
    assert [score_of(text, m) for m in ("primary", "probability", "accuracy")] == ["bits"] * 3
    assert [score_of(written, m) for m in ("primary", "bits", "ratio")] == ["accuracy"] * 3
    contexts = choices([[-1.0, -2.0]], [0])  # one answer after two contexts
    assert score_of(contexts, "bits") == "bits"
    assert floor_scores(contexts, "probability").tolist() == [0.5]
    assert floor_scores(contexts, "margin").tolist() == [0.0]


def test_what_a_record_lacks_is_said():
    old = replace(DENSE, gold=(), loglikelihoods=(), bytes=(), floor="none", floors=(), unigram=())
    assert parts(old, old, "accuracy").retention == 1.0
    with pytest.raises(InputError, match=r"hold no log-likelihoods.*--measure accuracy"):
        parts(old, old)
    pruned_alone = replace(DENSE, floors=(), unigram=())
    with pytest.raises(InputError, match="no score without the knowledge"):
        parts(pruned_alone, DENSE)
    assert parts(DENSE, pruned_alone).retention == 1.0  # a pruned model needs no floors


def test_signal_is_a_dense_score_beyond_its_noise_of_knowing_nothing():
    rng = np.random.default_rng(0)
    rows = rng.normal(-3, 0.1, (60, 4))
    blind = choices(rows.tolist(), [0] * 60, rows.tolist())
    assert not has_signal(blind)
    knows = rows.copy()
    knows[:, 0] += 2
    assert has_signal(choices(knows.tolist(), [0] * 60, rows.tolist()))
    assert has_signal(bits([1.0, 2.0], [5, 5]), "ratio")
    assert not has_signal(accuracy([1.0]))  # one item tells nothing


@given(
    st.lists(st.lists(st.floats(-50, -0.1), min_size=3, max_size=3), min_size=1, max_size=20),
    st.floats(-5, 5),
)
def test_a_probability_does_not_change_with_what_all_choices_share(rows, shift):
    gold = [0] * len(rows)
    moved = [[value + shift for value in row] for row in rows]
    a = item_scores(choices(rows, gold), "probability")
    b = item_scores(choices(moved, gold), "probability")
    assert np.allclose(a, b, atol=1e-9)
    assert ((a >= 0) & (a <= 1)).all()
