"""Evaluating: scores with every item, the dense cache, refused comparisons, and the verbs."""

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, replace

import pytest

from calmix.errors import InputError, PassingError
from calmix.evaluation.evaluate import ask, evaluate
from calmix.evaluation.journal import Journal
from calmix.evaluation.prompts import Ask
from calmix.evaluation.scorer import Scorer
from calmix.evaluation.scores import load_scores, write_scores
from calmix.evaluation.suites import load_suite
from calmix.evaluation.tasks import load_items
from calmix.models.opening import open_model
from tests.evaluation.archive import suite_text, use_archive
from tests.evaluation.helpers import opened, reference
from tests.tiny import save_tiny_model


@pytest.fixture
def suite_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")  # in a pipe, tables have their full width
    use_archive(monkeypatch)
    path = tmp_path / "made.yaml"
    path.write_text(suite_text(), encoding="utf-8")
    return path


@pytest.fixture
def suite(suite_file):
    return load_suite(suite_file)


@pytest.fixture
def tiny(tiny_folder):
    return open_model(str(tiny_folder), dtype="float32", device="cpu")


def test_scores_match_the_plain_model(suite, tiny):
    scores = evaluate(tiny, suite)
    assert [
        (t.name, t.dimension, t.primary, bool(t.baselines), t.chance) for t in scores.tasks
    ] == [
        ("quiz", "general", "smoothed", True, pytest.approx(1 / 3)),
        ("which", "general", "accuracy", False, 0.5),
        ("text", "code", "bits", True, 0.0),
    ]
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
    assert [bool(task.values) for task in scores.tasks] == [True, True, False]
    text, items = scores.tasks[-1], load_items(suite.tasks["text"])  # a unigram code
    ids = [tiny.tokenizer(t)["input_ids"] for i in items for t in i.requests[0]]
    counts = Counter(token for row in ids for token in row)
    for item, floor in zip(items, text.unigram, strict=True):
        tokens = tiny.tokenizer(item.requests[0][1])["input_ids"]
        wanted = sum(math.log(counts[token] / counts.total()) for token in tokens)
        assert floor == pytest.approx(wanted, abs=1e-3)
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
    for change, says in (
        *(({"tasks": [one]}, "task quiz has parts of different lengths") for one in short),
        ({"tasks": [asdict(replace(quiz, gold=(0, 3)))]}, "is damaged"),
        ({"tasks": [asdict(replace(quiz, loglikelihoods=()))]}, "is damaged"),
        ({"tasks": [{"name": "a"}]}, "is damaged"),
        ({"suite": {}}, "does not name its suite"),
        ({"suite": {"name": "a", "hash": "b"}}, "does not name its suite"),
        ({"kind": "other"}, "is not a file of scores"),
        ({"format": 1}, "in format 1, not 2"),
    ):
        path.write_text(json.dumps(told | change), encoding="utf-8")
        with pytest.raises(InputError, match=says):
            load_scores(path)


def test_model_changed_during_scoring_is_refused(suite, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    opened = open_model(str(folder))

    def change(done, total):
        (folder / "config.json").write_text("{}", encoding="utf-8")

    with pytest.raises(PassingError, match="changed while they were read"):
        evaluate(opened, suite, limit=2, progress=change)


def test_dense_scores_are_cached(suite, tiny, tiny_folder, tmp_path, monkeypatch):
    folder, first = tmp_path / "cache/scores", evaluate(tiny, suite, cache=True)
    (kept,) = folder.iterdir()
    held = kept.read_bytes()
    again = evaluate(tiny, suite, cache=True)
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
    arguments, path = ("evaluate", tiny_folder, "--suite", suite_file), tmp_path / "out/dense.json"
    both = tmp_path / "both.json"
    ended = calmix(*arguments, "-o", path).ok()
    assert all(name in ended.out for name in ("quiz", "which", "scored by"))
    value = json.loads(path.read_text(encoding="utf-8"))
    assert len(value["scores"]["tasks"][0]["values"]) == 10
    assert "retention" not in value
    ended = calmix(*arguments, "--against", tiny_folder, "-o", both).ok()
    assert "100.0 [100.0, 100.0]" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    again = calmix(*arguments, "--against", tiny_folder, "--json")  # dense scores from the cache
    value = json.loads(again.out)
    whole = {"value": 1.0, "low": 1.0, "high": 1.0}
    assert [d["kept"] for d in value["retention"]["dimensions"] if d["kept"]["value"]] == [whole]
    assert value["scores"]["suite"] == value["dense"]["suite"]
    assert calmix(*arguments, "--against", path).code == 0
    other = calmix(*arguments, "--against", path, "--quick")
    assert (other.code, "different selections" in other.line) == (2, True)
    for measure in ("primary", "accuracy"):
        by = ("--measure", measure)
        assert f"by {measure}" in calmix("evaluate", "rescore", both, *by).ok().out
        rows = json.loads(calmix("evaluate", "rescore", path, *by, "--json").out)
        tasks = ["quiz", "which", *([] if measure == "accuracy" else ["text"])]
        assert [row["task"] for row in rows] == tasks
    assert calmix("evaluate", "rescore", both, "--against", path).code == 0


def test_distance_on_own_text(calmix, tiny_folder, suite_file, text_file, tmp_path):
    other, out = save_tiny_model(tmp_path / "other", seed=1), tmp_path / "scores.json"
    arguments = ("evaluate", other, "--suite", suite_file, "--text", f"mine={text_file}")
    ended = calmix(*arguments, "--against", tiny_folder, "-o", out).ok()
    assert "KL(dense || pruned)" in ended.out
    assert "flips %" in ended.out
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
    scorer = Scorer(opened(kind))
    item = Ask("q/0", 0, None, "a" * 3000, ["x"], {}, "text", 8, ())
    assert ask(scorer, [("q", item)], False, Journal(None)) == [("x", True)]
    assert scorer.truncated == cut
