"""Declared comparisons: verdicts, predictions, the best of several sets, exclusions, gaps."""

import numpy as np
import pytest

from calmix.errors import InputError
from calmix.evaluation.measures import TaskScores
from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.declaration import Declaration, Declared, Pair
from calmix.study.findings import summarise
from calmix.study.spec import Amends
from tests.synthetic import Plan, study, trials_of

QUICK = Settings(resamples=400)
DATE = "2026-01-02T03:04:05+00:00"
COUNT = 100  # items of a task
TASKS = ("general", "facts"), ("code", "programs"), ("code", "sums")


def answers(dimension, name, right):
    """Return a task with right answers at the given positions."""
    values = tuple(float(at in right) for at in range(COUNT))
    items = tuple(map(str, range(COUNT)))
    return TaskScores(name, dimension, "as_asked", "kept", 0.0, items, values)


def shuffled(count, seed=0):
    """Return that many positions."""
    return set(np.random.default_rng(seed).permutation(COUNT)[:count].tolist())


def made(right, *, models=("m",), methods=("sparsegpt",), seeds=(0, 1, 2), **changes):
    """Return a study of generated answers. `right` gives, by set and method if these are named,
    right answers of each task: their number, or a function of the seed that returns positions."""
    trials = tuple(
        one.model_copy(update={"model": model, "id": f"{model}-{one.id}"})
        for model in models
        for method in methods
        for one in trials_of(dict.fromkeys(right, (0.5, 0.5)), method, steps=[0] * len(seeds))
    )

    def scored(one):
        inputs = right[one.calibration]
        inputs = inputs[one.method] if isinstance(inputs, dict) else inputs
        inputs = inputs if isinstance(inputs, tuple) else (inputs,) * len(TASKS)
        return tuple(
            answers(*task, each(one.seed) if callable(each) else shuffled(each, one.seed))
            for task, each in zip(TASKS, inputs, strict=True)
        )

    dense = tuple(answers(*task, range(COUNT)) for task in TASKS)
    fields = {
        "dense": dict.fromkeys(models, dense),
        "scores": {one.id: scored(one) for one in trials},
        "dates": {one.id: DATE for one in trials},
    }
    return study(Plan(), trials=trials).model_copy(update=fields | changes)


def declaring(results, comparisons, *, amends=None, since=DATE, **fields):
    """Return the study with declared comparisons: by name both sides, as {"calibration": "mix"},
    and more keys."""

    def matches(key, side):
        sets = side.get("best_of", [side.get("calibration", key[1])])
        return key[1] in sets and key[2] == side.get("method", key[2])

    def pairs(said):
        sides = said["of"], said["over"]
        named = {"calibration" if key == "best_of" else key for key in sides[0]}
        cells = {}
        for one in results.trials:
            rest = one.model, *(getattr(one, key) for key in {"calibration", "method"} - named)
            for side, keys in zip(sides, cells.setdefault(rest, ([], [])), strict=True):
                keys += [one.key] if matches(one.key, side) else []
        return tuple(Pair(of=of, over=over) for of, over in cells.values() if of and over)

    fields = {"primary": "right"} | fields
    content = Declaration(
        comparisons=comparisons,
        pairs={name: pairs(said) for name, said in comparisons.items()},
        **fields,
    )
    declared = Declared(
        study=results.name, since=since, hash=content.hash, amends=amends, declaration=content
    )
    return results.model_copy(update={"declarations": (*results.declarations, declared)})


def over(name, **more):
    return {"of": {"calibration": "mix"}, "over": {"calibration": name}, **more}


