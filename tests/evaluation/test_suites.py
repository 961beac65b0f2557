"""Suites: the builtin ones, selections, and one clear line for every mistake in a file."""

import pytest

from calmix.analysis.cells import TOTAL, WORST
from calmix.errors import InputError
from calmix.evaluation.suites import builtin_suites, load_suite, parse_suite
from calmix.sources.registry import offline_sources
from tests.evaluation.helpers import benchmark, benchmarks_read

GOOD = """\
name: mine
version: 3
description: my own
dimensions:
  general:
    sciq:
      archive: sciq/rc
      form: question
      metric: acc_norm
      shots: 5
      limit: 10
      quick: 2
      chance: choices
  code:
    mbpp: {archive: codex_mbpp/gold_bpb, form: answer, metric: bits_per_byte, shots: 0}
"""


def test_builtin_suites():
    suites = builtin_suites()
    for name in ("offline", "paper", "smoke"):
        assert list(suites[name].dimensions) == ["general", "commonsense", "code", "math"]
    wanted = "mmlu boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa humaneval mbpp"
    assert set(suites["paper"].tasks) == {*wanted.split(), "gsm8k", "math"}
    assert all((task.quick or 0) < (task.limit or 0) for task in suites["offline"].tasks.values())


def test_offline_leaves_the_odd_items_to_the_sources():
    whole = {name for name, task in load_suite("offline").tasks.items() if task.items == "all"}
    assert whole == {
        "mmlu", "common_knowledge", "passages", "arc_easy", "arc_challenge", "csqa", "logic",
        "coding", "humaneval", "pattern", "gsm8k", "math500",
    }  # fmt: skip
    read = benchmarks_read(offline_sources().values())
    parts = {name for name in whole if benchmark(load_suite("offline").tasks[name]) in read}
    assert parts == {"math500"}  # of which its source leaves out all that is close


def test_selections_of_a_users_own_file_have_hashes_of_their_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    suite = load_suite(path)
    assert (suite.name, suite.version, list(suite.tasks)) == ("mine", 3, ["sciq", "mbpp"])
    assert suite.dimension_of("mbpp") == "code"
    variants = [suite, suite.quick(), suite.limited(3), suite.only(dimensions=["code"])]
    assert len({variant.hash for variant in variants}) == 4
    assert suite.hash == parse_suite(GOOD.replace("my own", "other words"), "mine").hash
    assert suite.hash != parse_suite(GOOD.replace("version: 3", "version: 4"), "mine").hash
    assert suite.quick().tasks["sciq"].limit == 2
    assert suite.limited(3).tasks["mbpp"].limit == 3
    assert suite.limited(99).tasks["sciq"].limit == 10
    assert list(suite.only(tasks=["mbpp"]).tasks) == ["mbpp"]
    path.write_bytes(b"\xff\xfe\x00")
    for wrong, says in (
        (path, "not UTF-8"), (tmp_path, "Is a directory"), (tmp_path / "none.yaml", "is no file"),
        ("offlin", "unknown suite 'offlin': did you mean offline"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            load_suite(wrong)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("limit: 10", "limt: 10", 11, "dimensions.general.sciq.limt: unknown key: did you mean"),
        ("code:\n    mbpp: ", "code: {}\n  math:\n    mbpp: ", 14, "dimensions.code: Dictionary"),
        ("metric: acc_norm", "metric: f1", 9, "dimensions.general.sciq.metric: Input should be"),
        ("version: 3", "versoin: 3", 2, "versoin: unknown key: did you mean version"),
        ("      metric: acc_norm\n", "", 6, "dimensions.general.sciq: lacks 'metric'"),
        ("      chance: choices\n", "", 6, "needs 'chance'"),
        ("      shots: 5\n", "", 6, "needs 'shots'"),
        ("shots: 5", "shots: 5\n      score: kept", 6, "'score' of such a task is probability or"),
        ("    mbpp: ", "    sciq: ", 1, "task 'sciq' is in 'general' and in 'code'"),
        ("shots: 5", "shots: 5\n      shots: 4", 11, "'shots' is given twice"),
        ("name: mine", "name: a b", 1, "name: String should match"),
        ("  general:", f"  {TOTAL}:", 1, f"'{TOTAL}' has another meaning"),
        ("  general:", f"  {WORST}:", 1, f"'{WORST}' has another meaning"),
    ],
)  # fmt: skip
def test_each_mistake_gives_one_line_with_line_and_key(old, new, line, says):
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        parse_suite(GOOD.replace(old, new, 1), "mine.yaml")
    told = str(caught.value)
    assert (f"mine.yaml line {line}: " in told, says in told, "\n" in told) == (True, True, False)


def test_unknown_names_come_with_the_nearest():
    suite = load_suite("offline")
    for selection, says in (
        ({"dimensions": ["maths"]}, "no dimension 'maths': did you mean math"),
        ({"tasks": ["gsm"]}, "no task 'gsm': did you mean gsm8k"),
        ({"dimensions": ["code"], "tasks": ["gsm8k"]}, "no task of suite offline is left"),
        ({"dimensions": ["code"], "without": ["mmlu", "nosuch"]}, "has no task 'nosuch'"),
    ):
        with pytest.raises(InputError, match=says):
            suite.only(**selection)
    with pytest.raises(InputError, match="at least 1 item"):
        suite.limited(0)
    assert suite.only(dimensions=["math"], without=["gsm8k"]).tasks.keys() == (
        suite.only(dimensions=["math"]).tasks.keys() - {"gsm8k"}
    )
