"""Which of several models: the interval of a deficit, the choice, the table and the page."""

import json
from dataclasses import replace

import pytest

from calmix.evaluation import choosing
from calmix.evaluation.behaviour import deficit, paired
from calmix.evaluation.choosing import Candidate, choice_text, choose_smallest, model_rows
from tests.evaluation.helpers import lacks, scored
from tests.evaluation.test_prompts import chats as chats
from tests.evaluation.test_prompts import task, written
from tests.evaluation.test_served import Fake, reply, running


def test_the_interval_of_a_paired_difference_is_newcombes():
    """Table III, method 10, of Newcombe 1998 (Statistics in Medicine 17, 2635)."""
    for (both, first, second, none), (low, high) in {
        (36, 12, 2, 0): (0.0569, 0.3404),
        (54, 0, 0, 0): (-0.0664, 0.0664),
        (30, 0, 0, 24): (-0.0358, 0.0358),
        (0, 30, 0, 0): (0.8395, 1.0),
    }.items():
        one = [1] * (both + first) + [0] * (second + none)
        other = [1] * both + [0] * first + [1] * second + [0] * none
        found = deficit(paired("answers", [*zip(one, other, strict=True)]))
        assert found.value == pytest.approx((first - second) / len(one))
        assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)


def good(right):
    return task(["x"] * 200, [1] * right + [0] * (200 - right), properties=({},) * 200)


def candidate(name, kept, size):
    return Candidate(name, (scored(good(180)), scored(good(kept))), size, size / 125)


Q8, Q5, Q2 = (candidate(*of) for of in (("q8", 180, 800), ("q5", 178, 500), ("q2", 140, 200)))
BEST = candidate("best", 190, 800)


def test_choices_in_words():
    unknown = [replace(one, size=None) for one in (Q8, Q5)]
    for says, (margin, *found) in {  # what is said, the margin, and the models
        "Use q5: the smallest that is not worse than the best (dense) by 5.0": (0.05, Q8, Q5, Q2),
        "Nearest is q8, 0.0 behind, at most 1.8: use a larger one": (0.001, Q8, Q5, Q2),
        "Use best: the best; no smaller one is shown": (0.05, BEST, Q2),
        "Nor shown to be worse: near (0.5": (0.001, BEST, candidate("near", 189, 200)),
        "Use q2: the smallest that is not worse": (0.3, Q2),
        "Use tiny: the best, and the smallest.": (0.05, Q8, candidate("tiny", 190, 200)),
        "Size unknown: q8.": (0.05, unknown[0], Q5),
        "Not worse than the best (dense) by 5.0 points or more: q8 and q5. Which is the smallest "
        "is not known. Size unknown: q8 and q5.": (0.05, *unknown),
    }.items():
        text = choice_text(found, choose_smallest(found, "dense", margin))
        assert not lacks(text, says, "this rests on faults alone")


def test_the_smallest_that_is_not_worse_by_the_margin():
    found = [Q8, Q5, Q2]
    choice = choose_smallest(found, "dense", 0.05)
    assert (choice.best, choice.smallest) == ("dense", "q5")
    assert choice.behind["q2"].value == pytest.approx(0.2)
    rows = model_rows(found, choice)
    assert [row["model"] for row in rows] == ["q2", "q5", "q8", "dense"]
    assert (rows[-1]["#good %"].split()[0], rows[-1]["#behind best"]) == ("90.0", "0.0")
    assert (rows[0]["#bits"], rows[0]["#lost"], rows[1]["#lost"]) == ("1.60", 40, 2)
    choice = choose_smallest([BEST, Q2], "dense", 0.05)
    assert (choice.best, choice.smallest, choice.behind["best"].high) == ("best", "best", 0.0)
    # A repeat of the dense model is a row.
    dense, small = Q8.pair
    twice = [replace(Q8, pair=(replace(dense, repeat=(good(181),)), small))]
    again = model_rows(twice, choose_smallest(twice, "dense", 0.05))[-1]
    assert (again["model"], again["#lost"], again["#gained"]) == ("dense, again", 0, 1)
    assert (again["#MB"], again["#behind best"]) == (None, "–")


def test_only_tasks_that_all_models_answered_count():
    """A model whose chat template has no tools is not asked for calls of them."""
    tools = replace(task(["x"] * 50, [1] * 50, properties=({},) * 50), name="tools")
    silent = replace(tools, values=(), answers=(), ended=())
    able, other = (
        replace(one, pair=tuple(replace(s, tasks=(*s.tasks, more)) for s, more in parts))
        for one, parts in (
            (Q5, zip(Q5.pair, (tools, tools), strict=True)),
            (Q2, zip(Q2.pair, (tools, silent), strict=True)),
        )
    )
    shared = choosing.comparable([able, other])
    assert choose_smallest(shared, "dense", 0.05) == choose_smallest([Q5, Q2], "dense", 0.05)
    assert [one.counted.asked for one in shared] == [200, 200]
    none = replace(other, pair=tuple(replace(s, tasks=s.tasks[1:]) for s in other.pair))
    assert choosing.comparable([able, none]) == []


def test_names_are_the_shortest_ends_of_paths_that_differ():
    given = ["/m/dense", "out/a.gguf", "b.gguf"]
    assert choosing.short_names(given) == ["dense", "a.gguf", "b.gguf"]
    same = ["builtin:x", "t1/model.gguf", "t2/model.gguf"]
    assert choosing.short_names(same) == same
    deep = ["a/t/model.gguf", "b/t/model.gguf"]
    assert choosing.short_names([f"/z/{one}" for one in deep]) == deep
    assert choosing.short_names(["out", "out/"]) == ["out", "out/"]


def test_models_and_a_server_are_compared_in_one_command(chats, calmix, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out, page, (dense, small) = tmp_path / "out.json", tmp_path / "out.html", chats
    rows = ({"prompt": f"Say {n}.", "max_tokens": 4} for n in range(5))
    mine = written(tmp_path / "mine.jsonl", *rows)
    with running(Fake(reply())) as address:
        run = ("compare", dense, small, address, "--prompts", mine, "-o", out, "--page", page)
        ended = calmix(*run).ok()
    assert "dense, again" in ended.out
    assert max(map(len, ended.out.splitlines()[:10])) <= 80
    made, html = json.loads(out.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
    assert list(made["models"]) == [small.name, address]
    local, served = made["models"].values()
    assert local["scores"]["distance"]["items"]
    assert (served["size"], served["scores"]["distance"]) == (1000, None)
    assert (html.count("<article"), html.count('class="box"')) == (5, 15)


def test_mistakes_are_known_before_any_work(calmix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, says in (
        ("a.json -o x.json", "--output needs --prompts or --suite"),
        ("builtin:smollm2-135m --suite abilities", "name the dense model, then one or"),
        ("a a --suite abilities", "each once"),
        ("a b --suite offline", "has no generated answers: try abilities"),
        ("a b --suite abilities --measure bits", "are for files"),
        ("a b --suite abilities --page x.html", "leave it out with --suite"),
    ):
        assert says in calmix("compare", *arguments.split()).line
