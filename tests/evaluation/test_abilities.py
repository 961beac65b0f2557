"""The suite `abilities`: what is asked, in which form, and what is right."""

import pytest

from calmix.errors import InputError
from calmix.evaluation.abilities import load_asked, verdict
from calmix.evaluation.evaluate import choose, runnable
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
    tokenizer, first = tiny_tokenizer(), load_asked(name)[0]
    tokenizer.chat_template = template
    made = prompt(tokenizer, first.chat, first.plain, first.tokens, first.until)
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
    for item in load_asked("sums"):
        a, sign, b = item.plain.splitlines()[-1].removesuffix(" =").split()
        assert int(item.right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    programs, requests = load_asked("small_programs"), load_asked("requests")
    (double,) = [item for item in programs if item.doc["entry_point"] == "double"]
    assert verdict(double, Answer("    return 2 * x", True))
    assert len(requests) == 150
    solved = 0
    for item in requests:
        for key in {"is", "json", "same"} & set(item.right):
            answer = str(item.right[key]).split("|")[0]
            assert verdict(item, Answer(answer, True)), (item.chat, answer)
            assert not verdict(item, Answer(answer, False)), "cut"
            solved += 1
        assert not verdict(item, Answer("  ", True))
    assert solved >= 80


def test_without_leave_programs_are_left_out_and_named():
    suite = load_suite("abilities")
    kept, left = runnable(suite, allowed=False)
    assert left == ["humaneval", "mbpp", "small_programs"]
    assert "string_operations" in kept.tasks
    assert runnable(suite, allowed=True) == (suite, [])
    for refused, whole in ((choose(suite, tasks=left), False), (suite, True)):
        with pytest.raises(InputError, match="humaneval, mbpp, small_programs runs code"):
            runnable(refused, allowed=False, whole=whole)


@pytest.mark.real
@pytest.mark.parametrize("name", [n for n in packaged(ASKED) if n not in MADE])
def test_the_archives_items_are_asked_and_have_a_right_answer(name):
    item, *others = load_asked(name)
    assert len(others) > 100
    doc = item.doc
    if item.check == "program":
        right = doc.get("canonical_solution") or doc["code"]
    elif item.check in ("text", "exact"):
        right = item.right[0]
    else:
        right = f"so the answer is {item.right}" if item.check == "number" else doc["solution"]
    assert verdict(item, Answer(right, True))
    assert not verdict(item, Answer("pass", True))