def test_verdicts():
    right = {"mix": 80, "a": 40, "b": lambda seed: shuffled(80, seed + 9), "c": 95}
    results = made(right)
    said = {
        "far": over("a", predict=[30, 50], refuted={"below": 5}),
        "near": over("b", predict=[2, 28], refuted={"below": 30}),
        "behind": over("c", refuted={"above": 0, "below": -99}),
    }
    analysis = analyse(declaring(results, said, margin=20), QUICK)
    far, near, behind = analysis.comparisons
    assert [one.verdict for one in analysis.comparisons] == ["more", "level", "less"]
    assert far.gap.value == pytest.approx(0.4)
    assert (far.seeds, far.best, far.model) == ("own", (), "m")
    assert (far.predicted, far.refuted) == (True, False)
    assert (near.predicted, near.refuted) == (False, True)
    assert (behind.predicted, behind.refuted) == (None, False)
    assert [one.p_corrected for one in (near, far)] == [
        pytest.approx(near.gap.p),
        pytest.approx(min(1, far.gap.p * (3 if far.gap.p < behind.gap.p else 2))),
    ]
    for margin in (None, 1):
        again = analyse(declaring(results, said, margin=margin), QUICK).comparisons
        assert again[1].verdict == "cannot be told"
    # One seed of each set: the interval is over items alone, which does not show a level.
    once = made(right, seeds=(0,))
    one = analyse(declaring(once, said, margin=20), QUICK).comparisons[1]
    assert (one.seeds, one.level, one.verdict) == ("unknown", False, "cannot be told")
    # A significant difference before correction is not one after it.
    near = {"mix": 65, "a": lambda seed: shuffled(55, seed + 5), "b": 65, "c": 65}
    weak = made(near, seeds=(0,))
    alone = analyse(declaring(weak, {"far": over("a")}), QUICK).comparisons[0]
    first = analyse(declaring(weak, said), QUICK).comparisons[0]
    assert first.gap == alone.gap
    assert first.gap.p < 0.05 < first.p_corrected == pytest.approx(3 * first.gap.p)
    assert (alone.verdict, first.verdict) == ("more", "cannot be told")


def test_other_sets_do_not_change_a_comparison():
    right = {"b": 60, "mix": 80, "c": 30, "a": 40}
    some, whole = (
        analyse(declaring(made(each), {"far": over("a")}), QUICK).comparisons[0]
        for each in ({"mix": 80, "a": 40}, right)
    )
    assert whole.gap.value == some.gap.value
    ends = some.gap.item_low, some.gap.item_high
    assert (whole.gap.item_low, whole.gap.item_high) == pytest.approx(ends)


def test_comparison_per_model_averages_methods():
    right = {"mix": {"sparsegpt": 60, "admm": 80}, "a": {"sparsegpt": 50, "admm": 50}}
    results = made(right, models=("m", "n"), methods=("sparsegpt", "admm"))
    said = {
        "mixed": over("a"),
        "solver": {"of": {"method": "admm"}, "over": {"method": "sparsegpt"}},
    }
    analysis = analyse(declaring(results, said), QUICK).comparisons
    assert [(one.name, one.model) for one in analysis] == [
        (name, model) for name in ("mixed", "solver") for model in "mn"
    ]
    assert [one.gap.value for one in analysis] == pytest.approx([0.2, 0.2, 0.1, 0.1])
    gone = results.model_copy(update={"trials": results.trials[:6]})  # SparseGPT on one model
    part = declaring(results, said).model_copy(update={"trials": gone.trials})
    analysis = analyse(part, QUICK)
    assert [one.gap.value for one in analysis.comparisons] == [pytest.approx(0.1), None, None, None]
    assert len(analysis.missing) == 18
    assert analysis.comparisons[0].p_corrected == pytest.approx(
        min(1, 4 * analysis.comparisons[0].gap.p)
    )
    assert analysis.comparisons[1].verdict == "cannot be told"


def test_best_of_is_chosen_on_odd_items():
    odd, even = set(range(0, COUNT, 2)), set(range(1, COUNT, 2))
    right = {
        "mix": lambda seed: shuffled(40) | {at for at in even if at < 60},
        "a": lambda seed: odd,  # best on odd items, and none of the others right
        "b": lambda seed: even | {0, 2, 4},
        "c": lambda seed: shuffled(30, seed),
    }
    best = {"of": {"calibration": "mix"}, "over": {"best_of": ["a", "b", "c"]}}
    results = made(right)
    (one,) = analyse(declaring(results, {"best": best}), QUICK).comparisons
    assert one.best == ("a",)
    mix = right["mix"](0) & even
    assert one.gap.value == pytest.approx(len(mix) / len(even))
    assert one.verdict == "more"


