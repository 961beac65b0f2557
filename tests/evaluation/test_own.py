"""Tasks of the user's own rows: read, refused, hashed, scored, and judged."""

import json

import pytest

from calmix.errors import InputError
from calmix.evaluation.abilities import prompts, task_of, verdict
from calmix.evaluation.evaluate import evaluate, suite_items
from calmix.evaluation.greedy import Answer
from calmix.evaluation.own import EXAMPLES, KINDS, read_rows, template
from calmix.evaluation.suites import load_suite
from calmix.evaluation.tasks import load_items
from tests.tiny import tiny_tokenizer


def said(text, ended=True):
    return Answer(text, 1, ended)


@pytest.fixture
def suite(tmp_path):
    for name, text in template("mine").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return load_suite(tmp_path / "mine.yaml")


def test_the_template_is_a_suite_whose_examples_are_right(suite):
    assert list(suite.dimensions) == ["support", "code"]
    assert [one.metric for one in suite.tasks.values()] == [
        "acc_norm", "as_asked", "as_asked", "pass@1"
    ]  # fmt: skip
    items = load_items(suite.tasks["my_choices"])
    assert items[0].choices == (" a stone", " an apple")
    assert items[0].requests[items[0].gold][1] == " an apple"
    right = {
        "my_answers": ["Paris.", "Downwards"], "my_numbers": ["That is 42 pens.", "75"],
        "my_programs": ["```python\ndef double(x):\n    return 2 * x\n```",
                        "    return n % 2 == 0"],
    }  # fmt: skip
    for name, texts in right.items():
        task = task_of(suite.tasks[name])
        for item, text, other in zip(task.items, texts, texts[::-1], strict=True):
            assert verdict(task, item, said(text)), (name, text)
            assert not verdict(task, item, said(other)), (name, other)
            assert not verdict(task, item, said(text, ended=False))
        assert len(prompts(task, task.items, tiny_tokenizer(), chat=True)) == 2


