"""A tiny study: three text files, a tiny model, a suite over a made-up archive or the real one."""

import json
import random
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from calmix.calibration.request import calibration_set
from calmix.evaluation.evaluate import evaluate
from calmix.study import bench
from calmix.study.running import run_study
from calmix.study.spec import load_study
from calmix.study.store import open_store, read_results
from tests.evaluation.archive import suite_text, use_archive
from tests.tiny import longer

WORDS = {
    "letters": "alpha beta gamma delta prime",
    "code": "return def if else for x y z ( ) :",
    "sums": "1 2 3 4 + - = x",
}
STUDY = """\
name: tiny
models: {{tiny: {model}}}
suite: {suite}
rows: 6
length: 32
leakage: off
calibrations:
  letters: {texts}/letters.jsonl
  code: {texts}/code.jsonl
  mix: uniform:{texts}/letters.jsonl,{texts}/code.jsonl,{texts}/sums.jsonl
methods: {{sparsegpt: [0.6], wanda: ["2:4"]}}
"""
REAL_SUITE = """\
name: few
version: 1
description: a few items
dimensions:
  general:
    sciq:
      {archive: sciq/rc, form: question, metric: acc_norm, shots: 0, limit: 3, chance: choices}
  programs:
    mbpp: {archive: codex_mbpp/gold_bpb, form: answer, metric: bits_per_byte, shots: 0, limit: 2}
"""


def write_texts(folder):
    """Three files of many short documents."""
    folder.mkdir(exist_ok=True)
    for name, words in WORDS.items():
        rng = random.Random(name)
        texts = [" ".join(rng.choices(words.split(), k=12)) for _ in range(200)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def writer(folder, model, monkeypatch):
    """Return a function that writes a study file, text replaced or added, and gives its path."""
    monkeypatch.setenv("CALMIX_CACHE", str(folder / "cache"))
    use_archive(monkeypatch)
    return writing(folder, model, suite_text())


def writing(folder, model, suite):
    """Return such a function, over a suite."""
    write_texts(folder / "texts")
    (folder / "suite.yaml").write_text(suite, encoding="utf-8")

    def write(*changes, more="", name="study.yaml"):
        text = STUDY.format(model=model, suite=folder / "suite.yaml", texts=folder / "texts")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = folder / name
        path.write_text(text + more, encoding="utf-8")
        return path

    return write


def write_study(folder, model, *, rows=6):
    """Write a study over the real archive, for use in other processes; return its path."""
    write = writing(folder, longer(model, folder / "model"), REAL_SUITE)
    return write(("rows: 6", f"rows: {rows}"), (', wanda: ["2:4"]', ""))


@pytest.fixture
def tiny_study(tmp_path, tiny_folder, monkeypatch):
    """A function that writes a study file, with text replaced or added."""
    return writer(tmp_path, tiny_folder, monkeypatch)


def run(path, store, heard=lambda text: None, **options):
    """Run a study; return the labels of trials run, errors by label, and all messages."""
    notes, shown = [], []
    _, left = run_study(
        load_study(path),
        store,
        note=lambda text: (heard(text), notes.append(text)),
        show=lambda text, share: shown.append(text),
        **options,
    )
    ended = [one[1] for text in notes if (one := re.match(r"\d+/\d+ (.*?): ", text))]
    errors = {label: said for label, (how, said) in left.items() if how == "failed"}
    return SimpleNamespace(notes=notes, shown=shown, ran=ended, errors=errors)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny_folder):
    """A study, what writes others beside it, its store after a run, the trials that ran, and the
    calls that made sets and scores."""
    folder = tmp_path_factory.mktemp("ran")
    sets, scores = Mock(wraps=calibration_set), Mock(wraps=evaluate)
    with pytest.MonkeyPatch.context() as patch:
        write = writer(folder, tiny_folder, patch)
        path, store = write(), folder / "store"
        patch.setattr(bench, "calibration_set", sets)
        patch.setattr(bench, "evaluate", scores)
        labels = run(path, store, only=["mix wanda*"]).ran + run(path, store).ran
        calls = {"sets": sets.mock_calls, "scores": scores.mock_calls}
        yield SimpleNamespace(path=path, store=store, labels=labels, write=write, **calls)


def outcomes(store):
    """What the trials of a store measured, without times."""
    return [one.model_dump(exclude={"seconds"}) for one in read_results(store).trials]


def states(store):
    """The state of every trial of a store, in order."""
    opened_store = open_store(store)
    return [opened_store.state(entry.id) for entry in opened_store.index.trials]
