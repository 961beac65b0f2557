"""A user's own prompts: how they are read, what is seen of their answers, and the page of them."""

import json
import re
from dataclasses import replace

import pytest

from calmix.evaluation import evaluate as capability
from calmix.evaluation import prompts
from calmix.evaluation.answers import compare_answers
from calmix.evaluation.distance import pool_distances
from calmix.evaluation.evaluate import THINKING, as_prompt, evaluate, is_right, suite_asks
from calmix.evaluation.floors import check_floors
from calmix.evaluation.greedy import LOOP, PERIOD
from calmix.evaluation.journal import Journal, journal_beside
from calmix.evaluation.prompts import read_prompts
from calmix.evaluation.suites import choose, prompt_suite
from calmix.evaluation.summary import answer_lines, answers_page, fault_rows
from calmix.evaluation.tasks import load_items
from calmix.models.opening import open_model
from tests.browser import needs_chromium, readable
from tests.evaluation import helpers
from tests.evaluation.helpers import lacks, refuses, scored
from tests.tiny import save_tiny_model, tiny_tokenizer

ARGUMENTS = {"city": {"type": "string"}, "days": {"type": "integer"}}
WEATHER = {"name": "weather", "parameters": {"properties": ARGUMENTS, "required": ["city"]}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
NO_SCHEMAS = (
    [WEATHER],
    {"required": True},
    {"required": [["city"]]},
    {"properties": ["city"]},
    {"properties": {"city": {"enum": "Rome"}}},
)
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def written(path, *some):
    path.write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")
    return path


def test_rows_are_read_in_every_form(tmp_path):
    said = ("system", "Be brief."), ("user", "Hello"), ("assistant", "left out: it is the answer")
    chat = [{"role": role, "content": content} for role, content in said]
    rows = [
        {"prompt": "One?", "answer": "1"},
        {"messages": chat, "max_tokens": 9.0, "thinking": True},
        {"question": "Two?", "answer": 2},
        "Three?",
        {"prompt": "One?", "answer": "again"},
        {"prompt": "Four?", "answer": CALL, "check": "tool", "tools": [WEATHER]},
        {"prompt": "Five?", "check": {"lines": 3, "contains": ["a", "b"], "same": None}},
        {"prompt": "Six?", "check": {"same": None}},
    ]
    path, notes = written(tmp_path / "mine.jsonl", *rows), []
    one, two, three, four, five, six, seven = read_prompts(path, notes.append)
    assert (one.question, one.check, one.right) == ("One?", "text", ["1"])
    assert [turn["role"] for turn in two.messages] == ["system", "user"]
    assert (two.plain, two.tokens, two.thinking) == ("Be brief.\n\nHello", 9, True)
    assert (three.check, three.right) == ("number", ["2"])
    assert (four.question, four.check, four.tokens) == ("Three?", "", 256)
    assert (five.tools, five.right) == (tuple(TOOLS), CALL)
    assert six.right == {"lines": "3", "contains": "a|b"}
    assert seven.check == ""
    assert "prompts repeated, and asked once: 1" in notes[0]
    table, lines = tmp_path / "mine.csv", tmp_path / "mine.txt"
    tools = json.dumps([WEATHER]).replace('"', '""')
    table.write_text(f'prompt,answer,check,tools\nA?,x,contains,\nB?,,,"{tools}"\n', "utf-8")
    first, second = read_prompts(table)
    assert (first.right, second.tools, second.check) == ({"contains": "x"}, tuple(TOOLS), "")
    lines.write_text("A?\n\n B? \n", encoding="utf-8")
    assert [one.question for one in read_prompts(lines)] == ["A?", "B?"]
    table.write_text("prompt,body\nA?,other\n", "utf-8")
    assert read_prompts(f"{table}@body")[0].question == "other"


def test_a_row_that_cannot_be_asked_is_named(tmp_path):
    for row, says in (
        ({"prompt": " "}, "line 2: the prompt is empty: write"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2: the prompt is empty"),
        ({"messages": [{"content": "x"}]}, "message 0 of 'messages' has no role"),
        ({"prompt": ["x"]}, "'prompt' must be a text"),
        ({"prompt": "x", "answr": 2}, "unknown field 'answr': did you mean answer?"),
        *(
            ({"prompt": "x", "max_tokens": most}, "'max_tokens' must be a whole number")
            for most in (0, 64.5, "\u00b2", "9" * 5000)
        ),
        ({"prompt": "x", "check": "contain", "answer": "y"}, "did you mean contains?"),
        ({"prompt": "x", "check": ["text"], "answer": "y"}, "unknown check '['text']': "),
        ({"prompt": "x", "check": "number", "answer": []}, "'answer' is an empty list"),
        ({"prompt": "x", "check": "contains", "answer": ["y", ""]}, "none of them empty"),
        ({"prompt": "x", "check": "text"}, "the check 'text' needs an 'answer'"),
        ({"prompt": "x", "check": {"line": 3}}, "unknown rule 'line': did you mean lines?"),
        ({"prompt": "x", "answer": "y", "check": {"lines": 3}}, "no effect beside rules: leave"),
        ({"prompt": "x", "check": {"words": "abc"}}, "'words' needs a whole number, not 'abc'"),
        ({"prompt": "x", "check": {"language": "ja"}}, "unknown language 'ja': "),
        (
            {"prompt": "x", "check": {"contains": True}},
            "'contains' needs a text or a list of texts",
        ),
        ({"prompt": "x", "check": {"contains": "a|"}}, "none of them empty, not 'a|'"),
        ({"prompt": "x", "check": {"same": ["a"]}}, "the rule 'same' needs a text, not '['a']'"),
        ({"prompt": "x", "check": {"case": False}}, "'case' (capitals only) is true or left out"),
        ({"prompt": "x", "check": {"language": ["en"]}}, "unknown language '['en']': "),
        ({"prompt": "x", "check": "number", "answer": [3, "y"]}, "must be a number, not 'y'"),
        ({"prompt": "x", "tools": [{"title": "y"}]}, "a tool must be"),
        ({"prompt": "x", "tools": TOOLS, "check": "tool", "answer": {}}, "must be a valid call"),
        *(
            (
                {"prompt": "x", "tools": [WEATHER | {"parameters": one}]},
                "tool weather must be a JSON",
            )
            for one in NO_SCHEMAS
        ),
        ({"prompt": "\ud800"}, "unpaired surrogate"),
        ({"prompt": "x", "check": {"json": "{bad"}}, "line 2: '{bad' is not valid JSON: "),
        ({"prompt": "x", "check": "json", "answer": 5}, "'json' needs a JSON object or list"),
    ):
        path = written(tmp_path / "mine.jsonl", {"prompt": "first"}, row)
        refuses(re.escape(says), read_prompts, path)


def test_files_that_hold_no_prompts_and_options_without_effect(tmp_path, calmix):
    mine = written(tmp_path / "mine.jsonl", {"prompt": "x", "text": "y"})
    run = ("evaluate", "builtin:smollm2-135m", "--prompts")
    for more, says in (
        ((written(tmp_path / "empty.jsonl"),), "has no prompts"),
        ((tmp_path / "none.jsonl",), "there is no file"),
        ((written(tmp_path / "mine.pdf"),), "supported endings are"),
        ((mine, "--suite", "smoke"), "leave one out"),
        ((mine, "--page", tmp_path / "x.html"), "name both"),
        ((mine, "--against", run[1], "--text", f"code={mine}"), "--text has no effect with"),
        ((mine, "-o", mine, "--overwrite"), "is the input"),
    ):
        assert says in calmix(*run, *more).line
    assert "has no effect" in calmix(*run[:2], "--test-half").line


def test_prompts_are_split_by_what_they_ask_whatever_else_is_there(tmp_path):
    path = written(tmp_path / "mine.jsonl", *({"prompt": f"Question {n}?"} for n in range(200)))
    calibrate, test = prompts.halves(asked := read_prompts(path))
    assert len(calibrate) + len(test) == 200
    assert 70 < len(test) < 130
    assert prompts.halves(asked[50:])[1] == [one for one in test if one in asked[50:]]
    suite = prompt_suite(path, test_half=True)
    assert load_items(suite.tasks["mine"]) == test
    assert suite.hash != prompt_suite(path).hash
    (table := tmp_path / "mine.csv").write_text("a,b\nA?,B?\n", "utf-8")
    assert prompt_suite(f"{table}@a").hash != prompt_suite(f"{table}@b").hash
    one = written(path, {"prompt": "x"})
    refuses("1 prompts cannot be split", prompt_suite, one, test_half=True)


@pytest.mark.parametrize("check", ["text", "number", "result", "contains"])
def test_any_right_answer_of_a_list_is_right(check):
    one = prompts.parse_prompt({"prompt": "How many?", "answer": [3, 4], "check": check})
    right = [is_right(one, f"It is {n}.") for n in (3, 4, 5)]
    assert right == [True, True, False]


def faulty(answer, ended=True, dense=None, **more):
    prompt = prompts.parse_prompt({"prompt": "Say something.", **more})
    seen = prompts.properties(prompt, answer, ended, dense)
    return [name for name, met in seen.items() if not met]


def test_faults_that_need_no_right_answer():
    english = "The cat is in the house, and it is the one that was here for a while."
    french = "Le chat est dans la maison, et il est avec les chiens pour une heure."
    code = "Here it is:\n```python\ndef f(x):\n    return x\n```"
    thought = "<think>\nhm\n</think>\nYes."
    assert faulty(english) == faulty(code) == faulty(thought) == []
    assert faulty("  ") == faulty("<think>\nhm\n</think>\n") == ["text"]
    assert faulty(english, ended=False) == ["end"]
    assert faulty("I am a cat. " * 30, ended=False) == ["progress"]
    assert faulty(french, dense=english) == faulty(english, dense=french) == ["language"]
    assert faulty("Oui.", dense=english) == []  # too short to tell
    assert faulty('{"a": 1', dense='{"a": 1}') == ["json"]
    assert faulty('```json\n{"a": 2}\n```', dense='{"a": 1}') == []
    assert faulty('{"a": 1', prompt="Return JSON.") == ["json"]
    assert faulty("It is a format.", prompt="What is JSON?") == faulty("[Verse 1]\nOh") == []
    assert faulty(code.replace("return x", "return (x"), dense=code) == ["code"]
    assert faulty("I cannot.", dense=code) == ["code"]
    assert faulty("<think>\nhm", thinking=True, ended=False) == ["end", "thought"]
    assert faulty("<think>\nhm", dense=thought) == ["thought"]


def test_calls_of_tools_are_valid_by_their_schema():
    call = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    assert faulty(call, tools=TOOLS) == faulty("It is sunny.", tools=TOOLS) == []
    assert faulty("It is sunny.", tools=TOOLS, dense=call) == ["tool call"]
    assert faulty(call.replace("weather", "wether"), tools=TOOLS) == ["tool call"]
    assert faulty(call.replace('"Rome"', ""), tools=TOOLS) == ["tool call"]
    assert prompts.tool_calls(json.dumps({"name": "f", "parameters": {}}))[0]["name"] == "f"
    assert prompts.tool_calls(f"[TOOL_CALLS][{json.dumps(CALL)}]") == [CALL]
    assert prompts.tool_calls('{"named": 1}') == prompts.tool_calls("none") == []
    valid = [{"city": "Rome", "days": 2}, '{"city": "Rome"}']
    invalid = [{"city": "Rome", "days": True}, {"city": 3}, {"days": 2}, "Rome"]
    invalid.append({"city": "Rome", "country": "Italy"})
    for arguments in (*valid, *invalid):
        good = prompts.valid_call({"name": "weather", "arguments": arguments}, TOOLS)
        assert good is (arguments in valid), arguments
    assert prompts.same_call(call.lower(), CALL)
    assert not prompts.same_call(call + call, CALL)
    assert not prompts.same_call(call.replace("Rome", "Paris"), CALL)


def test_languages_and_loops():
    others = {"ru": "Вода нужна всем людям", "ja": "水は大切です", "zh": "水很重要"}
    german = "Die Katze ist in dem Haus und hat eine Maus"
    for name, text in ({"ko": "물은 중요하다", "de": german} | others).items():
        assert prompts.language(text) == name
    assert prompts.language("`the a an the is are`") == prompts.language("ok") == ""
    assert prompts.loops("a" * 130)
    assert prompts.loops("intro " + "and so it goes on, " * 8)
    assert not prompts.loops("\n".join(f"{n}. item" for n in range(60)))
    assert prompts.loops([1, 2] + [7, 8, 9] * 22, LOOP, PERIOD)
    assert not prompts.loops([7, 8, 9] * 20, LOOP, PERIOD)  # too short to be sure
    assert not prompts.loops([*range(20)] * 5, LOOP, PERIOD)  # such periods occur in lists


def task(answers, kept, **more):
    """Made-up answers of a model to prompts."""
    texts = {"answers": tuple(answers), "ended": (1,) * len(answers)}
    one = helpers.written("mine", "mine", kept)
    return replace(one, **texts, prompts=("<b>Why?</b>",) * len(answers), **more)


@pytest.fixture
def example():
    """Scores of a dense model with a repeat, and of a small one that lost an answer."""
    fine = {"text": True, "end": True}
    dense = task(["one two three", "b", "c"], [1, 1, 1], properties=(fine,) * 3)
    again = replace(dense, answers=("one two three", "b", "other"))
    seen = (fine, fine, {"text": True, "end": False, "json": False})
    small = task(["one two four", "b", "<i>c"], [1, 1, 0], properties=seen)
    far = {"total": {"kl_mean": 0.5, "kl_low": 0.4, "kl_high": 0.6, "top1": 0.9}}
    before = replace(scored(dense), repeat=(again,))
    return before, replace(scored(small), distance=far | {"items": {"0": 0.7}})


def test_answers_are_compared_in_pairs(example):
    found = compare_answers(example)
    assert (found.asked, found.identical.value, found.repeat) == (3, 1 / 3, 2 / 3)
    assert (found.parted, found.right) == (1, None)
    assert (found.sound.lost, found.sound.gained, found.sound.p) == (1, 0, 1.0)
    faults = {one.name: (one.asked, one.lost, one.gained) for one in found.faults}
    assert faults == {"text": (3, 0, 0), "end": (3, 1, 0), "json": (1, 1, 0)}
    assert found.again == {"text": 0.0, "end": 0.0}
    assert [row["fault"] for row in fault_rows(found)] == ["empty", "unfinished", "broken JSON"]
    assert not lacks(
        " ".join(answer_lines(found, example[1].distance)),
        "Identical answers: 1 of 3, 33.3 [",
        "(the dense model's own repeat: 66.7 %)",
        "KL on the dense model's answers: 0.500 nats per token [0.400, 0.600]",
        "Answers without a fault: 2 of 3 (dense model: 3), 1 lost, 0 gained",
    )
    assert compare_answers((scored(), scored())) is None


def test_the_page_shows_the_worst_first_and_escapes_what_models_write(example):
    page = answers_page({"small": example})
    assert lacks(page, "<b>Why", "&lt;b&gt;Why?") == ["<b>Why"]
    worst, changed, same = page.split("<article")[1:]
    assert not lacks(worst, "<mark>&lt;i&gt;c</mark>", '<span class="fault">unfinished</span>')
    assert not lacks(changed, "one two <mark>four</mark>", "KL 0.700")
    assert "<mark>" not in same


@needs_chromium
def test_the_page_can_be_read_on_a_telephone(page, example, tmp_path):
    dense, small = example
    long = replace(small.tasks[0], answers=("x" * 900, "```\n" + "y" * 300, "c"))
    name = "http://localhost:8080/v1#a-model-with-a-long-name"
    row = {"model": "small", "#MB": "30", "#good %": "33.3 [6.1, 79.2]", "#behind best": None}
    text = answers_page({name: (dense, replace(small, tasks=(long,)))}, [row], "Use small.")
    (path := tmp_path / "page.html").write_text(text, encoding="utf-8")
    readable(page, path, figures=0, texts=20)


def test_answers_in_the_journal_are_not_generated_again(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(capability, "CHUNK", 2)
    model, rows = (
        open_model(str(tiny_folder)),
        ({"prompt": f"p{n}", "max_tokens": 3} for n in range(5)),
    )
    suite = prompt_suite(written(tmp_path / "mine.jsonl", *rows))
    real, calls, output = capability.answers, [], tmp_path / "out.json"

    def answers(opened, prompts, **how):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return real(opened, prompts, **how)

    whole = evaluate(model, suite)
    monkeypatch.setattr(capability, "answers", answers)
    with pytest.raises(KeyboardInterrupt), journal_beside(output) as journal:
        evaluate(model, suite, journal=journal)
    kept = tmp_path / ".out.json.answers"
    assert sum(map(len, Journal(kept).known.values())) == 4
    kept.write_bytes(kept.read_bytes() + b'["half')
    calls.clear()
    with journal_beside(output) as journal:
        assert evaluate(model, suite, journal=journal).tasks == whole.tasks
    assert (calls, kept.exists()) == ([1], False)


def test_one_prompt_has_no_interval_of_its_distance():
    row = {"tokens": 4, **dict.fromkeys(("kl_mean", "kl_median", "kl_p99", "top1"), 0.5)}
    rows = {"0": row, "1": row | {"kl_mean": 1.5}}
    one = pool_distances({"dimensions": {"0": row}}, "mine")["total"]
    two = pool_distances({"dimensions": rows}, "mine")["total"]
    assert (one["kl_low"], one["kl_high"]) == (None, None)
    assert two["kl_low"] < two["kl_mean"] == 1.0 < two["kl_high"]


def test_answers_without_a_check_are_good_ones():
    dense, small = (task(["x"] * 9, kept, properties=({},) * 9) for kept in ([1] * 9, [0] * 9))
    result = check_floors({"": 0.5}, [(scored(dense), scored(small))])
    assert "9 of 9 good answers lost" in result.lines()[0]


@pytest.fixture
def chats(tmp_path):
    """Two tiny models that answer in a chat template."""
    folders = [save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for folder in folders:
        tiny_tokenizer(CHAT).save_pretrained(folder)
    return folders


def test_models_with_a_switch_are_asked_in_both_modes(chats, calmix, tmp_path):
    """In `abilities` and for a user's prompts; items that are not chats are left out."""
    small, mine = chats[1], written(tmp_path / "mine.jsonl", {"prompt": "Say x.", "max_tokens": 4})
    run = ("evaluate", small, "--prompts", mine)
    assert f"the chat template of {small} has no switch" in calmix(*run, "--thinking").line
    row = prompt_suite(written(tmp_path / "row.jsonl", {"prompt": "Say x.", "thinking": True}))
    assert "thought" not in evaluate(str(small), row).tasks[0].properties[0]
    tiny_tokenizer(CHAT + "{% if enable_thinking %}<think>{% endif %}").save_pretrained(small)
    assert "--thinking asks for it" in calmix(*run).ok().err
    scores = json.loads(calmix(*run, "--thinking", "--json").ok().out)["scores"]
    assert scores["suite"]["hash"] != prompt_suite(mine).hash
    assert "thought" in scores["tasks"][0]["properties"][0]
    opened, suite = open_model(small), choose("abilities", tasks=["stopping", "sums"])
    for thinking in (False, True):
        items = suite_asks(suite.model_copy(update={"thinking": thinking}))
        text = opened.tokenizer.decode(as_prompt(opened, items["stopping"][0]).ids)
        assert text.endswith("<think>") is thinking
        assert items["stopping"][0].tokens == 384 + THINKING * thinking
        assert not items["sums"][0].thinking
    thought = items["stopping"][0]
    assert is_right(thought, "Hm.</think>Yes, it is.")
    assert not is_right(thought, "Hm. Yes, it is.", ended=False)
    alone = ("evaluate", small, "--suite", "abilities", "--task", "sums", "--thinking")
    assert "no task of suite abilities is asked as a chat" in calmix(*alone).line
    ended = calmix(alone[0], chats[0], *alone[2:], "--task", "stopping")
    assert "leaves out tasks that are not asked as chats: sums" in ended.err


def test_the_command_compares_prints_and_gates(chats, calmix, tmp_path):
    out, page, (dense, small) = tmp_path / "out.json", tmp_path / "out.html", chats
    rows = [{"prompt": f"Say {n}.", "max_tokens": 6} for n in range(6)]
    mine = written(tmp_path / "mine.jsonl", *rows)
    run = ("evaluate", small, "--against", dense, "--prompts", mine)
    ended = calmix(*run, "-o", out, "--page", page).ok()
    assert "KL" not in ended.err
    assert not lacks(ended.out, "Identical answers: 0 of 6", "KL on the dense model's answers:")
    made = json.loads(out.read_text(encoding="utf-8"))
    assert made["prompts"]["faults"][0]["name"] == "text"
    assert page.read_text(encoding="utf-8").count("<article") == 6
    assert "has no signal" in calmix("check", out, "--keep-at-least", "mine=0.95").line
    written(mine, {"prompt": "word " * 2000})
    assert re.search("begins 'word word.* tokens, and the context of", calmix(*run).line)
    written(mine, {"prompt": "x", "tools": [WEATHER]})
    assert "has no tools, which the prompt that begins 'x' gives" in calmix(*run).line
    (tokenizer := tiny_tokenizer(CHAT)).add_tokens(["another"])
    tokenizer.save_pretrained(small)
    written(mine, {"prompt": "Say x.", "max_tokens": 4})
    ended = calmix(*run).ok()
    assert "KL is left out: their tokenizers differ" in ended.err
    assert "KL on the" not in ended.out
