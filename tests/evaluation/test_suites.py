"""Suites: the builtin ones, selections, a user's own rows, and one clear line for every mistake."""

import json

import pytest

from calmix.evaluation import checks
from calmix.evaluation.evaluate import evaluate, is_right
from calmix.evaluation.scores import write_scores
from calmix.evaluation.suites import BUILTIN, Suite, choose, load_suite, read_rows, template
from calmix.evaluation.tasks import load_items, suite_items
from calmix.sources.registry import offline_sources
from calmix.study.cells import TOTAL, WORST
from calmix.yaml_files import parse_model
from tests.evaluation.helpers import benchmark, benchmarks_read, lacks, new_suite, refuses
from tests.tiny import save_tiny_model, tiny_tokenizer

MBPP = "{archive: codex_mbpp/gold_bpb, form: answer, metric: bits_per_byte, shots: 0}"
SCIQ = "{archive: sciq/rc, form: question, metric: acc_norm, shots: 5, limit: 10, quick: 2, %s}"
GOOD = f"""\
name: mine
version: 3
description: my own
dimensions:
  general:
    sciq: {SCIQ % "chance: choices"}
  code:
    mbpp: {MBPP}
"""
CITY = {"question": "What is the capital of France? Answer with one word.", "answer": "Paris"}


def test_builtin_suites():
    suites = {name: load_suite(name) for name in BUILTIN}
    for name in ("offline", "paper", "smoke"):
        assert list(suites[name].dimensions) == ["general", "commonsense", "code", "math"]
    wanted = "mmlu boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa humaneval mbpp"
    assert set(suites["paper"].tasks) == {*wanted.split(), "gsm8k", "math"}
    offline, read = suites["offline"].tasks, benchmarks_read(offline_sources().values())
    assert all((task.quick or 0) < (task.limit or 0) for task in offline.values())
    # It leaves the odd items to the sources; the source of math500 leaves out all similar items.
    parts = [name for name, task in offline.items() if task.items == "all"]
    assert [name for name in parts if benchmark(offline[name]) in read] == ["math500"]
    refuses("unknown suite 'offlin': did you mean offline", load_suite, "offlin")


def parsed(text):
    return parse_model(Suite, text, "mine.yaml")


def test_selections_and_their_hashes():
    suite = parsed(GOOD)
    assert suite.dimension_of("mbpp") == "code"
    ways = [{}, {"quick": True}, {"limit": 3}, {"dimensions": ["code"]}]
    assert len({choose(suite, **one).hash for one in ways}) == 4
    assert suite.hash == suite.model_copy(update={"description": "other words"}).hash
    assert suite.hash != suite.model_copy(update={"version": 4}).hash
    for limit, how in (
        (2, {"quick": True}),
        (10, {"quick": True, "whole": ["general"]}),
        (10, {"limit": 99}),
        (3, {"limit": 3}),
        (1, {"quick": True, "limit": 1}),
    ):
        assert choose(suite, **how).tasks["sciq"].limit == limit
    assert choose(suite, limit=3).tasks["mbpp"].limit == 3
    for chosen in ({"tasks": ["mbpp"]}, {"without": ["sciq"]}, {"dimensions": ["code"]}):
        assert list(choose(suite, **chosen).tasks) == ["mbpp"]
    for how, says in (
        ({"whole": ["code"]}, "no effect without --quick"),
        ({"quick": True, "whole": ["codes"]}, "no dimension 'codes': did you mean code"),
        ({"quick": True, "whole": ["code"], "dimensions": ["general"]}, "no dimension 'code'"),
        ({"dimensions": ["codes"]}, "no dimension 'codes': did you mean code"),
        ({"without": ["sciqq"]}, "no task 'sciqq': did you mean sciq"),
        ({"dimensions": ["code"], "tasks": ["sciq"]}, "no task of suite mine is left"),
        ({"limit": 0}, "at least 1 item"),
    ):
        refuses(says, choose, suite, **how)


