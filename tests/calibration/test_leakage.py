"""The leakage guard."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmix.calibration import CalibrationSet, build, leakage, parse_mix, resolve
from calmix.calibration.leakage import Guard, ItemIndex, suite_items
from calmix.calibration.tokenizer import tokenizer_function
from calmix.errors import InputError, SourceError
from calmix.evaluation.suites import template
from tests.calibration.conftest import write_rows
from tests.evaluation.helpers import new_suite
from tests.tiny import quick

ids = st.lists(st.integers(0, 6), max_size=20)


@given(st.lists(ids, max_size=5), ids, st.integers(2, 6))
def test_finding_equals_brute_force(items, document, n):
    texts = {str(i): row for i, row in enumerate(items)}
    index = ItemIndex(
        [("task", name, name) for name in texts], lambda names: [texts[name] for name in names], n
    )
    runs = [tuple(document[i : i + n]) for i in range(len(document) - n + 1)]
    runs = [run for run in runs if len(set(run)) >= 0.75 * n]
    shares = [
        name
        for name, row in texts.items()
        if any(tuple(row[i : i + n]) in runs for i in range(len(row) - n + 1))
    ]
    found = index.find(document)
    assert (found is not None) == bool(shares)
    assert found is None or found[1] in shares


ITEM = "Janet sells sixteen eggs a day; how many dollars does she make?"
ITEMS = [("gsm8k", "7", ITEM), ("sciq", "1", "too short")]


@pytest.fixture
def guard(tiny):
    return lambda n=13: Guard("toy", ItemIndex(ITEMS, tokenizer_function(tiny.tokenizer), n))


def planted(tmp_path, documents, leaks, text=ITEM):
    path = tmp_path / "planted.jsonl"
    rows = [f"document {i} " + "".join(chr(97 + (i * j) % 26) for j in range(60))
            for i in range(documents)]  # fmt: skip
    for i in range(leaks):
        rows[i * (documents // max(1, leaks))] = f"By the way: {text} And so on for {i}."
    write_rows(path, rows)
    return str(path)


@pytest.mark.parametrize("packing", ["concat", "window"])
def test_a_planted_item_of_a_named_suite_is_dropped_and_counted(
    tmp_path, tiny, monkeypatch, packing
):
    asked, path = [], planted(tmp_path, 100, 2)
    monkeypatch.setattr(leakage, "suite_items", lambda suite: asked.append(suite) or ITEMS)
    monkeypatch.setattr(leakage, "load_suite", lambda name: None)
    how = {"rows": 95, "length": 50, "packing": packing}
    made = resolve(path, tiny, **how)
    assert "Janet" not in "".join(tiny.tokenizer.batch_decode(made.ids.tolist()))
    report = made.manifest["leakage"]
    assert (report["suite"], report["tokens"], report["items"]) == ("offline", 13, 2)
    assert [(d["task"], d["item"]) for d in report["dropped"][path]] == [("gsm8k", "7")] * 2
    assert resolve(path, tiny, leakage="off", **how).manifest["leakage"] == "off"
    assert asked == ["offline"]
    assert resolve(path, tiny, leakage="mine", **how).manifest["leakage"]["suite"] == "mine"
    assert asked == ["offline", "mine"]


def test_a_small_draw_with_one_leak_looks_further(tmp_path, tiny, guard):
    """One leak in the first few documents of a source with 2.5 % refuses nothing."""
    path = planted(tmp_path, 200, 5)
    for seed in range(200):
        watch = guard()
        made = build(parse_mix(path), tiny, rows=3, length=50, seed=seed, guard=watch)
        if made.manifest["leakage"]["dropped"].get(path):
            assert made.manifest["leakage"]["checked"][path] < 10
            break
    else:
        pytest.fail("no draw met the planted document")


def test_a_shorter_run_is_no_leak_and_a_source_that_leaks_is_refused(tmp_path, tiny, guard):
    path = planted(tmp_path, 20, 5, text="<many dollar>")
    made = build(parse_mix(path), tiny, rows=18, length=50, guard=guard(13))
    assert made.manifest["leakage"]["dropped"] == {}
    with pytest.raises(SourceError, match=r"share 11 tokens.*suite toy, .*task gsm8k"):
        build(parse_mix(path), tiny, rows=18, length=50, guard=guard(11))


@pytest.mark.real
@pytest.mark.parametrize(
    "case",
    quick([("gsm8k", 3)], [("gsm8k", 10), ("humaneval", 10), ("arc_easy", 3), ("pattern", 3)]),
)
def test_a_planted_item_of_the_offline_suite_is_caught(case, calmix, tmp_path):
    task, leaks = case
    item = next(i for i in suite_items("offline") if i[0] == task and len(i[2]) > 60)
    rng, words = random.Random(0), ("river", "stone", "under", "bright", "seven", "north", "quiet")
    rows = [" ".join(rng.choices(words, k=60)) for _ in range(120)]
    for number in range(5, 5 + 12 * leaks, 12):
        rows[number] = f"{rows[number]}\n\n{item[2]}\n\n{rows[number]}"
    own, out = tmp_path / "own.jsonl", tmp_path / "out"
    write_rows(own, rows)
    ended = calmix("calibrate", own, "--model", "builtin:smollm2-135m", "--rows", 110,
                   "--length", 50, "-o", out, "--packing", "window")  # fmt: skip
    if leaks == 10:
        assert f"source {own} leaks" in ended.line
        assert f"with task {task}" in ended.line
        assert not out.exists()
        return
    dropped = CalibrationSet.open(out).manifest["leakage"]["dropped"][str(own)]
    assert {entry["task"] for entry in dropped} == {task}
    assert 1 <= len(dropped) <= 3


@pytest.mark.real
def test_a_guard_may_be_against_several_suites(tmp_path):
    both = suite_items(f"smoke,{new_suite(tmp_path) / 'mine.yaml'}")
    assert [task for task, *_ in both[-2:]] == ["my_numbers", "my_programs"]
    assert both[0][0] not in template("mine")["mine.yaml"]
    with pytest.raises(InputError, match="unknown suite 'abilites': did you mean abilities"):
        suite_items("smoke,abilites")
