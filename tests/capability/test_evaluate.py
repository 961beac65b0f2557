"""Evaluating: scores with every item, the dense cache, refused comparisons, code if allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import calmix as package
from calmix.capability import evaluate as module
from calmix.capability.evaluate import CapabilityScores, evaluate, load_scores
from calmix.capability.retention import TaskScores
from calmix.capability.suites import Suite, load_suite, parse_suite
from calmix.capability.tasks import load_items
from calmix.errors import InputError
from calmix.models import OpenModel, open_model
from tests.capability.archive import suite_text, use_archive
from tests.capability.helpers import reference, request


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Suite:
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    use_archive(monkeypatch)
    return parse_suite(suite_text(), "suite")


@pytest.fixture
def tiny(tiny_folder: Path) -> OpenModel:
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


def test_scores_are_those_of_the_plain_model(suite: Suite, tiny: OpenModel) -> None:
    scores = evaluate(tiny, suite)
    assert [(t.name, t.dimension, t.kind) for t in scores.tasks] == [
        ("quiz", "general", "accuracy"),
        ("which", "general", "accuracy"),
        ("text", "code", "bits_per_byte"),
    ]
    quiz, which, text = scores.tasks
    assert quiz.items == tuple(f"quiz/{n}" for n in range(10))
    assert which.items == ("which/0", "which/2", "which/4")
    assert (quiz.chance, which.chance, text.chance) == (pytest.approx(1 / 3), 0.5, 0.0)
    items = load_items(suite.tasks["quiz"])
    for item, value in zip(items, quiz.values, strict=True):
        asked = [request(item.contexts[0], choice) for choice in item.choices]
        # acc_norm divides by the characters of a choice without the space before it.
        norms = [
            v / (len(r.args[1]) - 1)
            for (v, _), r in zip(reference(tiny, asked), asked, strict=True)
        ]
        assert value == float(norms.index(max(norms)) == item.gold)
    items = load_items(suite.tasks["text"])
    wanted = reference(tiny, [request(i.contexts[0], i.choices[0]) for i in items])
    assert list(text.values) == pytest.approx([-v for v, _ in wanted], rel=1e-4)
    assert text.bytes == (9, 9, 9, 9)


def test_against_itself_everything_is_kept(suite: Suite, tiny: OpenModel) -> None:
    scores = evaluate(tiny, suite)
    kept = scores.retention(scores, resamples=50)
    assert kept.raw.value == kept.raw.low == kept.raw.high == 1.0
    assert all(task.corrected.value == 1.0 for task in kept.tasks if task.signal)


def test_quick_limit_and_selection(suite: Suite, tiny: OpenModel) -> None:
    assert len(evaluate(tiny, suite, quick=True).tasks[0].items) == 3
    assert [len(t.items) for t in evaluate(tiny, suite, limit=2).tasks] == [2, 2, 2]
    assert [t.name for t in evaluate(tiny, suite, dimensions=["code"]).tasks] == ["text"]


def test_scores_survive_the_disk(suite: Suite, tiny: OpenModel, tmp_path: Path) -> None:
    scores = evaluate(tiny, suite, limit=2)
    scores.save(tmp_path / "scores.json")
    assert load_scores(tmp_path / "scores.json") == scores


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no JSON file"),
        ("[]", "holds no scores"),
        ('{"kind": "other"}', "holds no scores"),
        ('{"kind": "capability scores", "format": 99}', "in format 99, not 1"),
        ('{"kind": "capability scores", "format": 1}', "is damaged"),
        ('{"kind": "capability scores", "format": 1, "tasks": [{"name": "a"}]}', "is damaged"),
    ],
)
def test_files_that_are_no_scores(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        load_scores(path)
    with pytest.raises(InputError, match="there is no file"):
        load_scores(tmp_path / "none.json")


def test_dense_scores_are_kept_by_model_suite_and_dtype(
    suite: Suite, tiny: OpenModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    real = module._run

    def counted(model: OpenModel, chosen: Suite, *rest: Any) -> CapabilityScores:
        runs.append(chosen.hash)
        return real(model, chosen, *rest)

    monkeypatch.setattr(module, "_run", counted)
    first = evaluate(tiny, suite, cache=True)
    assert evaluate(tiny, suite, cache=True) == first
    assert len(runs) == 1
    evaluate(tiny, suite, limit=2, cache=True)
    assert len(runs) == 2
    evaluate(open_model(str(tiny_folder), dtype="bfloat16", device="cpu"), suite, cache=True)
    assert len(runs) == 3
    evaluate(tiny, suite)  # not asked for
    assert len(runs) == 4
    kept = module._cache_file(tiny, suite, module.BATCH_TOKENS)
    kept.write_text("{", encoding="utf-8")  # a damaged one is made again
    assert evaluate(tiny, suite, cache=True).tasks == first.tasks
    assert len(runs) == 5
    assert json.loads(kept.read_text(encoding="utf-8"))["kind"] == "capability scores"


def scored(suite: Suite, **changes: Any) -> CapabilityScores:
    task = TaskScores("a", "general", "acc", "accuracy", 0.0, ("1", "2"), (1.0, 0.0))
    fields = {"model": "m", "fingerprint": "f", "dtype": "float32", "tasks": (task,)}
    return CapabilityScores(**{**fields, "suite": module.describe(suite), **changes})


def test_different_suites_versions_and_selections_are_not_compared() -> None:
    suite = parse_suite(suite_text(), "suite")
    newer = parse_suite(suite_text().replace("version: 1", "version: 2"), "suite")
    other = parse_suite(suite_text().replace("name: made", "name: other"), "suite")
    for against in (newer, other):
        with pytest.raises(InputError, match=r"different suites or versions .* version"):
            scored(suite).retention(scored(against))
    with pytest.raises(InputError, match=r"different selections \(--quick"):
        scored(suite).retention(scored(suite.quick()))
    assert scored(suite).retention(scored(suite), resamples=10).raw.value == 1.0


def test_code_runs_only_if_allowed(tiny: OpenModel) -> None:
    with pytest.raises(InputError, match=r"task humaneval, mbpp .* --allow-code-execution"):
        evaluate(tiny, "programs")
    with pytest.raises(InputError, match="humaneval, mbpp runs code"):
        evaluate(tiny, "paper")


def test_the_public_name() -> None:
    assert package.evaluate is evaluate
    assert package.CapabilityScores is CapabilityScores
    with pytest.raises(AttributeError):
        package.nothing  # noqa: B018


def test_starting_the_command_line_imports_neither_harness_nor_model_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, calmix.cli, calmix.capability.suites as s; s.load_suite('offline');"
        "print([m for m in ('lm_eval', 'datasets', 'transformers.models') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.real
def test_the_builtin_model_on_the_smoke_suite() -> None:
    scores = evaluate("builtin:smollm2-135m", "smoke")
    assert len(scores.tasks) == 4
    assert scores.retention(scores).raw.value == 1.0
    text = next(task for task in scores.tasks if task.name == "mbpp")
    assert 0.3 < text.score < 2.0


@pytest.mark.real
def test_programs_are_written_run_and_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    from calmix.capability import execution

    tried: list[str] = []
    real = execution.run_program

    def kept(source: str, **options: Any) -> Any:
        tried.append(source)
        return real(source, **options)

    monkeypatch.setattr(execution, "run_program", kept)
    model = open_model("builtin:smollm2-135m")
    suite = load_suite("programs").limited(2)
    scores = evaluate(model, suite.only(tasks=["humaneval"]), allow_code_execution=True)
    assert scores.tasks[0].items == ("codex_humaneval/0", "codex_humaneval/82")
    assert set(scores.tasks[0].values) <= {0.0, 1.0}
    assert any("check(" in source for source in tried)


def test_a_task_of_the_harness_on_its_own_data(
    suite: Suite, tiny: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [
        {"goal": f"goal {n}", "sol1": f"way {n}", "sol2": "none", "label": n % 2} for n in range(9)
    ]
    made = datasets.Dataset.from_list(rows)
    asked: list[str] = []

    def load(path: str, **_: Any) -> Any:
        asked.append(path)
        return {"train": made, "validation": made, "test": made}

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = suite_text().partition("dimensions:")[0] + (
        "dimensions:\n  general:\n    physical: {harness: piqa, metric: acc_norm, shots: 1,"
        " items: even, limit: 3, chance: choices}\n"
    )
    mine = parse_suite(text, "mine")
    scores = evaluate(tiny, mine)
    assert len(asked) == 1
    assert scores.tasks[0].items == ("piqa/0", "piqa/2", "piqa/6")
    assert scores.tasks[0].chance == 0.5
    assert [item.id for item in mine.items()] == ["piqa/0", "piqa/2", "piqa/6"]
    assert "goal 2" in next(item.text for item in mine.items() if item.id == "piqa/2")
    wrong = parse_suite(text.replace("acc_norm", "exact_match"), "mine")
    with pytest.raises(InputError, match=r"task physical has no metric 'exact_match' \(has: acc"):
        evaluate(tiny, wrong)
