"""Suites: the builtin ones, selections, and one clear line for every mistake in a file."""

import pytest

from calmix.analysis.cells import TOTAL, WORST
from calmix.errors import InputError
from calmix.evaluation.evaluate import choose
from calmix.evaluation.suites import Suite, builtin_suites, load_suite
from calmix.sources.registry import offline_sources
from calmix.yaml_files import parse_model
from tests.evaluation.helpers import benchmark, benchmarks_read

MBPP = "{archive: codex_mbpp/gold_bpb, form: answer, metric: bits_per_byte, shots: 0}"
GOOD = f"""\
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
    mbpp: {MBPP}
"""


def test_builtin_suites():
    suites = builtin_suites()
    for name in ("offline", "paper", "smoke"):
        assert list(suites[name].dimensions) == ["general", "commonsense", "code", "math"]
    wanted = "mmlu boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa humaneval mbpp"
    assert set(suites["paper"].tasks) == {*wanted.split(), "gsm8k", "math"}
    assert all((task.quick or 0) < (task.limit or 0) for task in suites["offline"].tasks.values())


def test_offline_leaves_the_odd_items_to_the_sources():
    read = benchmarks_read(offline_sources().values())
    parts = {name for name, task in load_suite("offline").tasks.items()
             if task.items == "all" and benchmark(task) in read}  # fmt: skip
    assert parts == {"math500"}  # of which its source leaves out all that is close


def test_selections_of_a_users_own_file_have_hashes_of_their_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    suite = load_suite(path)
    assert (suite.name, suite.version, list(suite.tasks)) == ("mine", 3, ["sciq", "mbpp"])
    assert suite.dimension_of("mbpp") == "code"
    ways = [{}, {"quick": True}, {"limit": 3}, {"dimensions": ["code"]}]
    variants = [choose(suite, **one) for one in ways]
    assert len({variant.hash for variant in variants}) == 4
    assert suite.hash == suite.model_copy(update={"description": "other words"}).hash
    assert suite.hash != suite.model_copy(update={"version": 4}).hash
    for limit, how in (
        (2, {"quick": True}), (10, {"quick": True, "whole": ["general"]}), (10, {"limit": 99}),
        (3, {"limit": 3}), (1, {"quick": True, "limit": 1}),
    ):  # fmt: skip
        assert choose(suite, **how).tasks["sciq"].limit == limit
    assert choose(suite, limit=3).tasks["mbpp"].limit == 3
    abilities = load_suite("abilities")
    mixed = choose("abilities", quick=True, whole=["math"])
    assert mixed.dimensions["math"] == abilities.dimensions["math"]
    assert mixed.dimensions["code"] == choose("abilities", quick=True).dimensions["code"]
    assert list(mixed.dimensions) == list(abilities.dimensions)
    for chosen in ({"tasks": ["mbpp"]}, {"without": ["sciq"]}, {"dimensions": ["code"]}):
        assert list(choose(suite, **chosen).tasks) == ["mbpp"]
    for wrong, says in (
        ({"whole": ["code"]}, "no effect without --quick"),
        ({"quick": True, "whole": ["codes"]}, "no dimension 'codes': did you mean code"),
        ({"quick": True, "whole": ["code"], "dimensions": ["general"]}, "no dimension 'code'"),
        ({"dimensions": ["codes"]}, "no dimension 'codes': did you mean code"),
        ({"without": ["sciqq"]}, "no task 'sciqq': did you mean sciq"),
        ({"dimensions": ["code"], "tasks": ["sciq"]}, "no task of suite mine is left"),
        ({"limit": 0}, "at least 1 item"),
    ):
        with pytest.raises(InputError, match=says):
            choose(suite, **wrong)
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
        ("version: 3", "versoin: 3", 2, "versoin: unknown key: did you mean version"),
        ("      metric: acc_norm\n", "", 6, "dimensions.general.sciq: lacks 'metric'"),
        ("      chance: choices\n", "", 6, "needs 'chance'"),
        ("shots: 5", "shots: 5\n      score: kept", 6, "'score' of such a task is probability or"),
        ("    mbpp: ", "    sciq: ", 1, "task 'sciq' is in 'general' and in 'code'"),
        ("name: mine", "name: a b", 1, "name: String should match"),
        ("  general:", f"  {TOTAL}:", 1, f"'{TOTAL}' has another meaning"),
        ("  general:", f"  {WORST}:", 1, f"'{WORST}' has another meaning"),
        *((MBPP, task, 15, says) for task, says in (
            ("{file: a.jsonl}", "a task with 'file' needs 'kind'"),
            ("{file: a.jsonl, kind: answers, archive: x}", "needs one of 'archive', 'asked' and"),
            ("{file: a.jsonl, kind: answers, metric: acc}", "'metric' of such a task is as_asked"),
            ("{file: a.jsonl, kind: choices, shots: 3}", "'shots' has no effect on choices"),
            ("{asked: sums, metric: as_asked, shots: 2}", "'shots' has no effect"),
            ("{asked: nothing, metric: as_asked}", "unknown asked task 'nothing'"),
        )),
    ],
)  # fmt: skip
def test_each_mistake_gives_one_line_with_line_and_key(old, new, line, says):
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        parse_model(Suite, GOOD.replace(old, new, 1), "mine.yaml")
    told = str(caught.value)
    assert (f"mine.yaml line {line}: " in told, says in told, "\n" in told) == (True, True, False)
