"""The suite `abilities`: what is asked, in which form, and what is right."""

import pytest

from calmix.errors import InputError
from calmix.evaluation.abilities import load_asked, verdict
from calmix.evaluation.evaluate import runnable
from calmix.evaluation.greedy import Answer, prompt
from calmix.evaluation.suites import ASKED, load_suite
from calmix.yaml_files import packaged
from tests.tiny import tiny_tokenizer

MADE = ("sums", "small_programs", "requests")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def asked(name, template):
    tokenizer, task = tiny_tokenizer(), load_asked(name)
    tokenizer.chat_template = template
    first = task.items[0]
    made = prompt(tokenizer, first.chat, first.plain, task.tokens, task.until)
    return made, tokenizer.decode(made.ids)


def test_a_model_with_a_chat_template_is_asked_in_it_and_others_by_worked_examples():
    question = "What is the capital of France? Answer with one word."
    turn, text = asked("requests", TEMPLATE)
    assert (text, turn.until) == (f"<user>{question}<assistant>", ())
    refusing = ("{{ raise_exception('a system turn comes first') }}", "{{ messages | length }}")
    for template in (None, *refusing):
        plain, text = asked("requests", template)
        assert text.endswith(f"Request: {question}\nReply:")
        assert (text.count("Request:"), plain.until) == (4, ("\nRequest:",))
    _, text = asked("sums", TEMPLATE)  # short answers have worked examples in any case
    assert text.count(" = ") == 5
    assert text.endswith(" =")


def test_every_item_that_is_made_here_has_a_right_answer():
    """One that is written for the purpose, so that no item asks the impossible."""
    for item in load_asked("sums").items:
        a, sign, b = item.plain.splitlines()[-1].removesuffix(" =").split()
        assert int(item.right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    programs, requests = load_asked("small_programs"), load_asked("requests")
    (double,) = [item for item in programs.items if item.doc["entry_point"] == "double"]
    assert verdict(programs, double, Answer("    return 2 * x", True))
    assert len(requests.items) == 150
    solved = 0
    for item in requests.items:
        for key in {"is", "json", "same"} & set(item.right):
            answer = str(item.right[key]).split("|")[0]
            assert verdict(requests, item, Answer(answer, True)), (item.chat, answer)
            assert not verdict(requests, item, Answer(answer, False)), "cut"
            solved += 1
        assert not verdict(requests, item, Answer("  ", True))
    assert solved >= 80


def test_without_leave_programs_are_left_out_and_named():
    suite = load_suite("abilities")
    kept, left = runnable(suite, allowed=False)
    assert left == ["humaneval", "mbpp", "small_programs"]
    assert "string_operations" in kept.tasks
    assert runnable(suite, allowed=True) == (suite, [])
    for refused, whole in ((suite.only(tasks=left), False), (suite, True)):
        with pytest.raises(InputError, match="humaneval, mbpp, small_programs runs code"):
            runnable(refused, allowed=False, whole=whole)


@pytest.mark.real
@pytest.mark.parametrize("name", [n for n in packaged(ASKED) if n not in MADE])
def test_the_archives_items_are_asked_and_have_a_right_answer(name):
    task = load_asked(name)
    assert len(task.items) > 100
    doc, item = task.items[0].doc, task.items[0]
    if task.check == "program":
        right = doc.get("canonical_solution") or doc["code"]
    elif task.check in ("text", "exact"):
        right = item.right[0]
    else:
        right = f"so the answer is {item.right}" if task.check == "number" else doc["solution"]
    assert verdict(task, item, Answer(right, True))
    assert not verdict(task, item, Answer("pass", True))
