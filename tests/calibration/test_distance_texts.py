"""Texts to measure distance on: the user's own, and that the builtin ones are held out."""

import json
from pathlib import Path

import pytest
import torch

from calmix.calibration import distance_texts as module
from calmix.calibration.distance_texts import builtin_readers, parse_texts, texts
from calmix.calibration.leakage import DISTINCT, WORDS
from calmix.calibration.tokenizer import open_tokenizer
from calmix.errors import InputError, SourceError
from calmix.evaluation.distance import texts_hash
from calmix.sources.local import LocalFile
from calmix.sources.offline import word_runs
from calmix.sources.registry import offline_sources
from tests.evaluation.helpers import opened


@pytest.fixture
def no_archive(monkeypatch):
    monkeypatch.setattr(module, "builtin_readers", dict)


def test_own_texts_fill_rows(tmp_path, no_archive):
    (tmp_path / "a.txt").write_text("abcd" * 150, encoding="utf-8")
    rows = [json.dumps({"text": f"document {n}"}) for n in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    own = parse_texts([f"code={tmp_path}/a.txt", f" law = {tmp_path}/b.jsonl "])
    result = texts(opened(), own, rows=4, length=32)
    assert {name: ids.shape for name, ids in result.items()} == {"code": (4, 32), "law": (4, 32)}
    tokenizer = opened().tokenizer
    assert tokenizer.decode(result["code"].flatten()) == "abcd" * 32
    joined = tokenizer.decode(result["law"].flatten()).split("</s>")
    assert set(joined[:-1]) < {f"document {n}" for n in range(40)}
    assert len(set(joined)) == len(joined)
    assert joined[:3] != ["document 0", "document 1", "document 2"]  # not the first of the file
    assert torch.equal(result["law"], texts(opened(), own, rows=4, length=32)["law"])
    assert texts_hash(result) != texts_hash({**result, "law": result["law"].flip(0)})
    assert texts_hash(result) != texts_hash({"code": result["law"], "law": result["code"]})
    # Rows are no longer than the context, and fewer where the text ends.
    assert texts(opened(), {"x": tmp_path / "a.txt"}, length=1000)["x"].shape == (2, 256)


def test_invalid_texts(tmp_path, no_archive, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.doc"):
        Path(name).write_text("x" * 20, encoding="utf-8")
    for value, line in (
        (["code"], "--text: 'code' is not of the form NAME=PATH, such as code=mine.jsonl"),
        (["code=a.txt", "code=a.txt"], "--text gives code twice"),
        (["code=nowhere.txt"], "--text code: there is no file nowhere.txt"),
        (["code=a.txt"], "the text code has 20 tokens, fewer than a row of 32"),
        (["code=a.doc"], r"--text code: cannot read a\.doc: supported endings"),
        ([], "no builtin text for law: give --text"),
    ):
        with pytest.raises((InputError, SourceError), match=line):
            texts(opened(), parse_texts(value), dimensions=["law"], length=32)


def runs(documents):
    """Hashes of every run of words that would count for the leakage guard."""
    return {
        hash(run)
        for document in documents
        for run in word_runs(document.text, WORDS)
        if len(set(run)) >= DISTINCT * WORDS
    }


@pytest.mark.real
@pytest.mark.long
def test_builtin_texts_overlap_no_source_and_fill_eight_rows():
    """No document of any offline source shares thirteen words or is the same."""
    documents = [d for readers in builtin_readers().values() for r in readers for d in r.read()]
    stored = runs(documents)
    assert len(documents) > 8000
    assert len(stored) > 100_000
    for name, source in offline_sources().items():
        assert stored.isdisjoint(runs(source.documents())), name
    lambada = builtin_readers()["general"][1]
    odd = runs(lambada.model_copy(update={"items": "odd"}).read())  # the check can fail
    assert odd & runs(offline_sources()["books"].documents())
    rows = texts(open_tokenizer("builtin:smollm2-135m"))
    assert list(rows) == ["general", "commonsense", "code", "math"]
    assert {ids.shape for ids in rows.values()} == {(8, 256)}
    assert len({tuple(row) for ids in rows.values() for row in ids.tolist()}) == 32


def test_own_text_replaces_builtin_text(tmp_path, monkeypatch):
    (tmp_path / "built.txt").write_text("b" * 600, encoding="utf-8")
    (tmp_path / "own.txt").write_text("o" * 600, encoding="utf-8")
    reader = LocalFile(type="file", path=tmp_path / "built.txt")
    monkeypatch.setattr(module, "builtin_readers", lambda: {"code": [reader], "math": [reader] * 3})
    rows = texts(opened(), {"code": tmp_path / "own.txt"}, rows=2, length=16)
    decoded = {name: opened().tokenizer.decode(ids.flatten()) for name, ids in rows.items()}
    assert decoded == {"code": "o" * 32, "math": "b" * 32}  # of three readers two have a row
    ((name, ids),) = texts(opened(), rows=2, length=16, dimensions=["math"]).items()
    assert (name, ids.tolist()) == ("math", rows["math"].tolist())