def test_the_hash_is_of_the_rows_and_not_of_their_place(suite, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name, text in template("mine").items():
        (other / name).write_text(text, encoding="utf-8")
    assert load_suite(other / "mine.yaml").hash == suite.hash
    with (other / "mine-numbers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "What is 1 plus 1?", "answer": 2}) + "\n")
    assert load_suite(other / "mine.yaml").hash != suite.hash


def test_the_last_rows_are_worked_examples_if_asked_for(suite, tmp_path):
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    text = text.replace("kind: answers", "kind: answers, shots: 1")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    (only,) = task_of(load_suite(tmp_path / "mine.yaml").tasks["my_answers"]).items
    assert only.plain.startswith("Question: What is the opposite of up?")
    assert " down\n\nQuestion: What is the capital" in only.plain


def test_a_model_is_scored_on_all_kinds(suite, tiny_folder, tmp_path, calmix, monkeypatch):
    scores = evaluate(tiny_folder, suite, allow_code_execution=True)
    assert [len(one.items) for one in scores.tasks] == [2, 2, 2, 2]
    assert scores.tasks[0].loglikelihoods
    assert scores.tasks[3].answers
    monkeypatch.setenv("COLUMNS", "300")  # a path as long as it is
    rows = tmp_path / "mine-numbers.jsonl"
    how = ("--suite", tmp_path / "mine.yaml", "-o", rows, "--overwrite", "--allow-code-execution")
    assert "is the input" in calmix("evaluate", tiny_folder, *how).line
    assert rows.read_text(encoding="utf-8").count("answer")
    shown = calmix("evaluate", "suite", tmp_path / "mine.yaml")
    assert (shown.code, "mine-programs.jsonl" in shown.out.replace("\n", "")) == (0, True)


def test_a_new_suite_is_written_and_overwrites_nothing(calmix, tmp_path):
    calmix("evaluate", "suite", tmp_path / "ours", "--new").ok()
    assert load_suite(tmp_path / "ours.yaml").name == "ours"
    assert "exists" in calmix("evaluate", "suite", tmp_path / "ours.yaml", "--new").line
    assert "is no name of a suite" in calmix("evaluate", "suite", tmp_path / "a b", "--new").line
    calmix("evaluate", "suite", tmp_path / "ours.v2", "--new").ok()
    assert load_suite(tmp_path / "ours.v2.yaml").name == "ours.v2"


def test_text_is_checked_against_question_and_answer(suite):
    texts = [text for _, _, text in suite_items(suite)]
    assert "What is the capital of France? Answer with one word.\nParis" in texts
    assert "What is 120 minus 45?\n75" in texts
    assert "returns x times two.\ndouble(4) == 8\ndouble(0) == 0" in texts


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("choices", "{", "line 2: it is no JSON"),
        ("choices", "[1]", "it is no JSON object"),
        ("choices", {"question": "x", "choices": ["a"], "answer": 0}, "two texts or more"),
        ("choices", {"question": "x", "choices": ["a", "b"], "answer": 2}, "the place of"),
        ("choices", {"question": "x", "choices": ["a", "b"], "answer": True}, "the place of"),
        ("answers", {"question": "x", "answer": []}, "a text, or a list"),
        ("answers", {"question": " ", "answer": "a"}, "'question' must be a text"),
        ("numbers", {"question": "x", "answer": "4"}, "must be a number"),
        ("numbers", '{"question": "x", "answer": NaN}', "must be a number"),
        ("numbers", {"question": "x", "answer": 10**400}, r"must be a number below 1e\+15"),
        ("programs", {"question": "x", "head": "1(x)", "tests": ["a"]}, "such as double"),
        ("programs", {"question": "x", "head": "f", "tests": ["f(1)"]}, "such as double"),
        ("programs", {"question": "x", "head": "f(x)", "tests": ["f(1) ="]}, "of expressions"),
        ("programs", {"question": "x", "head": "f(x)", "tests": "a"}, "list of expressions"),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_line(tmp_path, kind, row, said):
    path = tmp_path / "rows.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text(json.dumps(EXAMPLES[kind][0]) + "\n" + text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=said) as error:
        read_rows(str(path), kind)
    assert "line 2" in str(error.value)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{file: a.jsonl}", "'file' needs 'kind': choices"),
        ("{file: a.jsonl, kind: answers}", "there is no file"),
        ("{file: a.jsonl, kind: answers, archive: x}", "'file' stands alone"),
        ("{file: a.jsonl, kind: answers, metric: acc}", "is scored by as_asked"),
        ("{asked: sums, metric: as_asked, kind: answers}", "'kind' is of a task with 'file'"),
    ],
)
def test_a_task_that_is_wrong_is_one_line(tmp_path, task, said):
    path = tmp_path / "s.yaml"
    path.write_text(f"name: s\nversion: 1\ndescription: d\ndimensions:\n  a:\n    t: {task}\n")
    with pytest.raises(InputError, match=said):
        load_suite(path)


def test_rows_hold_any_text_and_long_numbers(suite, tmp_path):
    """A line separator within a text ends no row."""
    path, long = tmp_path / "mine-numbers.jsonl", 123456789012345
    row = {"question": "one\u2028line\x85?", "answer": long}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    task = task_of(suite.tasks["my_numbers"])
    assert verdict(task, task.items[0], said(f"It is {long}."))
    assert not verdict(task, task.items[0], said(f"It is {long + 1}."))
    path.write_bytes(b'{"question": "caf\xe9", "answer": 1}\n')
    with pytest.raises(InputError, match="is not UTF-8 at byte 17: save it as UTF-8"):
        read_rows(str(path), "numbers")


def test_examples_leave_rows_to_score(suite, tmp_path):
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("kind: answers", "kind: answers, shots: 3"), encoding="utf-8")
    with pytest.raises(InputError, match="has 2 rows, all of them worked examples"):
        load_suite(path)


def test_every_kind_has_examples():
    assert set(EXAMPLES) == set(KINDS)
