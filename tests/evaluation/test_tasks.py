from collections import Counter

import pytest

from calmix import assets
from calmix.evaluation.evaluate import evaluate, is_right, takes_tools
from calmix.evaluation.greedy import prompt
from calmix.evaluation.suites import ASKED, Suite, TaskSpec, choose, load_suite, runnable, spread
from calmix.evaluation.tasks import load_asked, load_items, preamble, suite_items
from calmix.models.opening import OpenModel
from calmix.yaml_files import packaged, parse_model
from tests.evaluation.archive import suite_text, use_archive
from tests.evaluation.helpers import opened, refuses
from tests.tiny import tiny_tokenizer

MADE = ("sums", "small_programs", "requests", "stopping", "languages", "tool_calls")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDINGS = {  # tasks with several right answers: an item, answers that match it, one that does not
    "triviaqa": ("2046", [" The Bank of England"], " The Old Lady of Threadneedle Street"),
    "common_knowledge": ("1068", ["a telephone", " phone."], "fax"),
}
SENTENCES = {
    "fr": "Le pain est dans la maison.",
    "de": "Das Brot ist in dem Haus.",
    "es": "El pan es bueno y está en la mesa.",
    "it": "Il pane è buono e si mangia con gli amici.",
    "pt": "O pão é bom e não se come com os pés.",
}


def test_even_spread():
    assert spread([""] * 10, 5) == [0, 2, 4, 6, 8]
    assert spread([""] * 3, 9) == spread([""] * 3, None) == [0, 1, 2]
    groups = ["a"] * 100 + ["b"] * 10 + ["c"] * 2
    taken = Counter(groups[i] for i in spread(groups, 12))
    assert taken == {"a": 5, "b": 5, "c": 2}
    assert len(spread([str(i) for i in range(57)], 10)) == 10


@pytest.fixture
def archive(monkeypatch):
    use_archive(monkeypatch)


def spec(**fields):
    base = {"archive": "quiz/rc", "form": "question", "metric": "acc_norm", "shots": 2}
    return TaskSpec(**base | {"chance": "choices"} | fields)


@pytest.mark.usefixtures("archive")
def test_item_selection_and_missing_entries():
    assert [item.id for item in load_items(spec())] == [f"quiz/{n}" for n in range(10)]
    assert [item.number for item in load_items(spec(items="even", limit=2))] == [0, 4]
    suite = parse_model(Suite, suite_text(), "suite")
    mbpp = suite.tasks["text"].model_copy(update={"items": "even"})
    assert [item.number for item in load_items(mbpp)] == [12, 14]  # its own numbers, from 11 on
    texts = {identifier: text for _, identifier, text in suite_items(suite)}  # for leakage
    assert texts["quiz/2"] == "Question: what is 2?\nAnswer: two 2\n not 2\n none 2"
    assert (texts["which/0"], texts["mbpp/1"]) == ("The moon 0 is hot.", "Write 12.\nreturn 12")
    assert preamble(["Q: x", "Q: y"]) == preamble(["same\n\ntext"] * 2) == preamble([]) == 0
    for fields, says in (
        ({"archive": "quizz/rc"}, "no 'quizz/rc' with 2 shots: did you mean quiz/rc_2shot"),
        ({"form": "contexts", "metric": "acc"}, "item quiz/0 of the archive is not of form 'con"),
        ({"archive": "which/rc", "shots": 0}, "item which/0 of the archive is not of form 'quest"),
    ):
        refuses(says, load_items, spec(**fields))


@pytest.mark.usefixtures("archive")
def test_passage_scoring(monkeypatch):
    texts = ["one two three four five", "one two three four five", "word " * 500]

    def read(_, member):
        for number, text in enumerate(texts):
            asked = {"context": f"{text}\nQuestion: why?\nAnswer:", "continuation": " no"}
            yield {"doc_id": number, "idx": 0, "label": 0, "doc": {}, "request": asked}

    passages = TaskSpec(archive="quiz/rc", form="passage", metric="bits_per_byte", shots=2)
    monkeypatch.setattr(assets, "read_jsonl", read)
    first, long = load_items(passages)
    assert (first.id, first.requests) == ("quiz/0", (("one two three", " four five"),))
    assert (long.id, long.requests[0][1]) == ("quiz/2", " word" * 119)  # whole words only
    texts.append("single")
    refuses("item quiz/3 of the archive has no passage before", load_items, passages)


@pytest.mark.real
@pytest.mark.parametrize("name", ["mmlu", "gsm8k", "math500", "mbpp"])
def test_real_archive_items(name):
    task = load_suite("offline").tasks[name]
    items = load_items(task)
    assert len({item.id for item in items}) == len(items) == task.limit
    assert task.items == "all" or all(item.number % 2 == 0 for item in items)
    if name == "mmlu":
        assert set(Counter(item.id.rpartition("/")[0] for item in items).values()) == {3}
    if name == "gsm8k":
        _, _, text = next(iter(suite_items(choose("offline", tasks=[name]))))
        assert text.startswith("Question: Janet’s ducks")


