"""The leakage guard."""

import html
import json
import random
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmix.calibration import leakage
from calmix.calibration.build import build
from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.leakage import Guard, ItemIndex, suite_items
from calmix.calibration.request import calibration_set
from calmix.errors import InputError, SourceError
from calmix.sources.mixes import parse_mix
from tests.calibration.conftest import write_rows
from tests.evaluation.helpers import new_suite
from tests.tiny import quick

rows = st.lists(st.sampled_from(["an", "be", "co", "do", "er", "fa", "go"]), max_size=20)


def runs(row, n):
    """The runs of n words, three quarters of them distinct."""
    actual = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
    return {run for run in actual if len(set(run)) >= 0.75 * n}


@given(st.lists(rows, max_size=5), rows, st.integers(2, 8))
def test_leak_search_matches_brute_force(items, document, n):
    index = ItemIndex([("task", str(i), " ".join(row)) for i, row in enumerate(items)], n)
    shares = set()
    for i, row in enumerate(items):
        whole = n if len(row) >= n else len(row)
        if len(row) >= min(n, 5) and runs(row, whole) & runs(document, whole):
            shares.add(str(i))
    actual = index.find(", ".join(document))
    assert (actual is not None) == bool(shares)
    assert actual is None or actual[1] in shares


def wrapped(columns, end="\n"):
    return lambda text: end.join(textwrap.wrap(text, columns))


def numbered(form, first=1):
    def reflowed(text):
        lines = textwrap.wrap(f"begin {text} end", 40)
        return "\n" + "\n".join(form.format(i, line) for i, line in enumerate(lines, first)) + "\n"

    return reflowed


