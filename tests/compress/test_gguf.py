"""From a model to a GGUF file: the file is what is scored, and its origin is recorded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from calmix.compression import card
from calmix.compression.card import read_card
from calmix.compression.plan import recoveries
from calmix.compression.results import read_compressed
from calmix.compression.run_stages import stages
from calmix.deploy import gguf, speed
from calmix.errors import ModelError
from calmix.manifest import MANIFEST
from calmix.models.opening import open_model
from calmix.progress import Progress
from calmix.pruning.solvers.ggml_types import TYPES
from calmix.pruning.solvers.grids import read_blocks
from tests.compress.conftest import arguments, build, damage, finish, interrupts, names, pages, read
from tests.pruning.test_imatrix import save_gguf, vectors
from tests.tiny import save_tiny_model, tiny_gguf

STAGES = ["calibrate", "prune", "export", "evaluate", "report"]
MADE = "calibration card.html compress-run.json compress.json model.gguf model.gguf.json"
FILES = f"Modelfile README.md {MADE} recipe.yaml scores.json"


@pytest.fixture(scope="session")
def file(place):
    """A tiny model as a GGUF file."""
    return tiny_gguf(place / "tiny.gguf")


@pytest.fixture(scope="session")
def words(options, file):
    """Return a function that makes the arguments of a compression to a file."""
    return lambda output, *more, model=file: arguments(options, model, output, *more)


@pytest.fixture(scope="session")
def planned(asked, options, file):
    """Return a function that checks the same options in Python."""
    return lambda **more: asked(**options | {"model": str(file), "product": None} | more)


@pytest.fixture(scope="session")
def compressed(place, words):
    """A finished compression, which tests must not change."""
    finish(place, words(place / "whole"))
    return place / "whole"


def test_an_interrupt_after_any_stage_resumes_to_the_same_file(calmix, words, compressed, tmp_path):
    out, file = tmp_path / "out", tmp_path / "out" / "model.gguf"
    for done, ended in enumerate(interrupts(calmix, words(out), len(STAGES))):
        assert (ended.code, (out / "quantised").exists()) == (130, done == 2)
    ended = calmix(*words(out)).ok()
    assert ended.err.count("already done") == len(STAGES) - 1
    assert names(out) == FILES
    assert file.read_bytes() == (compressed / "model.gguf").read_bytes()
    assert [one.split()[1] for one in read_compressed(out)["commands"].values()] == STAGES
    scored = read(out / "scores.json")["model"]  # what is scored is the file
    assert (scored["name"], scored["sha256"]) == (str(file), open_model(file).fingerprint)
    named = [line.split(": ")[0] for line in ended.out.splitlines()[1:]]
    assert named == ["size", "speed", "types", "run", "run", "card", "next"]
    assert f"run: llama-cli -m {file}" in ended.out
    made = read_card(out)
    assert (made.title, made.size) == ("tiny.gguf quantised to Q4_K_M", file.stat().st_size)
    assert made.substitutes == 15  # its rows have 32 and 64 weights
    assert 5 < made.bits < 7
    run = f"llama-cli -m {file}", "pip install llama-cpp-py-sync"
    for text in pages(out):
        assert all(part in text for part in (*run, f"{made.bits:.2f} bits per weight")), text
    inspected = json.loads(calmix("doctor", "inspect", out, "--json").ok().out)
    assert inspected["facts"]["model.gguf"] == "GGUF file"
    assert "left to do" not in inspected["facts"]
    assert len(inspected["layers"]) == 14


def test_a_card_says_that_the_model_was_a_gguf_file(compressed, file, tmp_path):
    blob = shutil.copy(file, tmp_path / "sha256-2a")  # as Ollama stores it
    card = read_card(compressed)
    for model, decoded in ((file, True), (blob, True), ("builtin:a", True), (tmp_path, False)):
        made = replace(card, request={**card.request, "model": str(model)})
        assert ("decoded from a GGUF file" in made.source_types) == decoded


def test_a_file_that_was_changed_or_moved(calmix, words, out):
    calmix("report", out).ok()
    assert calmix(*words(out)).ok().err.count("already done") == len(STAGES) - 1
    assert calmix("check", out, "--keep-at-least", "0.05").code in (0, 1, 2)
    before = (out / "model.gguf").read_bytes()
    damage(out / "model.gguf")
    for command in (("report", out), words(out), ("doctor", "inspect", out)):
        assert "model.gguf is damaged or changed" in calmix(*command).line
    (out / "model.gguf").unlink()
    ended = calmix(*words(out)).ok()  # made again, from the calibration set that is left
    assert (out / "model.gguf").read_bytes() == before
    assert (ended.err.count("already done"), (out / "quantised").exists()) == (2, False)


def test_impossible_files_are_refused(calmix, words, tmp_path, tiny_folder, file, monkeypatch):
    """Before any work."""
    out = tmp_path / "out"
    monkeypatch.setattr(gguf.shutil, "which", lambda name: None)
    save_tiny_model(tmp_path / "mixture", "mixtral")
    save_tiny_model(tmp_path / "qwen", "qwen3")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:3000])
    far = "bits per weight are out of reach: GGUF files of this"
    for model, more, said in (
        (tiny_folder, (), "with --like FILE.gguf; or write safetensors: --for none"),
        (tmp_path / "qwen", ("--like", file), "tiny.gguf is not a file of the model"),
        (tmp_path / "mixture", ("--like", file), "tiny.gguf is not a file of the model"),
        (file, ("--like", tmp_path / "cut.gguf"), "cannot read"),
        (file, ("--like", "no.gguf"), "there is no GGUF file no.gguf"),
        (file, ("--like", tmp_path / "no.gguf"), "no model folder or .gguf file at"),
        (file, ("--type", "Q3_X"), "unknown type 'Q3_X': did you mean IQ3_XS"),
        (file, ("--type", "Q3_K_M", "--bits", 4), "--bits has no effect with --type: leave it out"),
        (file, ("--for", "none", "--type", "Q4_0"), "--type has no effect with --for none"),
        (file, ("--for", "gguf", "--sparsity", 0.5), "a GGUF file has no use for zeros"),
        (file, ("--bits", 3), f"3 {far} model have 4."),
        (file, ("--size", "1MB"), "--size 1MB: "),
        (file, ("--size", "1kB"), f"--size 1kB: 0 {far}"),
        (file, ("--bits", 1), "--bits 1: below 2 bits per weight"),
    ):
        assert said in calmix(*words(out, *more, model=model)).line
        assert not out.exists()


CONVERTER = """
import pathlib, shutil, sys
folder, _, file, *kind = sys.argv[1:]
assert kind == ["--outtype", "f16"]
if "mixtral" in pathlib.Path(folder, "config.json").read_text():
    sys.exit("loading\\nERROR:hf-to-gguf:Model MixtralForCausalLM is not supported")