def asked(name, template):
    tokenizer, first = tiny_tokenizer(template), load_asked(name)[0]
    made = prompt(tokenizer, first.messages, first.plain, first.tokens, first.until)
    return tokenizer.decode(made.ids), made.until


def test_prompt_forms():
    question = "What is the capital of France? Answer with one word."
    assert asked("requests", TEMPLATE) == (f"<user>{question}<assistant>", ())
    refusing = ("{{ raise_exception('a system turn comes first') }}", "{{ messages | length }}")
    for template in (None, *refusing):
        text, until = asked("requests", template)
        assert text.endswith(f"Request: {question}\nReply:")
        assert (text.count("Request:"), until) == (4, ("\nRequest:",))
    text, _ = asked("sums", TEMPLATE)  # short answers have worked examples in any case
    assert (text[-2:], text.count(" = ")) == (" =", 5)


def test_generated_items_have_right_answers():
    """Right answers pass, so no item asks for the impossible."""
    sums = load_asked("sums")
    assert (len({item.plain for item in sums}), len(sums)) == (111, 111)  # without repeated ones
    assert (sums[0].id, sums[-1].id) == ("sums/0", "sums/114")
    for item in sums:
        a, sign, b = item.plain.splitlines()[-1].removesuffix(" =").split()
        assert int(item.right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    programs, requests = load_asked("small_programs"), load_asked("requests")
    (double,) = [item for item in programs if item.doc["entry_point"] == "double"]
    assert is_right(double, "    return 2 * x")
    answer = "```python\ndef double(x):\n    return 2 * x\n```\nThis function"
    assert is_right(double, answer, False)
    assert not is_right(double, answer.partition("\n```")[0], False)
    solved = 0
    for item in requests:
        for key in {"is", "json", "same"} & set(item.right):
            answer = str(item.right[key]).split("|")[0]
            assert is_right(item, answer), (item.chat, answer)
            assert not is_right(item, answer, False), "cut"
            solved += 1
        assert not is_right(item, "  ")
    assert (len(requests), solved >= 80) == (150, True)


def test_programs_need_permission():
    suite = load_suite("abilities")
    kept, left = runnable(suite, allowed=False)
    assert left == ["humaneval", "mbpp", "small_programs"]
    assert "string_operations" in kept.tasks
    assert runnable(suite, allowed=True) == (suite, [])
    for refused, whole in ((choose(suite, tasks=left), False), (suite, True)):
        says = "humaneval, mbpp, small_programs runs code .* or name a suite without it"
        refuses(says, runnable, refused, allowed=False, whole=whole)


@pytest.mark.real
@pytest.mark.parametrize("name", [n for n in packaged(ASKED) if n not in MADE])
def test_archive_items_have_right_answers(name):
    item, *others = load_asked(name)
    assert len(others) > 100
    doc = item.doc
    if item.check == "program":
        right = doc.get("canonical_solution") or doc["code"]
    elif item.check in ("text", "exact"):
        right = item.right[0]
    else:
        right = f"so the answer is {item.right}" if item.check == "number" else doc["solution"]
    assert [is_right(item, one) for one in (right, "pass")] == [True, False]
    if name in WORDINGS:
        number, good, bad = WORDINGS[name]
        (item,) = [one for one in others if one.id == f"{name}/{number}"]
        assert [is_right(item, one) for one in (*good, bad)] == [True] * len(good) + [False]


def test_tool_calls_are_asked_only_if_the_template_shows_tools(monkeypatch):
    suite = choose("abilities", tasks=["tool_calls", "stopping"], limit=2)
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "paris"}}</tool_call>'
    prompts = []

    def answers(opened, some, **_):
        prompts.extend(opened.tokenizer.decode(one.ids) for one in some)
        return [(call, True)] * len(some)

    monkeypatch.setattr("calmix.evaluation.evaluate.answers", answers)
    monkeypatch.setattr(OpenModel, "fingerprint", "x")
    model, called = opened(), "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    for template, values in ((TEMPLATE, ()), (called + TEMPLATE, (1.0, 0.0))):
        model.tokenizer.chat_template = template
        assert takes_tools(model.tokenizer) is bool(values)
        scores = evaluate(model, suite)
        stopping, tools = scores.tasks
        assert (stopping.values, tools.values) == ((1.0, 1.0), values)
        assert scores.retention(scores).measure == "right"
        assert len(scores.retention(scores, "primary").tasks) == 1 + bool(values)
    assert sum("[get_weather]" in one for one in prompts) == 1
    assert not any("[" in one for one in prompts if "tips" in one or "Explain" in one)


def test_requests_in_five_languages_have_answers_that_count():
    items = load_asked("languages")
    assert len(items) == len({one.question for one in items}) == 60
    for one in items:
        spoken = one.right.get("language")
        good = SENTENCES[spoken] if spoken else one.right.get("is", "a, b, c").split("|")[0]
        assert is_right(one, good), one.question
        wrong = "The bread is in the house." if spoken else "I do not know, sorry."
        assert not is_right(one, wrong), one.question
