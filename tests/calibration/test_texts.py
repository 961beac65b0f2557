"""Texts to measure distance on: the user's own, and that the builtin ones are held out."""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from calmix.calibration import open_tokenizer
from calmix.calibration import texts as module
from calmix.calibration.leakage import DISTINCT, TOKENS, window_hashes
from calmix.calibration.texts import builtin_readers, parse_texts, texts
from calmix.errors import InputError, SourceError
from calmix.evaluation.distance import texts_hash
from calmix.sources import offline_sources
from calmix.sources.readers import LocalFile
from tests.evaluation.helpers import opened


@pytest.fixture
def no_archive(monkeypatch):
    monkeypatch.setattr(module, "builtin_readers", dict)


def test_own_texts_become_full_rows(tmp_path, no_archive):
    (tmp_path / "a.txt").write_text("abcd" * 100, encoding="utf-8")
    rows = [json.dumps({"text": f"document {n}"}) for n in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    own = parse_texts([f"code={tmp_path}/a.txt", f" law = {tmp_path}/b.jsonl "])
    found = texts(opened(), own, rows=4, length=32)
    assert {name: ids.shape for name, ids in found.items()} == {"code": (4, 32), "law": (4, 32)}
    tokenizer = opened().tokenizer
    assert tokenizer.decode(found["code"].flatten()) == "abcd" * 32
    joined = tokenizer.decode(found["law"].flatten()).split("</s>")
    assert set(joined[:-1]) < {f"document {n}" for n in range(40)}
    assert len(set(joined)) == len(joined)
    assert joined[:3] != ["document 0", "document 1", "document 2"]  # not the first of the file
    assert torch.equal(found["law"], texts(opened(), own, rows=4, length=32)["law"])
    assert texts_hash(found) != texts_hash({**found, "law": found["law"].flip(0)})
    assert texts_hash(found) != texts_hash({"code": found["law"], "law": found["code"]})


def test_rows_are_no_longer_than_the_context_and_fewer_where_the_text_ends(tmp_path, no_archive):
    (tmp_path / "a.txt").write_text("x" * 600, encoding="utf-8")
    assert texts(opened(), {"x": tmp_path / "a.txt"}, length=1000)["x"].shape == (2, 256)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["code"], "--text: 'code' is not of the form NAME=PATH, such as code=mine.jsonl"),
        (["=x.txt"], "--text: '=x.txt' is not of the form NAME=PATH"),
        (["code=here.txt", "code=here.txt"], "--text gives code twice"),
        (["code=nowhere.txt"], "--text code: there is no file nowhere.txt"),
    ],
)
def test_mistakes_in_naming_a_text(given, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=line):
        parse_texts(given)


def test_mistakes_in_a_text(tmp_path, no_archive):
    (tmp_path / "a.txt").write_text("x" * 20, encoding="utf-8")
    (tmp_path / "a.doc").write_text("x" * 20, encoding="utf-8")
    with pytest.raises(InputError, match=r"the text code has 20 tokens, less than one row of 32"):
        texts(opened(), {"code": tmp_path / "a.txt"}, length=32)
    with pytest.raises(SourceError, match=r"cannot read .*a\.doc: known endings"):
        texts(opened(), {"code": tmp_path / "a.doc"})
    with pytest.raises(InputError, match="no builtin text is of law: give --text"):
        texts(opened(), dimensions=["law"])
    with pytest.raises(InputError, match="not 0 of 256"):
        texts(opened(), rows=0)


class Runs:
    """Every run of thirteen words of some documents; words are numbered in `known`."""

    def __init__(self, documents, known):
        texts = [document.text.lower().split() for document in documents]
        self.words = [word for text in texts for word in text]
        ids = np.array([known.setdefault(word, len(known)) for word in self.words], np.int64)
        owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        hashes = window_hashes(ids, TOKENS)
        self.at = np.flatnonzero(owner[: len(hashes)] == owner[-len(hashes) :])
        self.hashes = hashes[self.at]

    @cached_property
    def sorted(self):
        """The runs' hashes, each once."""
        return np.unique(self.hashes)

    def shared(self, other):
        """Return the other's runs that are here too, as they count for the leakage guard: not
        `} } } }`."""
        place = np.minimum(np.searchsorted(self.sorted, other.hashes), len(self.sorted) - 1)
        found = other.at[self.sorted[place] == other.hashes] if len(self.sorted) else ()
        runs = [other.words[at : at + TOKENS] for at in found]
        return [run for run in runs if len(set(run)) >= DISTINCT * TOKENS]


@pytest.mark.real
@pytest.mark.long
def test_no_source_hands_out_what_the_builtin_texts_are_drawn_from():
    """No document of any offline source shares thirteen words or is the same."""
    documents = [d for readers in builtin_readers().values() for r in readers for d in r.read()]
    known = {}
    runs = Runs(documents, known)
    whole = {" ".join(document.text.split()) for document in documents}
    assert len(documents) > 8000
    assert len(runs.sorted) > 100_000
    for name, source in offline_sources().items():
        handed = list(source.documents())
        assert whole.isdisjoint({" ".join(d.text.split()) for d in handed}), name
        assert not runs.shared(Runs(handed, known)), name
    lambada = builtin_readers()["general"][1]
    odd = Runs(lambada.model_copy(update={"items": "odd"}).read(), known)  # the check can fail
    assert odd.shared(Runs(offline_sources()["books"].documents(), known))


@pytest.mark.real
def test_the_builtin_texts_have_eight_rows_a_dimension():
    tokenizer = open_tokenizer("builtin:smollm2-135m")
    found = texts(tokenizer)
    assert list(found) == ["general", "commonsense", "code", "math"]
    assert {ids.shape for ids in found.values()} == {(8, 256)}
    rows = [tuple(row) for ids in found.values() for row in ids.tolist()]
    assert len(set(rows)) == 32
    ((name, ids),) = texts(tokenizer, dimensions=["math"]).items()
    assert name == "math"
    assert torch.equal(ids, found["math"])


def test_an_own_text_stands_in_place_of_the_builtin_one(tmp_path, monkeypatch):
    (tmp_path / "built.txt").write_text("b" * 600, encoding="utf-8")
    (tmp_path / "own.txt").write_text("o" * 600, encoding="utf-8")
    reader = LocalFile(type="file", path=tmp_path / "built.txt")
    monkeypatch.setattr(module, "builtin_readers", lambda: {"code": [reader], "math": [reader] * 3})
    found = texts(opened(), {"code": tmp_path / "own.txt"}, rows=2, length=16)
    decoded = {name: opened().tokenizer.decode(ids.flatten()) for name, ids in found.items()}
    assert decoded == {"code": "o" * 32, "math": "b" * 32}  # of three readers two have a row
