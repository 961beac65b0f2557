"""Evaluating: scores with every item, the dense cache, refused comparisons, code if allowed."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from calmix.errors import InputError
from calmix.evaluation import abilities
from calmix.evaluation.evaluate import evaluate
from calmix.evaluation.greedy import Answer
from calmix.evaluation.scores import describe, load_scores
from calmix.evaluation.suites import load_suite, parse_suite
from calmix.evaluation.tasks import load_items
from calmix.models import open_model
from tests.evaluation.archive import suite_text, use_archive
from tests.evaluation.helpers import accuracy, reference, request, scored


@pytest.fixture
def suite(monkeypatch, tmp_path):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    use_archive(monkeypatch)
    return parse_suite(suite_text(), "suite")


@pytest.fixture
def tiny(tiny_folder):
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


def plain(model, requests):
    return reference(model, [request(*one) for one in requests])


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
            wanted = plain(tiny, item.requests)
            assert task.loglikelihoods[number] == pytest.approx(wanted, abs=2e-3)
            assert task.bytes[number] == tuple(len(answer) for _, answer in item.requests)
            if task.floor == "context-free":
                alone = plain(tiny, [("Answer:", choice) for choice in item.choices])
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


def test_a_pruned_models_scores_need_no_floors(suite, tiny):
    dense, pruned = evaluate(tiny, suite), evaluate(tiny, suite, floors=False)
    assert all(not task.floors and not task.unigram for task in pruned.tasks)
    kept = pruned.retention(dense, resamples=10)
    assert kept == dense.retention(dense, resamples=10)
    assert all(task.kept.value == 1.0 for task in kept.tasks if task.signal)
    assert pruned.retention(pruned, measure="ratio", resamples=50).of("code").low == 1.0
    with pytest.raises(InputError, match="no score without the knowledge"):
        dense.retention(pruned)


def test_selections_and_the_way_through_a_file(suite, tiny, tmp_path):
    assert len(evaluate(tiny, suite, quick=True).tasks[0].items) == 3
    scores = evaluate(tiny, suite, limit=2)
    assert [len(task.items) for task in scores.tasks] == [2, 2, 2]
    assert [t.name for t in evaluate(tiny, suite, dimensions=["code"]).tasks] == ["text"]
    scores.save(tmp_path / "scores.json")
    assert load_scores(tmp_path / "scores.json") == scores


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "it is no JSON"),
        ('{"kind": "other"}', "holds no scores"),
        ('{"kind": "capability scores", "format": 1}', "in format 1, not 2"),
        ('{"kind": "capability scores", "format": 2, "tasks": [{"name": "a"}]}', "is damaged"),
        (None, "there is no file"),
    ],
)
def test_files_that_are_no_scores(tmp_path, content, says):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        load_scores(path)


def test_parts_of_a_file_that_do_not_fit_together_are_refused(suite, tiny, tmp_path):
    scores, path = evaluate(tiny, suite, limit=2), tmp_path / "scores.json"
    quiz = scores.tasks[0]
    for part in ("values", "gold", "loglikelihoods", "bytes", "floors", "unigram"):
        replace(scores, tasks=(replace(quiz, **{part: getattr(quiz, part)[:1]}),)).save(path)
        with pytest.raises(InputError, match="task quiz has parts of different lengths"):
            load_scores(path)
    replace(scores, tasks=(replace(quiz, gold=(0, 3)),)).save(path)
    with pytest.raises(InputError, match="is damaged"):
        load_scores(path)


def test_dense_scores_are_kept_by_model_suite_and_dtype(suite, tiny, tiny_folder, tmp_path):
    folder, first = tmp_path / "cache/scores", evaluate(tiny, suite, cache=True)
    (kept,) = folder.iterdir()
    held = kept.read_bytes()
    assert evaluate(tiny, suite, cache=True) == first  # seconds too: it was not scored again
    evaluate(tiny, suite)  # not asked for
    assert [*folder.iterdir()] == [kept]
    evaluate(tiny, suite, limit=2, cache=True)
    evaluate(open_model(str(tiny_folder), dtype="bfloat16", device="cpu"), suite, cache=True)
    assert len([*folder.iterdir()]) == 3
    kept.write_text("{", encoding="utf-8")  # a damaged one is made again
    assert evaluate(tiny, suite, cache=True).tasks == first.tasks
    assert len(kept.read_bytes()) == pytest.approx(len(held), abs=20)


def test_different_suites_versions_and_selections_are_not_compared():
    def made(suite):
        return replace(scored(accuracy([1.0, 1.0], chance=0.0)), suite=describe(suite))

    suite = parse_suite(suite_text(), "suite")
    for old, new in (("version: 1", "version: 2"), ("name: made", "name: other")):
        other = parse_suite(suite_text().replace(old, new), "suite")
        with pytest.raises(InputError, match=r"different suites or versions .* version"):
            made(suite).retention(made(other))
    with pytest.raises(InputError, match=r"different selections \(--quick"):
        made(suite).retention(made(suite.quick()))
    assert made(suite).retention(made(suite), measure="ratio").total.value == 1.0


@pytest.mark.real
def test_the_builtin_model_on_the_smoke_suite():
    scores = evaluate("builtin:smollm2-135m", load_suite("smoke").limited(4))
    assert len(scores.tasks) == 4
    assert scores.retention(scores).of("code").value == 1.0
    text = next(task for task in scores.retention(scores).tasks if task.name == "mbpp")
    assert 0.3 < text.dense < (text.floor or 0) < 2.0  # the code without its task is half of it


@pytest.mark.real
@pytest.mark.parametrize("builtin", [False, pytest.param(True, marks=pytest.mark.long)])
def test_programs_are_written_run_and_scored(builtin, tiny_folder, monkeypatch):
    name = "builtin:smollm2-135m" if builtin else str(tiny_folder)
    if not builtin:  # whose answers never end
        solved = "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) " \
                 "for b in numbers[:i])"  # fmt: skip
        monkeypatch.setattr(abilities, "answers", lambda *_, **__: [Answer(solved, 4, True)])
    suite = load_suite("paper").limited(1).only(tasks=["humaneval"])
    (task,) = evaluate(open_model(name), suite, allow_code_execution=True).tasks
    assert task.items == ("humaneval/0",)
    assert task.values in ([(0.0,), (1.0,)] if builtin else [(1.0,)])
