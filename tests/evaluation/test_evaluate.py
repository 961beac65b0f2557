"""Evaluating: scores with every item, the dense cache, refused comparisons, and the verbs."""

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, replace

import pytest

from calmix.errors import PassingError
from calmix.evaluation.evaluate import ask, evaluate
from calmix.evaluation.journal import Journal
from calmix.evaluation.prompts import Ask
from calmix.evaluation.scorer import Scorer
from calmix.evaluation.scores import load_scores, write_scores
from calmix.evaluation.suites import load_suite
from calmix.evaluation.tasks import load_items
from calmix.models.opening import open_model
from tests.evaluation.archive import suite_text, use_archive
from tests.evaluation.helpers import lacks, opened, reference, refuses
from tests.tiny import save_tiny_model


@pytest.fixture
def suite_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")  # in a pipe, tables have their full width
    use_archive(monkeypatch)
    (path := tmp_path / "made.yaml").write_text(suite_text(), encoding="utf-8")
    return path


@pytest.fixture
def suite(suite_file):
    return load_suite(suite_file)


@pytest.fixture
def tiny(tiny_folder):
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


def test_scores_match_the_plain_model(suite, tiny):
    scores = evaluate(tiny, suite)
    quiz, which, text = scores.tasks
    told = [(t.name, t.dimension, t.primary, bool(t.baselines)) for t in scores.tasks]
    assert told[:2] == [
        ("quiz", "general", "smoothed", True),
        ("which", "general", "accuracy", False),
    ]
    assert told[2:] == [("text", "code", "bits", True)]
    assert (quiz.chance, which.chance, text.chance) == (pytest.approx(1 / 3), 0.5, 0.0)
    assert [bool(task.values) for task in scores.tasks] == [True, True, False]
    for task in scores.tasks:
        items = load_items(suite.tasks[task.name])
        assert [*zip(task.items, task.gold, strict=True)] == [(i.id, i.gold) for i in items]
        for number, item in enumerate(items):
            wanted = reference(tiny, item.requests)
            assert task.loglikelihoods[number] == pytest.approx(wanted, abs=2e-3)
            assert task.bytes[number] == tuple(len(answer) for _, answer in item.requests)
            if task.baselines:
                alone = reference(tiny, [("Answer:", answer) for _, answer in item.requests])
                assert task.baselines[number] == pytest.approx(alone, abs=2e-3)
            if task.name == "quiz":  # acc_norm: characters without the leading space
                sizes = [len(answer) - 1 for _, answer in item.requests]
                wanted = [value / size for value, size in zip(wanted, sizes, strict=True)]
            if task.values:
                assert task.values[number] == float(wanted.index(max(wanted)) == item.gold)
    asked = [item.requests[0] for item in load_items(suite.tasks["text"])]  # a unigram code
    ids = [[tiny.tokenizer(part)["input_ids"] for part in both] for both in asked]
    counts = Counter(token for both in ids for row in both for token in row)
    wanted = [sum(math.log(counts[one] / counts.total()) for one in answer) for _, answer in ids]
    assert text.unigram == pytest.approx(wanted, abs=1e-3)
    # The code is fitted to the whole archive: a limit does not change it.
    assert evaluate(tiny, suite, tasks=["text"], limit=2).tasks[0].unigram == text.unigram[::2]


def test_score_files(suite, tiny, tmp_path):
    assert len(evaluate(tiny, suite, quick=True).tasks[0].items) == 3
    scores, path = evaluate(tiny, suite, limit=2), tmp_path / "scores.json"
    assert [len(task.items) for task in scores.tasks] == [2, 2, 2]
    scores.save(path)
    assert load_scores(path) == scores
    held = path.read_bytes()
    evaluate(tiny, suite, limit=2).save(path)
    assert path.read_bytes() == held  # timings are not in it
    quiz, told = scores.tasks[0], scores.to_dict()
    parts = ("values", "gold", "loglikelihoods", "bytes", "baselines", "unigram")
    short = [asdict(quiz) | {part: getattr(quiz, part)[:1]} for part in parts]
    broken = replace(quiz, gold=(0, 3)), replace(quiz, loglikelihoods=())
    for change, says in (
        *(({"tasks": [one]}, "task quiz has parts of different lengths") for one in short),
        *(({"tasks": [one]}, "is damaged") for one in (*map(asdict, broken), {"name": "a"})),
        *(({"suite": one}, "does not name its suite") for one in ({}, {"name": "a", "hash": "b"})),
        ({"kind": "other"}, "is not a file of scores"),
        ({"format": 1}, "in format 1, not 2"),
    ):
        path.write_text(json.dumps(told | change), encoding="utf-8")
        refuses(says, load_scores, path)