def wide(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


@pytest.mark.parametrize(
    "reflowed",
    [
        str,
        wrapped(40),
        wrapped(72),
        str.upper,
        str.title,
        wide,
        lambda text: text.replace(" ", "\r\n> "),
        numbered("{}: {}"),
        numbered("> {}. {}", 9),
        numbered("{:6}\t{}", 98),
        numbered("Line {}: {}"),
        lambda text: json.dumps(wrapped(40, "\u2028")(text)),
        lambda text: json.dumps(json.dumps({"text": numbered("{}) {}")(text)})),
        lambda text: ascii(text.replace(" ", "\xa0")),
        lambda text: "<br>".join(textwrap.wrap(html.escape(text), 40)),
        lambda text: html.escape(f"<p>{html.escape(text)}</p>").replace(" ", "&nbsp;"),
        lambda text: "<td class='x'>" + text.replace(" ", "</td>\n<td\nclass='x'>"),
        lambda text: text.replace(" ", "  "),
        lambda text: text.replace(" ", "\N{NO-BREAK SPACE}"),
        lambda text: text.replace("e", "e\N{SOFT HYPHEN}"),
        lambda text: text.replace(",", " -").replace('"', "\N{LEFT DOUBLE QUOTATION MARK}"),
    ],
)
def test_reflowed_text_is_found(reflowed):
    """Line breaks and their numbers, spaces, capitals, punctuation, escapes, tags, full width and
    marks that nobody sees."""
    rng, parts = random.Random(0), ["ka", "lo", "mi", "ne", "ru", "ta", "vo", "zi"]
    words = ["".join(rng.choices(parts, k=3)) for _ in range(600)]
    long = [
        ", ".join(words[i : i + 5]) + f' "{" ".join(words[i + 5 : i + 20])}"'
        for i in range(0, 400, 20)
    ]
    short = [" ".join(words[i : i + 6]) + "?" for i in range(400, 600, 20)]
    index = ItemIndex([("task", str(i), text) for i, text in enumerate(long + short)])
    for number, text in enumerate(long + short):
        assert index.find(f"Before it. {reflowed(text)} And after.") == ("task", str(number))
    assert index.find(" ".join(words[i + 1] for i in range(0, 599, 3))) is None


def test_runs_of_single_characters_are_not_items():
    digits = "0 1 2 3 4 5 6 7 8 9 a b c d e f"
    index = ItemIndex([("a", "0", f"Which are primes: {digits}?"), ("a", "1", digits[:15])])
    table = "\n".join(f'    {i}: "{digit}",' for i, digit in enumerate(digits.split()))
    assert index.find(digits) is None
    assert index.find(table) is None


def test_time_is_linear_in_the_text():
    for part in ("\\", "<a ", "&amp;", "\n ", "\\u00e", "1\n"):
        assert ItemIndex([("a", "0", ITEM)]).find(part * 100_000) is None


def test_scripts_without_spaces_and_short_items():
    chinese = "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343\u842c\u5104"
    index = ItemIndex([("a", "0", chinese), ("a", "1", "2 + 2\n4"), ("a", "2", "one to five: 1 2")])
    assert index.find(f"\u5929{chinese[:13]}\u5929") == ("a", "0")
    assert index.find(chinese[:12]) is None
    assert index.find("2 + 2 4") is None  # fewer than five words
    assert index.find("from one to five: 1 2 and so on") == ("a", "2")
    assert index.find("from one to five: 1 3 and so on") is None


ITEM = "Janet sells sixteen eggs a day; how many dollars does she make weekly?"
ITEMS = [("gsm8k", "7", ITEM), ("sciq", "1", "too short")]


@pytest.fixture
def guard():
    return lambda n=13: Guard("toy", ItemIndex(ITEMS, n))


def planted(tmp_path, documents, leaks, text=ITEM):
    path = tmp_path / "planted.jsonl"
    rows = [
        f"document {i} " + "".join(chr(97 + (i * j) % 26) for j in range(60))
        for i in range(documents)
    ]
    for i in range(leaks):
        rows[i * (documents // max(1, leaks))] = f"By the way: {text} And so on for {i}."
    write_rows(path, rows)
    return str(path)


@pytest.mark.parametrize("packing", ["concat", "window"])
def test_planted_item_of_named_suite_is_dropped(tmp_path, tiny, monkeypatch, packing):
    requests, path = [], planted(tmp_path, 100, 2)
    monkeypatch.setattr(leakage, "suite_items", lambda suite: requests.append(suite) or ITEMS)
    monkeypatch.setattr(leakage, "load_suite", lambda name: None)
    how = {"rows": 95, "length": 50, "packing": packing}
    drawn_set = calibration_set(path, tiny, **how)
    assert "Janet" not in "".join(tiny.tokenizer.batch_decode(drawn_set.ids.tolist()))
    report = drawn_set.manifest["leakage"]
    assert (report["suite"], report["words"], report["items"]) == ("offline", 13, 2)
    assert [(d["task"], d["item"]) for d in report["dropped"][path]] == [("gsm8k", "7")] * 2
    assert calibration_set(path, tiny, leakage="off", **how).manifest["leakage"] == "off"
    assert requests == ["offline"]
    assert calibration_set(path, tiny, leakage="mine", **how).manifest["leakage"]["suite"] == "mine"
    assert requests == ["offline", "mine"]


def test_leaked_document_is_replaced_in_a_small_set(tmp_path, tiny, guard):
    """One leak in the first few documents of a source with 2.5 % refuses nothing."""
    path = planted(tmp_path, 200, 5)
    for seed in range(200):
        watch = guard()
        drawn_set = build(parse_mix(path), tiny, rows=3, length=50, seed=seed, guard=watch)
        if drawn_set.manifest["leakage"]["dropped"].get(path):
            assert drawn_set.manifest["leakage"]["checked"][path] < 10
            break
    else:
        pytest.fail("no draw met the planted document")


def test_short_overlap_passes_and_leaking_source_is_refused(tmp_path, tiny, guard):
    path = planted(tmp_path, 20, 5, text=ITEM.rpartition(" ")[0])
    drawn_set = build(parse_mix(path), tiny, rows=18, length=50, guard=guard(13))
    assert drawn_set.manifest["leakage"]["dropped"] == {}
    with pytest.raises(SourceError, match=r"share 11 words.*suite toy, .*task gsm8k"):
        build(parse_mix(path), tiny, rows=18, length=50, guard=guard(11))


@pytest.mark.real
@pytest.mark.parametrize(
    "case",
    quick(
        [("smoke,mine.yaml", "winogrande")],
        [("offline", task) for task in ("gsm8k", "humaneval", "arc_easy", "pattern")],
    ),
)
def test_planted_item_of_real_suites_is_dropped(case, calmix, tiny_folder, tmp_path, monkeypatch):
    suite, task = case
    monkeypatch.chdir(new_suite(tmp_path))
    items = suite_items(suite)
    if "," in suite:
        assert [name for name, *_ in items[-2:]] == ["my_numbers", "my_programs"]
        with pytest.raises(InputError, match="unknown suite 'abilites': did you mean abilities"):
            suite_items("smoke,abilites")
    item = next(one for one in items if one[0] == task and len(one[2]) > 60)
    rng, words = random.Random(0), ("river", "stone", "under", "bright", "seven", "north", "quiet")
    rows = [" ".join(rng.choices(words, k=60)) for _ in range(120)]
    how = ("--rows", 110, "--length", 50, "--packing", "window", "--leakage", suite)
    for leaks in (3, 10):
        for number in range(5, 5 + 12 * leaks, 12):
            rows[number] = f"{rows[number]}\n\n{item[2]}\n\n{rows[number]}"
        own, out = f"own-{leaks}.jsonl", tmp_path / f"out-{leaks}"
        write_rows(tmp_path / own, rows)
        ended = calmix("calibrate", own, "--model", tiny_folder, *how, "-o", out)
        if leaks == 10:
            assert f"source {own} leaks" in ended.line
            assert f"with task {task}" in ended.line
            assert not out.exists()
            return
        dropped = CalibrationSet.open(out).manifest["leakage"]["dropped"][own]
        assert {entry["task"] for entry in dropped} == {task}
        assert 1 <= len(dropped) <= 3
