"""From a model to a GGUF file: the file is what is scored, and its origin is recorded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from calmix.compression import card
from calmix.compression.card import read_card
from calmix.compression.plan import check_request, recoveries
from calmix.compression.results import read_compressed
from calmix.compression.run_stages import stages
from calmix.deploy import gguf, speed
from calmix.errors import ModelError
from calmix.manifest import MANIFEST
from calmix.models.opening import open_model
from calmix.options import Compression
from calmix.progress import Progress
from calmix.pruning.solvers.ggml_types import TYPES
from calmix.pruning.solvers.grids import read_blocks
from tests.compress.conftest import arguments, damage, finish, interrupts, names
from tests.pruning.test_imatrix import save_gguf, vectors
from tests.tiny import save_tiny_model, tiny_gguf

STAGES = ["calibrate", "prune", "export", "evaluate", "report"]
FILES = (
    "Modelfile README.md calibration card.html compress-run.json compress.json model.gguf "
    "model.gguf.json recipe.yaml scores.json"
)


@pytest.fixture(scope="session")
def file(place):
    """A tiny model as a GGUF file."""
    return tiny_gguf(place / "tiny.gguf")


@pytest.fixture(scope="session")
def words(options, file):
    """Return a function that makes the arguments of a compression to a file."""
    return lambda output, *more, model=file: arguments(options, model, output, *more)


@pytest.fixture(scope="session")
def compressed(place, words):
    """A finished compression, which tests must not change."""
    finish(place, words(place / "whole"))
    return place / "whole"


def test_an_interrupt_after_any_stage_resumes_to_the_same_file(calmix, words, compressed, tmp_path):
    out = tmp_path / "out"
    for done, ended in enumerate(interrupts(calmix, words(out), len(STAGES))):
        assert ended.code == 130
        assert (out / "quantised").exists() == (done == 2)
    ended = calmix(*words(out)).ok()
    assert ended.err.count("already done") == len(STAGES) - 1
    assert names(out) == FILES
    assert (out / "model.gguf").read_bytes() == (compressed / "model.gguf").read_bytes()
    record = read_compressed(out)
    assert [one.split()[1] for one in record["commands"].values()] == STAGES
    # What is scored is the file.
    scored = json.loads((out / "scores.json").read_text(encoding="utf-8"))["model"]
    file = out / "model.gguf"
    assert (scored["name"], scored["sha256"]) == (str(file), open_model(file).fingerprint)
    named = [line.split(": ")[0] for line in ended.out.splitlines()[1:]]
    assert named == ["size", "speed", "types", "run", "run", "card", "next"]
    assert f"run: llama-cli -m {out}/model.gguf" in ended.out
    made = read_card(out)
    assert made.title == "tiny.gguf quantised to Q4_K_M"
    assert made.size == (out / "model.gguf").stat().st_size
    assert made.substitutes == 15  # its rows have 32 and 64 weights
    assert 5 < made.bits < 7
    for page in (out / "card.html", out / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert f"llama-cli -m {out}/model.gguf" in text
        assert f"{made.bits:.2f} bits per weight" in text
        assert "pip install llama-cpp-py-sync" in text
    inspected = json.loads(calmix("doctor", "inspect", out, "--json").ok().out)
    assert inspected["facts"]["model.gguf"] == "GGUF file"
    assert "left to do" not in inspected["facts"]
    assert len(inspected["layers"]) == 14


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
    assert ended.err.count("already done") == 2
    assert not (out / "quantised").exists()


def test_what_cannot_be_written_is_refused_before_any_work(
    calmix, words, tmp_path, tiny_folder, file, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(gguf.shutil, "which", lambda name: None)
    save_tiny_model(tmp_path / "mixture", "mixtral")
    save_tiny_model(tmp_path / "qwen", "qwen3")
    shutil.copy(file, tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:3000])
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


def test_a_folder_is_converted_for_its_layout(
    calmix, words, options, tmp_path, file, compressed, monkeypatch
):
    """Once, by a process of its own; the file is that of the same model in GGUF."""
    folder = Path(shutil.copytree(open_model(file).folder, tmp_path / "folder"))
    out, script = tmp_path / "out", tmp_path / "convert.py"
    monkeypatch.setenv("CALMIX_CONVERTER", str(script))
    assert "cannot convert" in calmix(*words(out, model=folder)).line
    script.write_text(CONVERTER.format(template=str(file)))
    save_tiny_model(tmp_path / "mixture", "mixtral")
    said = calmix(*words(out, model=tmp_path / "mixture")).line
    assert "mixture: ERROR:hf-to-gguf:Model MixtralForCausalLM is not supported; or" in said
    (folder / "modeling.py").write_text("")
    assert "which the converter would run" in calmix(*words(out, model=folder)).line
    (folder / "modeling.py").unlink()
    monkeypatch.setenv("CALMIX_CONVERTER", str(tmp_path / "none"))
    assert "CALMIX_CONVERTER" in calmix(*words(out, model=folder)).line
    assert not out.exists()
    monkeypatch.setenv("CALMIX_CONVERTER", str(script))
    for stage in stages(check_request(Compression(model=str(folder), **options)), out)[:3]:
        stage.run(Progress())
        script.unlink(missing_ok=True)
    assert (out / "model.gguf").read_bytes() == (compressed / "model.gguf").read_bytes()


def test_bits_and_sizes_choose_types_by_matrix(calmix, words, options, file, tmp_path):
    """A file of the size that was asked for."""
    out = tmp_path / "out"
    for more, said in (
        (("--bits", 3), "3 bits per weight are out of reach: GGUF files of this model have 4."),
        (("--size", "1MB"), "--size 1MB: "),
        (("--size", "1kB"), "--size 1kB: 0 bits per weight are out of reach: GGUF files of this"),
        (("--bits", 1), "--bits 1: below 2 bits per weight"),
    ):
        assert said in calmix(*words(out, *more)).line
    told = calmix(*words(out, "--keep-at-least", "code=0.3", "--dry-run")).ok().out
    assert "--bits 6 " in told  # first the middle of those that the model's rows allow
    assert "--bits 3.2" not in told
    request = check_request(Compression(model=str(file), size="28kB", **options))
    assert request.target == "5.88 bits"
    for stage in stages(request, out)[:3]:
        stage.run(Progress())
    assert 0.98 * 28_000 < (out / "model.gguf").stat().st_size <= 28_000


def test_coarse_types_are_recovered_at_effort_best(options, file, tmp_path):
    """The levels stay, their scales are trained, and the file holds both."""
    usual, out = options | {"model": str(file), "effort": "best"}, tmp_path / "out"
    assert recoveries(check_request(Compression(**usual, type="Q3_K_M"))) == ("distill",)
    assert not recoveries(check_request(Compression(**usual)))
    standard = usual | {"type": "Q2_K", "effort": "standard"}
    assert not recoveries(check_request(Compression(**standard)))
    request = check_request(Compression(**usual, type="Q2_K")).model_copy(update={"rows": 16})
    for stage in stages(request, out)[:4]:
        stage.run(Progress())
    state = open_model(out / "model.gguf").model.state_dict()
    before, after = (read_blocks(out / name) for name in ("pruned", "quantised"))
    assert before.keys() == after.keys()
    manifest = json.loads((out / "quantised" / MANIFEST).read_text())
    assert manifest["recovery"]["method"] == "distill"
    for name, one in after.items():
        assert torch.equal(state[name], one.values().bfloat16())
        steps = TYPES[one.name].steps
        rest = [
            np.delete(blocks.data.numpy().reshape(-1, TYPES[one.name].bytes), np.r_[steps], 1)
            for blocks in (before[name], one)
        ]
        np.testing.assert_array_equal(*rest)


def test_an_importance_matrix_takes_the_place_of_text(calmix, options, file, tmp_path):
    """It is rounded as llama.cpp does; nothing is drawn, and the card says what is not known."""
    matrix, out = tmp_path / "one.gguf", tmp_path / "out"
    save_gguf(matrix, vectors(open_model(file).model))
    words = ("compress", file, "-o", out, "--suite", options["suite"], "--effort", "quick")
    words += ("--imatrix", matrix, "--type", "Q4_0")
    for more in ("--bits=4", "--calibration=stories", "--size=1MB", "--for=vllm", "--no-corpus"):
        assert "has no effect with" in calmix(*words, *more.split("=")).line
    other = save_gguf(tmp_path / "other.gguf", {"blk.0.attn_q.weight": np.ones(32, np.float32)})
    assert "is of another model" in calmix(*words, "--imatrix", other).line
    assert not out.exists()
    assert "calibrat" not in calmix(*words, "--dry-run").ok().out
    ended = calmix(*words).ok()
    assert "--method llama,type=Q4_0" in ended.err
    assert names(out) == FILES.replace("calibration ", "")
    text = (out / "card.html").read_text(encoding="utf-8")
    assert f"The text of the importance matrix {matrix} is not known." in text
    assert calmix(*words).ok().err.count("already done") == 3
    calmix("doctor", "inspect", out).ok()
    matrix.write_bytes(other.read_bytes())
    assert "imatrix_sha256" in calmix(*words).line or "another model" in calmix(*words).line


def test_the_speed_is_measured_where_llama_cpp_is_installed(calmix, out, monkeypatch):
    speeds = {"prompt": 400.0, "writing": 70.0, "memory": 3e8}
    monkeypatch.setattr(card, "engine", lambda: True)

    def broken(*_):
        raise ModelError("it does not run")

    monkeypatch.setattr(card, "measure", broken)
    assert "speed was not measured: it does not run" in calmix("report", out).ok().err
    both = {"threads": 2, "llama.cpp": speeds, "transformers": speeds | {"writing": 30.0}}
    monkeypatch.setattr(card, "measure", lambda *_: both)
    calmix("report", out).ok()
    said = "the file in llama.cpp: prompt 400 tokens/s, writing 70, 300 MB of memory; dense in "
    assert said in (out / "README.md").read_text(encoding="utf-8")
    assert "70 tokens/s" in (out / "card.html").read_text(encoding="utf-8")
    monkeypatch.setattr(card, "measure", broken)  # once is enough
    assert "not measured" not in calmix("report", out).ok().err
    calmix("doctor", "inspect", out).ok()


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
