"""The suite `abilities`: what is asked, in which form, and what is right."""

import pytest

from calmix.evaluation import abilities
from calmix.evaluation.abilities import load_asked, prompts, verdict
from calmix.evaluation.evaluate import evaluate, runnable
from calmix.evaluation.greedy import Answer
from calmix.evaluation.suites import TaskSpec, load_suite
from calmix.models import open_model
from tests.tiny import save_tiny_model, tiny_tokenizer

MADE = ("sums", "small_programs", "requests")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text(prompt, tokenizer):
    return tokenizer.decode(prompt.ids)


def test_a_model_with_a_chat_template_is_asked_in_it_and_others_by_worked_examples():
    task, tokenizer = load_asked("requests"), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (turn,) = prompts(task, task.items[:1], tokenizer, chat=True)
    (plain,) = prompts(task, task.items[:1], tokenizer, chat=False)
    question = "What is the capital of France? Answer with one word."
    assert text(turn, tokenizer) == f"<user>{question}<assistant>"
    assert turn.until == ()
    assert text(plain, tokenizer).endswith(f"Request: {question}\nReply:")
    assert text(plain, tokenizer).count("Request:") == 4
    assert plain.until == ("\nRequest:",)
    sums = load_asked("sums")  # short answers have worked examples in any case
    (held,) = prompts(sums, sums.items[:1], tokenizer, chat=True)
    assert text(held, tokenizer).count(" = ") == 5
    assert text(held, tokenizer).endswith(" =")


def test_every_item_that_is_made_here_has_a_right_answer():
    """One that is written for the purpose, so that no item asks the impossible."""
    for item in load_asked("sums").items:
        a, sign, b = item.plain.splitlines()[-1].removesuffix(" =").split()
        assert int(item.right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    requests = load_asked("requests")
    assert len(requests.items) == 150

    solved = 0
    for item in requests.items:
        for key in ("is", "json", "same"):
            if key in item.right:
                answer = str(item.right[key]).split("|")[0]
                assert verdict(requests, item, Answer(answer, 3, True)), (item.chat, answer)
                assert not verdict(requests, item, Answer(answer, 3, False)), "cut"
                solved += 1
        assert not verdict(requests, item, Answer("  ", 0, True))
    assert solved >= 80


def test_a_template_that_refuses_a_lone_user_is_gone_without(tmp_path):
    tokenizer = open_model(str(save_tiny_model(tmp_path / "m"))).tokenizer
    task = load_asked("requests")
    for template in (
        "{{ raise_exception('a system turn comes first') }}",
        "{{ messages | length }}",
    ):
        tokenizer.chat_template = template
        assert prompts(task, task.items[:3], tokenizer, chat=True) == prompts(
            task, task.items[:3], tokenizer, chat=False
        )


def test_small_programs_can_be_written():
    task = load_asked("small_programs")
    bodies = {
        "double": "return 2 * x",
        "first": "return items[0]",
        "greet": "return 'Hello, ' + name",
    }
    for item in task.items:
        name = item.more["entry_point"]
        if name in bodies:
            head = item.more["head"]
            code = f"```python\ndef {head}:\n    {bodies[name]}\n```"
            assert verdict(task, item, Answer(code, 9, True))
            assert verdict(task, item, Answer(f"    {bodies[name]}", 9, True))
            assert not verdict(task, item, Answer(f"def {head}:\n    return None", 9, True))
            assert not verdict(task, item, Answer("import os\nos._exit(0)", 9, True))


def test_without_leave_programs_are_left_out_and_named():
    suite = load_suite("abilities")
    kept, left = runnable(suite, allowed=False)
    assert left == ["humaneval", "mbpp", "small_programs"]
    assert "string_operations" in kept.tasks
    assert runnable(suite, allowed=True) == (suite, [])
    code = suite.only(tasks=left)  # nothing would be left: refused later
    assert runnable(code, allowed=False) == (code, [])


def test_an_asked_task_is_scored_and_its_answers_are_kept(tmp_path, monkeypatch):
    opened = open_model(str(save_tiny_model(tmp_path / "m")), dtype="float32")
    monkeypatch.setattr(
        abilities, "answers",
        lambda model, asked, tick: [Answer(str(n % 3), 1, n % 4 > 0) for n in range(len(asked))],
    )  # fmt: skip
    suite = load_suite("abilities").only(tasks=["sums"]).limited(30)
    scores = evaluate(opened, suite)
    (task,) = scores.tasks
    assert scores.form == "worked examples"
    opened.tokenizer.chat_template = "{{ raise_exception('a system turn comes first') }}"
    assert evaluate(opened, suite).form == "worked examples"
    assert len(task.items) == len(task.answers) == len(task.ended) == 30
    assert sum(task.ended) == 22
    assert set(task.values) <= {0.0, 1.0}
    assert task.primary == "kept"
    assert task.consistent


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"asked": "sums", "metric": "acc"}, "none of an 'asked' task"),
        ({"asked": "sums", "archive": "mmlu", "metric": "as_asked"}, "'asked' stands alone"),
        ({"metric": "as_asked"}, "'archive' or 'asked'"),
        ({"asked": "nothing", "metric": "as_asked"}, "unknown asked task 'nothing'"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(more, says):
    with pytest.raises(ValueError, match=says):
        TaskSpec(**more)


@pytest.mark.real
@pytest.mark.parametrize("name", [n for n in abilities.asked_tasks() if n not in MADE])
def test_the_archives_items_are_asked_and_have_a_right_answer(name):
    task = load_asked(name)
    assert len(task.items) > 100
    doc, item = task.items[0].more, task.items[0]
    if task.check == "program":
        right = doc.get("canonical_solution") or doc["code"]
    elif task.check in ("text", "exact"):
        right = item.right[0]
    else:
        right = f"so the answer is {item.right}" if task.check == "number" else doc["solution"]
    assert verdict(task, item, Answer(right, 9, True))
    assert not verdict(task, item, Answer("pass", 9, True))
