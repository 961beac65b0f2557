"""Evaluating: scores with every item, the dense cache, refused comparisons, code if allowed."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest

from calmix.errors import InputError
from calmix.evaluation import evaluate as module
from calmix.evaluation import greedy
from calmix.evaluation.evaluate import evaluate
from calmix.evaluation.records import TaskScores
from calmix.evaluation.scores import CapabilityScores, describe, load_scores
from calmix.evaluation.suites import load_suite, parse_suite
from calmix.evaluation.tasks import load_items
from calmix.models import open_model
from tests.evaluation.archive import suite_text, use_archive
from tests.evaluation.helpers import reference, request


@pytest.fixture
def suite(monkeypatch, tmp_path):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    use_archive(monkeypatch)
    return parse_suite(suite_text(), "suite")


@pytest.fixture
def tiny(tiny_folder):
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


def plain(model, context, answers):
    return [value for value, _ in reference(model, [request(context, a) for a in answers])]


def test_scores_are_those_of_the_plain_model(suite, tiny):
    scores = evaluate(tiny, suite)
    assert [(t.name, t.dimension, t.primary, t.floor) for t in scores.tasks] == [
        ("quiz", "general", "probability", "context-free"),
        ("which", "general", "probability", "uniform"),
        ("text", "code", "bits", "context-free"),
    ]
    quiz, which, text = scores.tasks
    assert quiz.items == tuple(f"quiz/{n}" for n in range(10))
    assert which.items == ("which/0", "which/2", "which/4")
    assert (quiz.chance, which.chance, text.chance) == (pytest.approx(1 / 3), 0.5, 0.0)
    assert which.gold == (1, 1, 1)
    for number, item in enumerate(load_items(suite.tasks["quiz"])):
        wanted = plain(tiny, item.contexts[0], item.choices)
        assert quiz.loglikelihoods[number] == pytest.approx(wanted, abs=2e-3)
        assert quiz.bytes[number] == tuple(len(choice) for choice in item.choices)
        assert quiz.gold[number] == item.gold
        assert quiz.floors[number] == pytest.approx(plain(tiny, "Answer:", item.choices), abs=2e-3)
        # acc_norm divides by the characters of a choice without the space before it.
        norms = [v / (len(c) - 1) for v, c in zip(wanted, item.choices, strict=True)]
        assert quiz.values[number] == float(norms.index(max(norms)) == item.gold)
    for item, row, value in zip(
        load_items(suite.tasks["which"]), which.loglikelihoods, which.values, strict=True
    ):
        wanted = [plain(tiny, context, item.choices)[0] for context in item.contexts]
        assert row == pytest.approx(wanted, abs=2e-3)
        assert value == float(wanted[1] > wanted[0])
    items = load_items(suite.tasks["text"])
    wanted = [plain(tiny, i.contexts[0], i.choices)[0] for i in items]
    assert [row[0] for row in text.loglikelihoods] == pytest.approx(wanted, abs=2e-3)
    assert text.bytes == ((9,),) * 4


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
        ("[]", "holds no JSON object"),
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


def test_dense_scores_are_kept_by_model_suite_and_dtype(suite, tiny, tiny_folder, monkeypatch):
    runs = []
    real = module._run

    def counted(model, chosen, *rest):
        runs.append(chosen.hash)
        return real(model, chosen, *rest)

    monkeypatch.setattr(module, "_run", counted)
    first = evaluate(tiny, suite, cache=True)
    assert evaluate(tiny, suite, cache=True) == first
    assert len(runs) == 1
    evaluate(tiny, suite, limit=2, cache=True)
    evaluate(open_model(str(tiny_folder), dtype="bfloat16", device="cpu"), suite, cache=True)
    evaluate(tiny, suite)  # not asked for
    assert len(runs) == 4
    kept = module._cache_file(tiny, suite, 2048)
    kept.write_text("{", encoding="utf-8")  # a damaged one is made again
    assert evaluate(tiny, suite, cache=True).tasks == first.tasks
    assert len(runs) == 5
    assert json.loads(kept.read_text(encoding="utf-8"))["kind"] == "capability scores"


def scored(suite):
    task = TaskScores("a", "general", "acc", "accuracy", 0.0, ("1", "2"), (1.0, 1.0))
    return CapabilityScores("m", "f", "float32", describe(suite), (task,))


def test_different_suites_versions_and_selections_are_not_compared():
    suite = parse_suite(suite_text(), "suite")
    for old, new in (("version: 1", "version: 2"), ("name: made", "name: other")):
        other = parse_suite(suite_text().replace(old, new), "suite")
        with pytest.raises(InputError, match=r"different suites or versions .* version"):
            scored(suite).retention(scored(other))
    with pytest.raises(InputError, match=r"different selections \(--quick"):
        scored(suite).retention(scored(suite.quick()))
    assert scored(suite).retention(scored(suite), measure="ratio").total.value == 1.0


def test_code_runs_only_if_allowed(tiny):
    code = load_suite("paper").only(dimensions=["code"])
    with pytest.raises(InputError, match=r"task humaneval, mbpp .* --allow-code-execution"):
        evaluate(tiny, code)


def test_no_suite_needs_the_harness_until_it_is_scored():
    code = (
        "import sys, calmix.cli, calmix.evaluation.suites as s; s.load_suite('offline');"
        "print([m for m in ('lm_eval', 'datasets', 'transformers.models') if m in sys.modules]);"
        "import calmix.evaluation.evaluate, calmix.evaluation.scorer, calmix.evaluation.generations"
        "; print('lm_eval' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "False"]


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
    from calmix.evaluation import abilities

    tried = []
    real = abilities.failure

    def kept(source, **options):
        tried.append(source)
        return real(source, **options)

    monkeypatch.setattr(abilities, "failure", kept)
    name = "builtin:smollm2-135m" if builtin else str(tiny_folder)
    if not builtin:  # whose answers never end
        written = [greedy.Answer("    return True", 4, True)]
        monkeypatch.setattr(abilities, "answers", lambda *_, **__: written)
    suite = load_suite("paper").limited(1).only(tasks=["humaneval"])
    scores = evaluate(open_model(name), suite, allow_code_execution=True)
    assert scores.tasks[0].items == ("humaneval/0",)
    assert set(scores.tasks[0].values) <= {0.0, 1.0}
    assert any("check(" in source for source in tried)
