"""Tasks of the user's own rows: read, refused, hashed, scored, and judged."""

import json

import pytest

from calmix.errors import InputError
from calmix.evaluation import abilities
from calmix.evaluation.abilities import task_of, verdict
from calmix.evaluation.evaluate import evaluate, suite_items
from calmix.evaluation.greedy import Answer
from calmix.evaluation.own import EXAMPLES, read_rows, template
from calmix.evaluation.suites import load_suite
from calmix.evaluation.tasks import load_items

CITY = {"question": "What is the capital of France? Answer with one word.", "answer": "Paris"}


@pytest.fixture
def folder(tmp_path):
    """A new suite, with another question."""
    for name, text in template("mine").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with (tmp_path / "mine-answers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(CITY) + "\n\n")
    return tmp_path


def changed(folder, old, new):
    path = folder / "mine.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return load_suite(path)


def test_the_template_is_a_suite_whose_examples_are_right(folder):
    suite = load_suite(folder / "mine.yaml")
    assert list(suite.dimensions) == ["support", "code"]
    metrics = ["acc_norm", "as_asked", "as_asked", "pass@1"]
    assert [one.metric for one in suite.tasks.values()] == metrics
    (item,) = load_items(suite.tasks["my_choices"])
    assert item.choices == (" a stone", " an apple")
    assert item.right[1] == " an apple"
    for name, text, other in (
        ("my_answers", "Downwards", "left"), ("my_numbers", "That is 42 pens.", "75"),
        ("my_programs", "```python\ndef double(x):\n    return 2 * x\n```", "    return x"),
        ("my_programs", "    return 2 * x", "def double(x):\n    return 3 * x"),
    ):  # fmt: skip
        first, *_ = task_of(suite.tasks[name])
        assert verdict(first, Answer(text, True)), (name, text)
        assert not verdict(first, Answer(other, True)), (name, other)
    texts = [text for _, _, text in suite_items(suite)]  # what leakage is looked for in
    assert f"{CITY['question']}\nParis" in texts
    assert "returns x times two.\ndouble(4) == 8\ndouble(0) == 0" in texts


def test_the_last_rows_are_worked_examples_if_asked_for_and_the_hash_is_of_all(folder):
    before = load_suite(folder / "mine.yaml").hash
    with (folder / "mine-answers.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert load_suite(folder / "mine.yaml").hash != before
    suite = changed(folder, "kind: answers", "kind: answers, shots: 1")
    (only,) = task_of(suite.tasks["my_answers"])
    assert only.plain.startswith("Question: What is the capital of France?")
    assert " Paris\n\nQuestion: What is the opposite of up?" in only.plain
    with pytest.raises(InputError, match="has 2 rows, 2 of them worked examples: add rows"):
        changed(folder, "shots: 1", "shots: 2")


def test_a_model_is_scored_on_all_kinds(folder, tiny_folder, calmix, monkeypatch):
    scores = evaluate(tiny_folder, folder / "mine.yaml", allow_code_execution=True)
    assert [len(one.items) for one in scores.tasks] == [1, 2, 1, 1]
    assert scores.form == "worked examples"
    assert all(one.consistent for one in scores.tasks)
    assert [len(one.answers) for one in scores.tasks] == [0, 2, 1, 1]
    assert scores.tasks[1].primary == "kept"
    monkeypatch.setenv("COLUMNS", "300")  # a path as long as it is
    rows = folder / "mine-numbers.jsonl"
    how = ("--suite", folder / "mine.yaml", "-o", rows, "--overwrite", "--allow-code-execution")
    assert "is the input" in calmix("evaluate", tiny_folder, *how).line
    assert rows.read_text(encoding="utf-8").count("answer")
    shown = calmix("evaluate", "suite", folder / "mine.yaml").ok()
    assert "mine-programs.jsonl" in shown.out.replace("\n", "")


def test_a_new_suite_is_written_and_overwrites_nothing(calmix, tmp_path):
    for name in ("ours", "ours.v2"):
        calmix("evaluate", "suite", tmp_path / name, "--new").ok()
        assert load_suite(tmp_path / f"{name}.yaml").name == name
    assert "exists" in calmix("evaluate", "suite", tmp_path / "ours.yaml", "--new").line
    assert "is no name of a suite" in calmix("evaluate", "suite", tmp_path / "a b", "--new").line


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("choices", "{", "it is no JSON"),
        ("choices", "[1]", "it is no JSON object"),
        ("choices", {"question": "x", "choices": ["a"], "answer": 0}, "two texts or more"),
        ("choices", {"question": "x", "choices": ["a", "b"], "answer": 2}, "the place of"),
        ("answers", {"question": "x", "answer": []}, "a text, or a list"),
        ("answers", {"question": " ", "answer": "a"}, "'question' must be a text"),
        ("numbers", '{"question": "x", "answer": NaN}', "must be a number"),
        ("numbers", {"question": "x", "answer": 10**400}, r"must be a number below 1e\+15"),
        ("programs", {"question": "x", "head": "f", "tests": ["f(1)"]}, "such as double"),
        ("programs", {"question": "x", "head": "f(x)", "tests": "a"}, "list of expressions"),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_line(tmp_path, kind, row, said):
    path = tmp_path / "rows.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text(json.dumps(EXAMPLES[kind]) + "\n" + text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"line 2: .*{said}"):
        read_rows(str(path), kind)


def test_rows_hold_any_text_and_long_numbers(folder):
    """A line separator within a text ends no row."""
    path, long = folder / "mine-numbers.jsonl", 123456789012345
    row = {"question": "one\u2028line\x85?", "answer": long}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (item,) = task_of(load_suite(folder / "mine.yaml").tasks["my_numbers"])
    assert verdict(item, Answer(f"It is {long}.", True))
    assert not verdict(item, Answer(f"It is {long + 1}.", True))
    path.write_bytes(b'{"question": "caf\xe9", "answer": 1}\n')
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_rows(str(path), "numbers")


def test_only_what_a_dense_model_gets_right_is_asked_and_all_else_is_wrong(
    folder, calmix, tiny_folder, tmp_path, monkeypatch
):
    seen = []

    def fake(opened, prompts, tick=None):
        seen.append(len(prompts))
        return [Answer("down", True) for _ in prompts]

    monkeypatch.setattr(abilities, "answers", fake)
    command = ("evaluate", str(tiny_folder), "--suite", str(folder / "mine.yaml"))
    whole = ("--task", "my_answers", "--task", "my_numbers")
    dense, pruned = str(tmp_path / "dense.json"), tmp_path / "pruned.json"
    assert calmix(*command, *whole, "-o", dense).code == 0
    again = (*command, *whole, "--against", dense, "--right-only", "-o", str(pruned))
    assert calmix(*again).code == 0
    found = json.loads(pruned.read_text(encoding="utf-8"))
    assert seen == [3, 1]
    assert found["scores"]["right_only"]
    for part in ("dense", "scores"):
        assert [task["values"] for task in found[part]["tasks"]] == [[1.0, 0.0], [0.0]]
    refused = calmix(*command, "--right-only", "--against", str(tiny_folder))
    assert (refused.code, "--against FILE.json" in refused.err) == (2, True)
