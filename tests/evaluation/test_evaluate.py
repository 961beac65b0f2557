"""Evaluating: scores with every item, the dense cache, refused comparisons, code if allowed."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace

import pytest

from calmix.errors import InputError
from calmix.evaluation.evaluate import evaluate
from calmix.evaluation.scores import load_scores
from calmix.evaluation.suites import Suite
from calmix.evaluation.tasks import load_items
from calmix.models import open_model
from calmix.yaml_files import parse_model
from tests.evaluation.archive import suite_text, use_archive
from tests.evaluation.helpers import reference


@pytest.fixture
def suite(monkeypatch, tmp_path):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    use_archive(monkeypatch)
    return parse_model(Suite, suite_text(), "suite")


@pytest.fixture
def tiny(tiny_folder):
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


def test_scores_are_those_of_the_plain_model(suite, tiny):
    scores = evaluate(tiny, suite)
    assert [(t.name, t.dimension, t.primary, t.floor, t.chance) for t in scores.tasks] == [
        ("quiz", "general", "probability", "context-free", pytest.approx(1 / 3)),
        ("which", "general", "probability", "uniform", 0.5),
        ("text", "code", "bits", "context-free", 0.0),
    ]
    for task in scores.tasks:
        items = load_items(suite.tasks[task.name])
        assert task.items == tuple(item.id for item in items)
        assert task.gold == tuple(item.gold for item in items)
        for number, item in enumerate(items):
            wanted = reference(tiny, item.requests)
            assert task.loglikelihoods[number] == pytest.approx(wanted, abs=2e-3)
            assert task.bytes[number] == tuple(len(answer) for _, answer in item.requests)
            if task.floor == "context-free":
                alone = reference(tiny, [("Answer:", choice) for choice in item.choices])
                assert task.floors[number] == pytest.approx(alone, abs=2e-3)
            if task.name == "quiz":  # acc_norm: characters without the space before a choice
                wanted = [v / (len(c) - 1) for v, c in zip(wanted, item.choices, strict=True)]
            if task.values:
                assert task.values[number] == float(wanted.index(max(wanted)) == item.gold)
    assert [bool(task.values) for task in scores.tasks] == [True, True, False]


def test_a_text_without_knowledge_is_a_code_of_single_tokens(suite, tiny):
    text = evaluate(tiny, suite, tasks=["text"]).tasks[0]
    items = load_items(suite.tasks["text"])
    ids = [tiny.tokenizer(t)["input_ids"] for i in items for t in (*i.contexts, *i.choices)]
    counts = Counter(token for row in ids for token in row)
    for item, floor in zip(items, text.unigram, strict=True):
        tokens = tiny.tokenizer(item.choices[0])["input_ids"]
        wanted = sum(math.log(counts[token] / counts.total()) for token in tokens)
        assert floor == pytest.approx(wanted, abs=1e-3)
    # The code is fitted to all the archive has: a limit does not change it.
    assert evaluate(tiny, suite, tasks=["text"], limit=2).tasks[0].unigram == text.unigram[::2]


def test_a_file_gives_the_scores_back_or_is_refused(suite, tiny, tmp_path):
    assert len(evaluate(tiny, suite, quick=True).tasks[0].items) == 3
    scores, path = evaluate(tiny, suite, limit=2), tmp_path / "scores.json"
    assert [len(task.items) for task in scores.tasks] == [2, 2, 2]
    scores.save(path)
    assert load_scores(path) == scores
    quiz, told = scores.tasks[0], scores.to_dict()
    wrong = {
        part: getattr(quiz, part)[:1]
        for part in ("values", "gold", "loglikelihoods", "bytes", "floors", "unigram")
    }
    for change, says in (
        *(({"tasks": [asdict(replace(quiz, **{part: few}))]}, "task quiz has parts of different")
          for part, few in wrong.items()),
        ({"tasks": [asdict(replace(quiz, gold=(0, 3)))]}, "is damaged"),
        ({"tasks": [asdict(replace(quiz, loglikelihoods=()))]}, "is damaged"),
        ({"tasks": [{"name": "a"}]}, "is damaged"), ({"suite": {}}, "of which suite"),
        ({"kind": "other"}, "holds no scores"), ({"format": 1}, "in format 1, not 2"),
    ):  # fmt: skip
        path.write_text(json.dumps(told | change), encoding="utf-8")
        with pytest.raises(InputError, match=says):
            load_scores(path)


def test_dense_scores_are_kept_by_model_suite_and_dtype(suite, tiny, tiny_folder, tmp_path):
    folder, first = tmp_path / "cache/scores", evaluate(tiny, suite, cache=True)
    (kept,) = folder.iterdir()
    held = kept.read_bytes()
    assert evaluate(tiny, suite, cache=True) == first  # seconds too: it was not scored again
    evaluate(tiny, suite, limit=2, cache=True)
    evaluate(open_model(str(tiny_folder), dtype="bfloat16", device="cpu"), suite, cache=True)
    assert len([*folder.iterdir()]) == 3
    kept.write_text("{", encoding="utf-8")  # a damaged one is made again
    assert evaluate(tiny, suite, cache=True).tasks == first.tasks
    assert len(kept.read_bytes()) == pytest.approx(len(held), abs=20)


@pytest.mark.real
def test_the_builtin_model_on_the_smoke_suite():
    scores = evaluate("builtin:smollm2-135m", "smoke", limit=4)
    assert len(scores.tasks) == 4
    assert scores.retention(scores).of("code").value == 1.0
    text = next(task for task in scores.retention(scores).tasks if task.name == "mbpp")
    assert 0.3 < text.dense < (text.floor or 0) < 2.0  # the code without its task is half of it
