"""Floors: counts of items, syntax, bounds, and floors that cannot be proven."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from calmix.evaluation import floors
from calmix.evaluation.behaviour import Counted, behaviour, likelihood, proportion
from calmix.evaluation.floors import check_floors, lower_bound, lower_mean, parse_floors
from calmix.evaluation.retention import retention
from calmix.evaluation.summary import summary_lines
from tests.evaluation.helpers import accuracy, bits, refuses, scored, table, written

INVALID = """
60 -> 60 is above 1: write 60% or 0.6 | code=0 -> between 0 and 1 | nan -> between 0 and 1
much -> 'much' is not a share | code= -> not of the form | =0.9 -> not of the form
code=0.9,code=0.8 -> code is given twice | 0.9,0.8 -> the floor of all abilities is given twice
"""
WITHOUT_SIGNAL = """
cod=0.9 -> names 'cod', which the scores lack: they have code, chat, math, logic
math=0.9 -> math=0.9: the dense model has no signal in math | logic=0.9 -> no signal in logic
sql=0.9 -> not run without --allow-code-execution: mbpp
"""
TWICE = accuracy([1.0] * 50 + [0.0] * 50)  # a right answer weighs 2: 25 above chance
GUESSED = accuracy([1.0, 0.0] * 15, "coin", chance=0.5)


def answered(right, of, name="code", kept=None):
    """Answers of which the first `right` are right, or the first `kept` of those."""
    held = right if kept is None else kept
    return written(f"{name} task", name, [1] * held + [0] * (of - held))


def judged(text, dense, pruned):
    return check_floors(parse_floors(text), [(dense, pruned)])


def test_floor_parsing():
    assert parse_floors("90%") == {"": 0.9}
    assert parse_floors("0.8,code=0.9, chat=70%") == {"": 0.8, "code": 0.9, "chat": 0.7}
    for text, says in table(INVALID):
        refuses(says, parse_floors, text)


def test_exact_bounds_and_provable_floors():
    assert lower_bound(0, 20) == 0
    shares = (0.89999, 0.9, 0.57, 1.0)
    assert [floors.proven(one) for one in shares] == ["89.9", "90.0", "57.0", "100.0"]
    assert lower_bound(20, 20) == pytest.approx(0.05 ** (1 / 20))
    for kept, of, confidence in ((1, 20, 0.95), (45, 60, 0.9), (3, 7, 0.99)):
        bound = lower_bound(kept, of, confidence)  # where `kept` or more is this unlikely
        assert binom.sf(kept - 1, of, bound) == pytest.approx(1 - confidence)
    for confidence, floor in ((0.9, 0.5), (0.95, 0.77), (0.99, 0.95)):
        few = floors.items_needed(floor, confidence)
        assert lower_bound(few, few, confidence) >= floor
        assert lower_bound(few - 1, few - 1, confidence) < floor
    assert [floors.items_needed(one) for one in (0.9, lower_bound(40, 40))] == [29, 40]


def test_measure_order_per_ability():
    chosen = [accuracy([1.0] * n + [0.0] * (300 - n), "quiz", "general") for n in (280, 275)]
    nats = [[0.5 + more * (n % 3) for n in range(100)] for more in (0.0, 0.01)]
    likely = [bits(each, [2] * 100, "passages", "prose") for each in nats]
    more = bits([0.5] * 60, [2] * 60, "answers", "code")  # in an ability that has answers too
    rare = replace(answered(1, 40), name="rare")  # one right answer is no signal
    dense = scored(answered(100, 120), chosen[0], likely[0], more, rare)
    pruned = answered(100, 120, kept=97), chosen[1], likely[1], more, rare
    result = judged("0.9", dense, scored(*pruned, not_run=("humaneval",)))
    code, general, prose = result.tested
    assert (code.ability, code.measure, code.items) == ("code", "generated answers", 100)
    assert (code.kept, code.lost, code.gained) == (0.97, 3, 0)
    assert code.bound == pytest.approx(lower_bound(97, 100), abs=1e-3)
    assert (general.measure, general.items) == ("accuracy", 280)
    assert (general.lost, general.gained) == (5, 0)
    assert general.kept == pytest.approx((275 - 75) / (280 - 75))
    assert 0.93 < general.bound < general.kept
    kept = retention([likely[0]], [likely[1]], level=0.9).of("prose")
    assert (prose.measure, prose.items) == ("likelihood", 100)
    assert prose.kept == pytest.approx(kept.value)
    assert 0.9 < prose.bound <= 1 - 3 * (1 - lower_bound(100, 100)) < (kept.low or 0)
    assert result.passed
    first, silent, not_run = result.lines()
    assert first.startswith(
        "Kept at 95 % confidence, at least: code 90 % (3 of 100 right answers lost, 0 gained), "
        "general 90 % (5 of 280 right choices lost, 0 gained, by accuracy above chance), prose 90 "
        "% (100 items by likelihood). This holds for items like these"
    )
    assert silent == "Left out (no signal in the dense model): rare."
    assert "Not run: humaneval" in not_run


def test_missed_floor_tells_how_many_items_are_enough():
    dense, pruned = scored(answered(100, 120)), scored(answered(100, 120, kept=97))
    strict = judged("code=0.95", dense, pruned)
    assert strict.lines()[0].startswith(
        "Not kept at 95 % confidence: code keeps 97.0 % (3 of 100 right answers lost, 0 gained), "
        "proven 92.4 %, required 95 %: about 530 such items are enough. This"
    )
    (row,) = strict.to_dict()["tested"]
    assert row["passed"] is strict.to_dict()["passed"] is strict.passed is False
    for times, proven_then in ((3, False), (6, True)):
        both = (answered(100 * times, 600), answered(100 * times, 600, kept=97 * times))
        assert judged("0.95", *map(scored, both)).passed is proven_then


def test_gains_offset_losses():
    """Of 77 right answers the first four are lost, and of 23 wrong ones so many gained."""
    found = {}
    for gained in (0, 4, 23):
        pruned = written("code task", "code", [0] * 4 + [1] * (73 + gained) + [0] * (23 - gained))
        (found[gained],) = judged("0.5", scored(answered(77, 100)), scored(pruned)).tested
    # Losses alone give the exact bound, however many answers were wrong before and after.
    assert found[0].bound == pytest.approx(lower_bound(73, 77), abs=2e-3)
    assert (found[4].kept, found[4].lost, found[4].gained) == (1.0, 4, 4)
    assert found[0].bound < 0.9 < found[4].bound < found[23].bound
    # More gained than lost proves no more than nothing lost.
    assert found[23].kept > 1
    assert found[23].bound == found[23].provable == lower_bound(77, 77)


@pytest.mark.parametrize(("lost", "gained"), [(0.15, 0.05), (0.3, 0.2)])
def test_bound_of_answers_lost_and_gained(lost, gained):
    """Nominal 5 %."""
    dense = np.broadcast_to(np.arange(100) < 75, (500, 100))
    luck = np.random.default_rng(0).random(dense.shape)
    pruned = np.where(dense, luck >= lost, luck < 3 * gained)
    (ones,) = lower_mean([(pruned * 1.0, dense * 1.0)], [np.ones(500)])[None]
    assert (ones > 1 - lost + gained).mean() <= 0.065
    assert np.median(ones) > 0.7 - lost + gained


def test_bound_is_at_most_provable():
    for task in (answered(40, 60), accuracy([1.0] * 50 + [0.0] * 10), bits([0.5] * 40, [2] * 40)):
        (found,) = judged("0.5", scored(task), scored(task)).tested
        assert found.kept == 1
        assert found.bound == pytest.approx(found.provable, abs=0.03)
        assert 0.5 < found.bound <= found.provable < 1


def test_floors_without_signal_are_refused():
    guessed = accuracy([1.0, 0.0, 0.0, 0.0] * 10, "coin", "logic")
    tasks = answered(12, 60), answered(90, 90, "chat"), answered(2, 60, "math"), guessed
    dense = scored(*tasks, not_run=("mbpp",))
    assert judged("0.75", dense, dense).untested == ("math", "logic")
    for floor, says in table(WITHOUT_SIGNAL):
        refuses(says, judged, floor, dense, dense)
    refuses("no signal in any ability", judged, "0.9", scored(guessed), scored(guessed))


def test_unprovable_floor_names_the_nearest_which_is_provable():
    for floor, task, says in (
        ("0.9", answered(12, 60), "code=0.9 needs 29 right answers and has 12, .* most 0.77"),
        ("code=0.95", answered(12, 60), "code=0.95 needs 59 right answers and has 12"),
        ("0.9", bits([0.5] * 20, [2] * 20), r"89 items and has 20, which can prove at most 0\.58:"),
        ("0.9", bits([0.5] * 5, [2] * 5), r"code=0\.9 needs 89 items and has 5, .* nothing:"),
        ("0.9", TWICE, f"needs {floors.items_needed(0.95)} right choices and has 50"),
    ):
        dense = scored(task, answered(90, 90, "chat"))
        found, asked = judged(floor, dense, dense), parse_floors(floor)
        assert not found.passed
        assert re.match(f"Not proven at 95 % confidence: .*{says}", found.lines()[0])
        refuses(f"even if all is kept: .*{says}", floors.check_provable, asked, [dense], 0.95)
    dense = scored(answered(12, 60), answered(90, 90, "chat"))
    assert judged("0.9,code=0.77", dense, dense).passed
    floors.check_provable(parse_floors("0.9,code=0.77"), [dense], 0.95)
    (found,) = judged("0.8", scored(TWICE), scored(TWICE)).tested
    assert found.provable == pytest.approx(1 - 2 * (1 - lower_bound(50, 50)))
    assert found.needed == floors.items_needed(0.9)


def test_answer_counts_and_worst_ability():
    def model(qa, sums, few, quiz, **more):
        chosen = accuracy(quiz, "quiz", "general"), GUESSED
        asked = ("qa", "general", qa), ("sums", "math", sums), ("few", "chat", few)
        return scored(*(written(*one) for one in asked), *chosen, **more)

    dense = model([1] * 12 + [0] * 3, [1] * 10 + [0] * 4, [1] * 3, [1.0] * 20)
    kept = [1] * 9 + [0] * 3 + [1, 1, 0]
    pruned = model(kept, [0] * 14, [0] * 3, [1.0, 0.0] * 10, not_run=("humaneval",))
    found = behaviour((dense, pruned))
    assert (found.choices.pruned, found.at_chance) == (10, ("coin",))
    counts = [(one.name, one.lost, one.gained, one.ratio) for one in found.abilities]
    assert counts == [("general", 3, 2, 11 / 12), ("math", 10, 0, 0.0), ("chat", 3, 0, None)]
    assert found.right.total.value == pytest.approx(11 / 24)  # of two abilities with enough
    assert pruned.retention(dense, resamples=2000) == found.right
    formed = replace(found, form="worked examples")
    first, kept, code, accurate = summary_lines(formed, likelihood(dense, pruned), "")
    assert first.startswith("Right answers: a loss is shown; 45.8 [")
    assert "(mean of 2 abilities; too few to tell: chat), 13 of 22 lost, 2 gained, p = 0" in first
    assert kept.startswith("Kept: 9 of 22 right answers, 40.9 [23.3, 61.3] %, least in math, 0 of")
    assert kept.endswith("Asked: 32 questions, all with worked examples.")
    assert "not run (humaneval" in code
    assert "50.0 [29.9, 70.1] % of 20 choices are right (dense model: 100.0 %, chance" in accurate
    assert accurate.endswith("left out, because the dense model is at chance: coin.")
    pair = replace(dense, form="chat template"), replace(pruned, form="worked examples")
    refuses("in its chat template, the other with worked", behaviour, pair)


def test_summary_says_what_cannot_be_told():
    for task, says in (
        (GUESSED, "Generated answers were not measured; to measure them: calmix x"),
        (GUESSED, "Accuracy: the dense model is at chance (coin)."),
        (
            written("qa", "general", [0] * 10),
            "The dense model gets none of 10 generated answers right: nothing can be kept.",
        ),
        (
            bits([3.0] * 9, [1] * 9),
            "Likelihood: the dense model is not above its baseline: nothing can be kept.",
        ),
    ):
        both = scored(task), scored(task)
        assert says in summary_lines(behaviour(both), likelihood(*both), "calmix x")


def test_tasks_of_two_suites():
    own, ours = (("support", 40), ("chat", 99))
    own, ours = (written("requests", name, [1] * count) for name, count in (own, ours))
    lost = replace(own, values=(0.0,) * 40)
    pairs = [(scored(own), scored(lost)), (scored(ours, suite="t"),) * 2]
    result = check_floors(parse_floors("0.9"), pairs)
    assert {one.ability: one.passed for one in result.tested} == {"support": False, "chat": True}
    other = replace(own, dimension="chat", items=tuple(f"mine/{n}" for n in range(40)))
    found = behaviour((scored(other), scored(other)), (scored(ours, suite="t"),) * 2)
    assert found.answers.dense == 139
    # A task of two suites counts where it has most items.
    dense = scored(written("qa", "general", [1] * 8 + [0, 0]))
    pruned = scored(written("qa", "general", [1] * 6 + [0] * 4))
    few = scored(written("qa", "general", [1] * 2 + [0] * 7), suite="few")
    alone = behaviour((dense, pruned)).answers
    assert (alone.asked, alone.dense, alone.share) == (10, 8, proportion(6, 8))
    assert behaviour((few, few), (dense, pruned), (few, few)).answers == alone
    refuses("cannot be compared", behaviour, (few, pruned))


def test_task_that_one_model_was_not_asked_is_left_out():
    """A chat template without tools cannot ask for tool calls."""
    dense = scored(answered(20, 25), replace(answered(20, 25), name="tools"))
    small = scored(dense.tasks[0], replace(dense.tasks[1], values=(), answers=()))
    for pair in ((dense, small), (small, dense)):
        assert behaviour(pair).answers.asked == 25
        assert pair[1].retention(pair[0]).tasks[0].items == 25
        assert check_floors(parse_floors("0.5"), [pair]).tested[0].items == 20


def test_dense_repeat():
    texts = tuple(map(str, range(20)))
    right = ("qa", "general", [1] * 12 + [0] * 8), ("sums", "math", [1] * 10 + [0] * 10)
    asked = [replace(written(*one), answers=texts) for one in right]
    dense = scored(*asked, accuracy([1.0] * 20, "quiz", "general"))
    values, other = ((0.0, *one.values[1:18], 1.0, 1.0) for one in asked), ("other", *texts[1:])
    again = (replace(one, values=v, answers=other) for one, v in zip(asked, values, strict=True))
    found = behaviour((replace(dense, repeat=tuple(again)), dense))
    counts = found.repeat.answers
    assert (counts.lost, counts.gained, counts.same) == (2, 4, 38 / 40)
    assert found.repeat.right.total.value == pytest.approx((13 / 12 + 11 / 10) / 2)
    assert (found.repeat.choices, found.repeat.repeat) == (None, None)
    line = summary_lines(found, None, "")[1]
    assert line.startswith("The dense model against itself, in other batches: 109.2 [")
    assert line.endswith("2 of 22 lost, 4 gained; 90.9 % kept, 95.0 % of its answers identical.")


def test_mcnemar_p_and_wilson_interval():
    for lost, gained in ((12, 11), (0, 0), (5, 0), (700, 600), (1, 3)):
        wanted = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        one, other = (Counted("", 9, *both, 0) for both in ((lost, gained), (gained, lost)))
        assert one.p == other.p == pytest.approx(wanted)
    for right, of, low, high in ((0, 13, 0.0, 0.228), (13, 48, 0.166, 0.410), (5, 5, 0.566, 1)):
        found = proportion(right, of)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)
    assert proportion(0, 0).value is None


def lose(share, lost, rng, whole):
    return lost * whole * (rng.random(whole.shape) < share)


@pytest.mark.parametrize(
    ("draw", "times", "items", "tasks"),
    [
        (lambda rng, whole: rng.gamma(0.2, 5, whole.shape), 1, 60, 1),
        (partial(lose, 0.1, 1), 1, 60, 1),
        (lambda rng, whole: rng.lognormal(-1.125, 1.5, whole.shape), 3, 90, 3),
        (partial(lose, 0.05, 2), 3, 100, 1),
        (lambda rng, whole: 0.05 * whole + lose(0.02, 2.5, rng, whole), 3, 60, 1),
    ],
)
def test_likelihood_bound_on_skewed_losses(draw, times, items, tasks):
    """Nominal 5 %; a bootstrap-t is above the truth in up to 29 % of these samples."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(tasks):
        whole = rng.gamma(4, 2.5, (300, items // tasks))
        rows.append((whole - draw(rng, whole), whole))
    bounds = lower_mean(rows, [floors.most_lost(*row, times) for row in rows])
    assert (bounds > 0.9).mean() <= 0.065
    assert np.median(bounds) > 0.7


def test_bound_of_a_mean_is_exact_for_items_kept_or_lost():
    for kept, of in ((20, 20), (45, 60), (3, 7), (290, 300)):
        values = np.array([[1.0] * kept + [0.0] * (of - kept)])
        (bound,) = lower_mean([(values, np.ones_like(values))], [np.ones(1)])
        assert bound == pytest.approx(lower_bound(kept, of), abs=0.01)
    few, many = np.ones((1, 10)), np.ones((1, 1000))  # one more is lost where it does most harm
    (bound,) = lower_mean([(few, few), (many, many)], [np.ones(1)] * 2)
    assert bound == pytest.approx(1 - (1 - lower_bound(10, 10)) / 2, abs=0.01)


def test_likelihood_floor_uses_the_bound():
    lost = np.random.default_rng(0).gamma(0.2, 0.4, 400)
    dense, pruned = (bits(list(one), [2] * 400) for one in (np.full(400, 0.5), 0.5 + lost))
    (found,) = judged("0.5", scored(dense), scored(pruned)).tested
    assert 0.5 < found.bound < (retention([dense], [pruned], level=0.9).of("code").low or 0)
    smooth = scored(replace(dense, primary="smoothed"))
    (found,) = judged("0.9", smooth, smooth).tested  # no item can lose more than it has
    assert (found.needed, found.provable) == (29, lower_bound(400, 400))