def test_model_changed_during_scoring_is_refused(suite, tiny_folder, tmp_path):
    opened = open_model(str(shutil.copytree(tiny_folder, tmp_path / "model")))
    how = {"progress": lambda *_: (tmp_path / "model/config.json").write_text("{}", "utf-8")}
    says = "changed while they were read"
    refuses(says, evaluate, opened, suite, limit=2, error=PassingError, **how)


def test_dense_scores_are_cached(suite, tiny, tiny_folder, tmp_path, monkeypatch):
    folder, first = tmp_path / "cache/scores", evaluate(tiny, suite, cache=True)
    (kept,) = folder.iterdir()
    held, again = kept.read_bytes(), evaluate(tiny, suite, cache=True)
    assert (again, again.seconds) == (first, 0.0)  # read, not scored again
    evaluate(tiny, suite, limit=2, cache=True)
    evaluate(open_model(str(tiny_folder), dtype="bfloat16", device="cpu"), suite, cache=True)
    assert len([*folder.iterdir()]) == 3
    kept.write_text("{", encoding="utf-8")  # a damaged file is replaced
    assert evaluate(tiny, suite, cache=True).tasks == first.tasks
    assert len(kept.read_bytes()) == pytest.approx(len(held), abs=20)
    # A model folder, or a suite with the same tasks, may have another name by then.
    first = evaluate(tiny, suite, cache=True)
    tiny.name, renamed = "moved", suite.model_copy(update={"name": "ours"})
    again = evaluate(tiny, renamed, cache=True)
    assert (again.model, again.suite["name"], again.seconds) == ("moved", "ours", 0.0)
    assert first.retention(again, resamples=1).measure == "primary"
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "file" / "cache"))
    assert evaluate(tiny, suite, limit=1, cache=True).tasks


def test_retention_against_model_or_file(calmix, tiny_folder, suite_file, tmp_path):
    arguments = ("evaluate", tiny_folder, "--suite", suite_file)
    path, both = tmp_path / "out/dense.json", tmp_path / "both.json"
    assert not lacks(calmix(*arguments, "-o", path).ok().out, "quiz", "which", "scored by")
    value = json.loads(path.read_text(encoding="utf-8"))
    assert (len(value["scores"]["tasks"][0]["values"]), "retention" in value) == (10, False)
    ended = calmix(*arguments, "--against", tiny_folder, "-o", both).ok()
    assert "100.0 [100.0, 100.0]" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    value = json.loads(calmix(*arguments, "--against", tiny_folder, "--json").out)  # dense: cached
    whole = {"value": 1.0, "low": 1.0, "high": 1.0}
    assert [d["kept"] for d in value["retention"]["dimensions"] if d["kept"]["value"]] == [whole]
    assert value["scores"]["suite"] == value["dense"]["suite"]
    assert calmix(*arguments, "--against", path).code == 0
    assert "different selections" in calmix(*arguments, "--against", path, "--quick").line
    rescore = ("evaluate", "rescore")
    for measure, tasks in (("primary", ["quiz", "which", "text"]), ("accuracy", ["quiz", "which"])):
        by = ("--measure", measure)
        assert f"by {measure}" in calmix(*rescore, both, *by).ok().out
        rows = json.loads(calmix(*rescore, path, *by, "--json").out)
        assert [row["task"] for row in rows] == tasks
    assert calmix(*rescore, both, "--against", path).code == 0


def test_distance_on_own_text(calmix, tiny_folder, suite_file, text_file, tmp_path):
    other, out = save_tiny_model(tmp_path / "other", seed=1), tmp_path / "scores.json"
    arguments = ("evaluate", other, "--suite", suite_file, "--text", f"mine={text_file}")
    ended = calmix(*arguments, "--against", tiny_folder, "-o", out).ok()
    assert not lacks(ended.out, "KL(dense || pruned)", "flips %")
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "KL to dense" in calmix("compare", out).out  # the dense scores are in the file
    made, dense = json.loads(out.read_text(encoding="utf-8")), tmp_path / "dense.json"
    assert made["scores"]["distance"]["dimensions"]["mine"]["kl_mean"] > 0
    write_scores(dense, made["dense"])
    for against in ((), ("--against", dense)):
        assert "name it with --against" in calmix(*arguments, *against).line
    both = f"{out} holds scores of {other} beside those of {tiny_folder}: name a file"
    assert both in calmix("evaluate", other, "--suite", suite_file, "--against", out).line


@pytest.mark.parametrize(("kind", "cut"), [("llama", {"q": 1}), ("bloom", {})])
def test_prompt_truncation_is_reported(monkeypatch, kind, cut):
    """Bloom states no context: its prompts are read in full."""
    monkeypatch.setattr("calmix.evaluation.evaluate.answers", lambda *_, **__: [("x", True)])
    scorer, item = Scorer(opened(kind)), Ask("q/0", 0, None, "a" * 3000, ["x"], {}, "text", 8, ())
    found = ask(scorer, [("q", item)], False, Journal(None))
    assert (found, scorer.truncated) == ([("x", True)], cut)