def test_post_hoc_exclusion_is_shown_separately():
    results = made({"mix": (80, 80, 30), "a": (70, 70, 90), "b": (60, 60, 60)})
    said = {"mixed": over("a", predict=[0, 9])}
    analysis = analyse(declaring(results, said), QUICK)
    assert analysis.comparisons[0].gap.value == pytest.approx((0.1 + (0.55 - 0.8)) / 2)
    assert analysis.afterwards == ()
    later = analyse(declaring(results, said), QUICK.model_copy(update={"without": ["sums"]}))
    assert later.comparisons == analysis.comparisons
    assert later.afterwards[0].gap.value == pytest.approx(0.1)
    assert (later.comparisons[0].verdict, later.afterwards[0].verdict) == ("less", "more")
    summary = summarise(later)
    assert "Left out afterwards, not declared: sums." in summary["opening"]
    (line,) = summary["declared"]
    assert line.startswith("mixed: less, −7.5 [")
    assert "; prediction 0 to 9: not met. Afterwards, without sums: more, +10.0 [" in line
    excluded = {"sums": "one text can swing them"}
    same = analyse(declaring(results, said, exclude=excluded), QUICK)
    assert same.comparisons[0].gap == later.afterwards[0].gap
    assert same.conditions[0].ranking[0].total.value == pytest.approx(0.8)
    for one in (same, analyse(declaring(results, {}, exclude=excluded), QUICK)):
        assert "Left out, as declared: sums (one text can swing them)." in summarise(one)["opening"]
    for without, says in (
        (["sum"], "no task 'sum': did you mean sums"),
        (["facts", "programs", "sums"], "leaves no task"),
    ):
        with pytest.raises(InputError, match=says):
            analyse(results, QUICK.model_copy(update={"without": without}))


def test_summary_reports_deviations_from_the_declaration():
    results = made({"mix": 80, "a": 40, "b": 60})
    plain = summarise(analyse(results, QUICK))
    nothing = "Study made-up declares no comparisons: everything here is exploratory."
    assert plain["opening"] == [nothing]
    assert plain["declared"] == []
    said = {"mixed": over("a"), "other": over("b")}
    declared = declaring(results, said, margin=5)
    content = declared.declaration
    (line,) = summarise(analyse(declared, QUICK))["opening"]
    assert line == (
        "Study made-up declares 2 comparisons by measure right, margin 5 points (hash "
        f"{content.hash[:12]}), declared 2026-01-02 03:04 UTC."
    )
    left = [
        one for one in results.trials if one.calibration != "b" and one.id != "m-a-sparsegpt-60-2"
    ]
    dates = results.dates | {left[0].id: "2025-12-31T00:00:00+00:00"}
    late = declared.model_copy(update={"trials": tuple(left), "dates": dates})
    _, *lines = summarise(analyse(late, QUICK))["opening"]
    first, second, third = (f"b sparsegpt 60% seed {seed} (m)" for seed in (0, 1, 2))
    assert lines == [
        "Older than the declaration: 1 trial of 9 that are compared.",
        f"Declared and not run: {first}, {second} and {third}.",
        "Missing seeds: a sparsegpt 60% seed 2 (m).",
    ]
    changed = content.model_copy(update={"margin": 9.0})
    stored = declared.declarations[0].model_copy(update={"declaration": changed})
    stored = declared.model_copy(update={"declarations": (stored,)})
    _, line = summarise(analyse(stored, QUICK))["opening"]
    assert line == f"The declaration was changed: its hash was {content.hash[:12]}."
    amends = Amends(study="made-up", reason="five points are too few")
    again = declaring(declared, said, margin=8, amends=amends, since="2026-02-01T00:00:00+00:00")
    _, *lines = summarise(analyse(again, QUICK))["opening"]
    assert lines == [
        "Study made-up amends made-up, declared 2026-01-02 03:04 UTC: five points are too few.",
        "Older than the declaration: 9 trials of 9 that are compared.",
    ]


def test_dense_repeat_is_the_ceiling():
    again = tuple(answers(*task, range(1, COUNT)) for task in TASKS)
    results = made({"mix": 80, "a": 40}, repeat={"m": again})
    analysis = analyse(results, QUICK)
    assert analysis.ceilings == {"m": pytest.approx(0.99)}
    line = "The dense model against itself, in other batches: 99.0 % (m)."
    assert line in summarise(analysis)["certainty"]
