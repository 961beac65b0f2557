"""What is kept of answers and choices, in counts of items."""

from dataclasses import replace

import pytest

from calmix.errors import InputError
from calmix.evaluation.behaviour import behaviour, likelihood, proportion
from calmix.report import words
from tests.evaluation.helpers import accuracy, bits, scored, written


def test_answers_are_counted_item_by_item_and_the_worst_ability_is_named():
    guessed = accuracy([1.0, 0.0] * 15, "coin", chance=0.5)
    dense = scored(
        written("qa", "general", [1] * 8 + [0, 0]), written("sums", "math", [1] * 6 + [0] * 4),
        written("few", "chat", [1] * 3), accuracy([1.0] * 20, "quiz", "general"), guessed,
    )  # fmt: skip
    pruned = scored(
        written("qa", "general", [1] * 6 + [0, 0, 1, 0]), written("sums", "math", [0] * 10),
        written("few", "chat", [0] * 3), accuracy([1.0, 0.0] * 10, "quiz", "general"), guessed,
        not_run=("humaneval",),
    )  # fmt: skip
    found = behaviour((dense, pruned))
    assert found.choices is not None
    assert (found.choices.pruned, found.at_chance) == (10, ("coin",))
    first, code, accurate, *rest = words.verdict(found, likelihood(dense, pruned), "calmix x")
    assert first == (
        "This model keeps 6 of the 17 generated answers that the dense model gets right: "
        "35.3 [17.3, 58.7] %, least in math, 0 of 6 (asked: 23, gained: 1)."
    )
    assert "not run (humaneval" in code
    assert accurate == (
        "Accuracy: 50.0 [29.9, 70.1] % of 20 choices are right, 100.0 % under the dense model, "
        "25.0 % by chance (left out, the dense model is at chance: coin)."
    )
    assert not rest  # nothing here is scored by likelihood
    guesses = behaviour((scored(guessed), scored(guessed)))
    assert words.verdict(guesses, None, "x")[1] == "Accuracy: the dense model is at chance (coin)."
    lost = scored(bits([3.0] * 9, [1] * 9))  # no better than the code of single tokens
    assert words.verdict(found, likelihood(lost, lost), "x")[-1].startswith("Likelihood: the dense")
    silent = replace(found, answers=replace(found.answers, dense=0, kept=0))
    assert words.verdict(silent, None, "")[0].startswith("The dense model gets none of 23")
    formed = words.verdict(replace(found, form="worked examples"), None, "")[0]
    assert "(asked: 23 by worked examples, gained: 1)" in formed
    with pytest.raises(InputError, match="in its chat template, the other by worked"):
        behaviour((replace(dense, form="chat template"), replace(pruned, form="worked examples")))


def test_where_only_right_answers_were_asked_for_nothing_is_said_of_others():
    dense = scored(written("qa", "general", [1] * 8 + [0, 0]))
    pruned = scored(written("qa", "general", [1] * 6 + [0] * 4))
    found = behaviour((dense, replace(pruned, right_only=True)))
    assert (found.answers.asked, found.answers.dense, found.answers.gained) == (8, 8, None)
    (said,) = words.verdict(found, None, "")
    assert said.endswith("75.0 [40.9, 92.9] % (only these were asked).")
    few = scored(written("qa", "general", [1] * 2 + [0] * 7), suite="few")  # fewer items, no less
    again = behaviour((few, few), (dense, replace(pruned, right_only=True)), (few, few))
    assert again.answers == found.answers
    whole = behaviour((dense, pruned))
    assert (whole.answers.asked, whole.answers.share) == (10, found.answers.share)


def test_a_task_of_two_suites_counts_where_it_has_most_items():
    few, many = (scored(accuracy([1.0] * count, "quiz", "general"), suite=f"s{count}")
                 for count in (10, 30))  # fmt: skip
    for pairs in (((few, few), (many, many)), ((many, many), (few, few))):
        found = behaviour(*pairs)
        assert found.choices is not None
        assert found.choices.asked == 30
    assert "was not measured" in words.verdict(found, None, "calmix evaluate x")[0]
    with pytest.raises(InputError, match="cannot be compared"):
        behaviour((few, many))


@pytest.mark.parametrize(
    ("right", "of", "low", "high"), [(0, 13, 0.0, 0.228), (13, 48, 0.166, 0.410), (5, 5, 0.566, 1)]
)
def test_the_interval_of_a_share_is_wilsons(right, of, low, high):
    found = proportion(right, of)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    assert proportion(0, 0).value is None