shutil.copy({template!r}, file)
"""


def test_folder_is_converted_once(calmix, words, planned, tmp_path, file, compressed, monkeypatch):
    """For its layout, by a process of its own; the file is that of the same model in GGUF."""
    folder = Path(shutil.copytree(open_model(file).folder, tmp_path / "folder"))
    out, script = tmp_path / "out", tmp_path / "convert.py"

    def refused(said, model=folder):
        assert said in calmix(*words(out, model=model)).line

    monkeypatch.setenv("CALMIX_CONVERTER", str(script))
    refused("cannot convert")
    script.write_text(CONVERTER.format(template=str(file)))
    mixture = save_tiny_model(tmp_path / "mixture", "mixtral")
    said = "mixture: ERROR:hf-to-gguf:Model MixtralForCausalLM is not supported; or"
    refused(said, mixture)
    (folder / "modeling.py").write_text("")
    refused("which the converter would run")
    (folder / "modeling.py").unlink()
    monkeypatch.setenv("CALMIX_CONVERTER", str(tmp_path / "none"))
    refused("CALMIX_CONVERTER")
    assert not out.exists()
    monkeypatch.setenv("CALMIX_CONVERTER", str(script))
    for stage in stages(planned(model=str(folder)), out)[:3]:
        stage.run(Progress())
        script.unlink(missing_ok=True)
    assert (out / "model.gguf").read_bytes() == (compressed / "model.gguf").read_bytes()


def test_bits_and_sizes_choose_types_by_matrix(calmix, words, planned, tmp_path):
    """A file of the size that was asked for."""
    out = tmp_path / "out"
    told = calmix(*words(out, "--keep-at-least", "code=0.3", "--dry-run")).ok().out
    assert "--bits 6 " in told  # first the middle of those that the model's rows allow
    assert "--bits 3.2" not in told
    request = planned(size="28kB")
    assert request.target == "5.88 bits"
    build(3, request, out)
    assert 0.98 * 28_000 < (out / "model.gguf").stat().st_size <= 28_000


def test_coarse_types_are_recovered_at_effort_best(planned, tmp_path):
    """The levels stay, their scales are trained, and the file holds both."""
    out = tmp_path / "out"
    for kind, effort, wanted in (
        ({"type": "Q3_K_M"}, "best", ("distill",)),
        ({}, "best", ()),
        ({"type": "Q2_K"}, "standard", ()),
    ):
        assert recoveries(planned(**kind, effort=effort)) == wanted
    request = planned(type="Q2_K", effort="best").model_copy(update={"rows": 16})
    build(4, request, out)
    state = open_model(out / "model.gguf").model.state_dict()
    before, after = (read_blocks(out / name) for name in ("pruned", "quantised"))
    assert before.keys() == after.keys()
    assert read(out / "quantised" / MANIFEST)["recovery"]["method"] == "distill"
    for name, one in after.items():
        assert torch.equal(state[name], one.values().bfloat16())
        kind = TYPES[one.name]
        rows = (blocks.data.numpy().reshape(-1, kind.bytes) for blocks in (before[name], one))
        np.testing.assert_array_equal(*(np.delete(row, np.r_[kind.steps], 1) for row in rows))


def test_an_importance_matrix_takes_the_place_of_text(calmix, options, file, tmp_path):
    """It is rounded as llama.cpp does; nothing is drawn, and the card says what is not known."""
    matrix, out = tmp_path / "one.gguf", tmp_path / "out"
    save_gguf(matrix, vectors(open_model(file).model))
    words = ("compress", file, "-o", out, "--suite", options["suite"], "--effort", "quick")
    words += ("--imatrix", matrix, "--type", "Q4_0")
    idle = ("--bits=4", "--calibration=stories", "--size=1MB", "--no-corpus", "--keep-at-least=0.9")
    for more in idle:
        line = calmix(*words, *more.split("=")).line
        assert f"{more.split('=')[0]} has no effect with --imatrix: leave it out" in line
    assert "--type has no effect with --for vllm" in calmix(*words, "--for", "vllm").line
    other = save_gguf(tmp_path / "other.gguf", {"blk.0.attn_q.weight": np.ones(32, np.float32)})
    assert "rename it without a comma" in calmix(*words, "--imatrix", f"{matrix},b").line
    assert "is of another model" in calmix(*words, "--imatrix", other).line
    assert not out.exists()
    assert "calibrat" not in calmix(*words, "--dry-run").ok().out
    assert "--method llama,type=Q4_0" in calmix(*words).ok().err
    assert names(out) == FILES.replace("calibration ", "")
    assert f"The text of the importance matrix {matrix} is not known." in pages(out)[0]
    assert calmix(*words).ok().err.count("already done") == 3
    calmix("doctor", "inspect", out).ok()
    matrix.write_bytes(other.read_bytes())
    assert "imatrix_sha256" in calmix(*words).line or "another model" in calmix(*words).line


def test_the_speed_is_measured_where_llama_cpp_is_installed(calmix, out, monkeypatch):
    speeds = {"prompt": 400.0, "writing": 70.0, "memory": 3e8}
    both = {"threads": 2, "llama.cpp": speeds, "transformers": speeds | {"writing": 30.0}}
    measure = Mock(side_effect=[ModelError("it does not run"), both])  # once is enough
    monkeypatch.setattr(card, "engine", lambda: True)
    monkeypatch.setattr(card, "measure", measure)
    assert "speed was not measured: it does not run" in calmix("report", out).ok().err
    calmix("report", out).ok()
    page, readme = pages(out)
    said = "the file in llama.cpp: prompt 400 tokens/s, writing 70, 300 MB of memory; dense in "
    assert said in readme
    assert "70 tokens/s" in page
    assert "not measured" not in calmix("report", out).ok().err
    calmix("doctor", "inspect", out).ok()
    assert measure.call_count == 2


STUB = """
class Llama:
    def __init__(self, path, **options): assert path == "x.gguf"
    n_vocab = 300
    def _clear_context_state(self): pass
    def _eval_tokens(self, ids, before): assert max(ids) < 300
"""


def test_a_binding_of_llama_cpp_is_timed_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / f"{speed.BINDING}.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert speed.engine()
    assert min(speed._measured(speed.BINDING, "x.gguf").values()) > 0
    with pytest.raises(ModelError, match=r"y\.gguf does not run in llama_cpp_py_sync: Assert"):
        speed._measured(speed.BINDING, "y.gguf")