def test_suite_errors_name_line_and_key():
    for old, new, line, says in (
        ("limit: 10", "limt: 10", 6, "dimensions.general.sciq.limt: unknown key: did you mean"),
        ("code:\n", "code: {}\n  math:\n", 7, "dimensions.code: Dictionary"),
        ("version: 3", "versoin: 3", 2, "versoin: unknown key: did you mean version"),
        ("metric: acc_norm, ", "", 6, "dimensions.general.sciq: lacks 'metric'"),
        (", chance: choices", "", 6, "needs 'chance'"),
        ("shots: 5", "shots: 5, score: kept", 6, "'score' of such a task is smoothed or"),
        ("    mbpp: ", "    sciq: ", 1, "task 'sciq' is in 'general' and in 'code'"),
        ("  general:", f"  {TOTAL}:", 1, f"'{TOTAL}' is a reserved name"),
        ("  general:", f"  {WORST}:", 1, f"'{WORST}' is a reserved name"),
        (MBPP, "{file: a.jsonl}", 8, "a task with 'file' needs 'kind'"),
        (MBPP, "{file: a, kind: answers, archive: x}", 8, "one of 'archive', 'asked' and 'file'"),
        (MBPP, "{file: a, kind: answers, metric: acc}", 8, "'metric' of such a task is as_asked"),
        (MBPP, "{file: a, kind: choices, shots: 3}", 8, "'shots' has no effect on choices"),
        (MBPP, "{file: a, kind: programs, shots: 1}", 8, "'shots' has no effect on such a task"),
        (MBPP, "{asked: sums, metric: as_asked, shots: 2}", 8, "'shots' has no effect"),
        (MBPP, "{asked: nothing, metric: as_asked}", 8, "unknown asked task 'nothing'"),
    ):
        assert old in GOOD
        refuses(rf"^mine\.yaml line {line}: .*{says}.*$", parsed, GOOD.replace(old, new, 1))


@pytest.fixture
def folder(tmp_path):
    """A new suite, with another question."""
    with (new_suite(tmp_path) / "mine-answers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(CITY) + "\n\n")
    return tmp_path


def changed(folder, old, new):
    path = folder / "mine.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return load_suite(path)


def test_template_suite_is_valid(folder):
    suite = load_suite(folder / "mine.yaml")
    (item,) = load_items(suite.tasks["my_choices"])
    assert ([answer for _, answer in item.requests], item.gold) == ([" a stone", " an apple"], 1)
    for name, text, other in (
        ("my_answers", "Downwards", "left"),
        ("my_numbers", "That is 42 pens.", "75"),
        ("my_programs", "    return 2 * x", "def double(x):\n    return 3 * x"),
    ):
        first, *_ = load_items(suite.tasks[name])
        assert [is_right(first, one) for one in (text, other)] == [True, False], name
    texts = [text for _, _, text in suite_items(suite)]  # the texts of the leakage check
    program = "returns x times two.\ndouble(4) == 8\ndouble(0) == 0"
    assert not lacks(texts, f"{CITY['question']}\nParis", program)


def test_hashes_follow_rows_and_checks(folder, monkeypatch):
    before = load_suite(folder / "mine.yaml").hash
    with (folder / "mine-answers.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert load_suite(folder / "mine.yaml").hash != before
    suites = [load_suite(name) for name in ("abilities", "offline")]
    older = [suite.hash for suite in suites]
    monkeypatch.setattr(checks, "VERSION", checks.VERSION + 1)
    assert [suite.hash == one for suite, one in zip(suites, older, strict=True)] == [False, True]


def test_shots_are_the_last_rows(folder):
    suite = changed(folder, "kind: answers", "kind: answers, shots: 1")
    (only,) = load_items(suite.tasks["my_answers"])
    assert only.plain.startswith("Question: What is the capital of France?")
    assert " Paris\n\nQuestion: What is the opposite of up?" in only.plain
    says = "has 2 rows, 2 of them worked examples: add rows"
    refuses(says, changed, folder, "shots: 1", "shots: 2")


def test_renamed_file_is_scored_again(folder, tiny_folder, monkeypatch):
    """Items are named after their file: kept scores would be of other items."""
    monkeypatch.setenv("CALMIX_CACHE", str(folder / "cache"))
    how = {"tasks": ["my_choices"], "cache": True}
    evaluate(tiny_folder, folder / "mine.yaml", **how)
    (folder / "mine-choices.jsonl").rename(folder / "ours.jsonl")
    (task,) = evaluate(tiny_folder, changed(folder, "mine-choices", "ours"), **how).tasks
    assert task.items == ("ours/0",)


def test_all_kinds_are_scored(folder, tiny_folder, calmix, monkeypatch):
    scores = evaluate(tiny_folder, folder / "mine.yaml", allow_code_execution=True)
    sizes = [(len(one.items), len(one.answers), one.consistent) for one in scores.tasks]
    assert sizes == [(1, 0, True), (2, 2, True), (1, 1, True), (1, 1, True)]
    assert (scores.form, scores.tasks[1].primary) == ("worked examples", "kept")
    monkeypatch.setenv("COLUMNS", "300")  # so that paths are not wrapped
    rows = folder / "mine-numbers.jsonl"
    how = ("--suite", folder / "mine.yaml", "-o", rows, "--overwrite", "--allow-code-execution")
    assert "is the input" in calmix("evaluate", tiny_folder, *how).line
    assert "mine-programs.jsonl" in calmix("evaluate", "suite", folder / "mine.yaml").ok().out


def test_missing_sandbox_is_reported_first(folder, tiny_folder, monkeypatch):
    monkeypatch.setattr("calmix.evaluation.evaluate.check_sandbox", lambda: 1 / 0)
    monkeypatch.setattr("calmix.evaluation.evaluate.Scorer", None)
    how = {"allow_code_execution": True, "error": ZeroDivisionError}
    refuses(None, evaluate, tiny_folder, folder / "mine.yaml", **how)


def test_new_suite_overwrites_nothing(calmix, tmp_path):
    run = ("evaluate", "suite", "--new")
    for name in ("ours", "ours.v2"):
        calmix(*run, tmp_path / name).ok()
        assert load_suite(tmp_path / f"{name}.yaml").name == name
    assert "exists: choose another file" in calmix(*run, tmp_path / "ours.yaml").line
    assert "cannot name a suite" in calmix(*run, tmp_path / "a b").line


def test_invalid_rows_name_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    for kind, row, message in (
        ("choices", "{", "not valid JSON"),
        ("choices", "[" * 9999, "not valid JSON"),
        ("choices", "[1]", "not a JSON object"),
        ("choices", {"choices": ["a"], "answer": 0}, "two or more different"),
        ("choices", {"choices": ["a", "b", "b "], "answer": 0}, "different"),
        ("choices", {"choices": ["a", "b"], "answer": 2}, "the index of"),
        ("answers", {"answer": []}, "a text, or a list"),
        ("answers", {"question": " ", "answer": "a"}, "'question' must be a text"),
        ("numbers", '{"question": "x", "answer": NaN}', "must be a number"),
        ("numbers", {"answer": 10**400}, r"must be a number below 1e\+15"),
        ("programs", {"head": "f", "tests": ["f(1)"]}, "e.g. double"),
        ("programs", {"head": "f(x)", "tests": "a"}, "list of expressions"),
        ("programs", {"head": "f(x)", "tests": ["f(1), f(2)"]}, "expressions"),
        ("programs", {"head": "f(x)", "tests": ["-" * 3000 + "1"]}, "expressions"),
        ("programs", {"head": "f(x)", "tests": ["-" * 9999 + "1"]}, "expressions"),
    ):
        text = row if isinstance(row, str) else json.dumps({"question": "x"} | row)
        path.write_text(template("x")[f"x-{kind}.jsonl"] + text + "\n", encoding="utf-8")
        refuses(f"line 2: .*{message}", read_rows, str(path), kind)


def test_rows_with_any_text_and_long_numbers(folder):
    """A line separator within a text does not end the row."""
    path, long = folder / "mine-numbers.jsonl", 123456789012345
    row = {"question": "one\u2028line\x85?", "answer": long}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (item,) = load_items(load_suite(folder / "mine.yaml").tasks["my_numbers"])
    assert [is_right(item, f"It is {one}.") for one in (long, long + 1)] == [True, False]
    path.write_bytes(b'{"question": "caf\xe9", "answer": 1}\n')
    refuses("is not UTF-8 text", read_rows, str(path), "numbers")


def test_other_prompt_forms_are_refused_first(folder, calmix, tiny_folder, tmp_path, monkeypatch):
    other = save_tiny_model(tmp_path / "other")
    tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(other)
    run = ("evaluate", other, "--suite", folder / "mine.yaml", "--task")

    def write(opened, prompts, rearranged, progress):
        assert not prompts
        return []

    monkeypatch.setattr("calmix.evaluation.evaluate.answers", write)
    refused = calmix(*run, "my_answers", "--against", tiny_folder)
    assert "in its chat template, the other with worked" in refused.line
    dense = evaluate(tiny_folder, folder / "mine.yaml", tasks=["my_choices"])
    dense.save(path := tmp_path / "dense.json")  # choices are not asked
    calmix(*run, "my_choices", "--against", path).ok()


def test_progress_spans_both_passes_of_a_repeat(folder, tiny_folder):
    steps, how = [], {"tasks": ["my_answers"], "repeat": True}
    evaluate(tiny_folder, folder / "mine.yaml", progress=lambda *of: steps.append(of), **how)
    (total,) = {total for _, total in steps}
    assert steps == sorted(steps)
    assert (steps[0][0] < total / 2, steps[-1][0]) == (True, total)


def test_dense_repeat_is_cached(folder, calmix, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    seen, out = [], tmp_path / "out.json"

    def fake(opened, prompts, rearranged, progress):
        seen.append("again" if rearranged else "once")
        return [("up" if rearranged else "down", True) for _ in prompts]

    monkeypatch.setattr("calmix.evaluation.evaluate.answers", fake)
    run = ("evaluate", tiny_folder, "--suite", folder / "mine.yaml", "--task", "my_answers")
    against = ("--against", tiny_folder)
    for more, wanted, repeated in (
        (against, ["once", "again", "once"], True),
        (against, ["once"], True),  # the dense model's are in the cache
        ((*against, "--quick"), ["once"], False),
        ((*against, "--no-repeat"), ["once"], False),
        (("--repeat",), ["once", "again"], True),
        ((*against, "--quick", "--repeat"), ["once"], True),
    ):
        seen.clear()
        ended = calmix(*run, "--task", "my_choices", "--overwrite", "-o", out, *more).ok()
        value = json.loads(out.read_text(encoding="utf-8"))
        stored = value.get("dense", value["scores"])["repeat"]
        assert [task["name"] for task in stored] == ["my_answers"] * repeated
        told = "The dense model against itself" in ended.out
        assert (seen, told) == (wanted, repeated and "--against" in more)
    found = value["behaviour"]["repeat"]["answers"]
    assert (found["lost"], found["gained"], found["identical"], found["asked"]) == (1, 0, 0, 2)
    dense = tmp_path / "dense.json"
    write_scores(dense, value["dense"])
    for more, said in (
        (("--task", "my_choices", "--repeat"), "a suite without generated answers"),
        (("--task", "my_answers", "--repeat", "--against", dense), "scores in a file"),
        (("--task", "my_answers", "--repeat", "--no-repeat"), "--no-repeat: leave it out"),
        (("--task", "my_choices", "--measure", "right"), "needs generated answers"),
    ):
        assert said in calmix(*run[:4], *more).line
