"""From a model to a checkpoint for vLLM: the checkpoint is what is scored."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calmix.compression.card import read_card
from calmix.compression.compress import begin
from calmix.compression.plan import checkpoint_bytes
from calmix.compression.run_stages import stages
from calmix.errors import InputError
from calmix.models.opening import open_model
from calmix.options import Compression
from tests.compress.conftest import arguments, build, damage, finish, interrupts, pages, read, shows
from tests.tiny import load_weights, save_tiny_model

STAGES = ["calibrate", "prune", "export", "evaluate", "report"]


@pytest.fixture(scope="session")
def words(options, tiny_folder):
    """Return a function that makes the arguments of a compression to a checkpoint."""
    vllm = ("--for", "vllm")
    return lambda out, *more, model=tiny_folder: arguments(options, model, out, *vllm, *more)


@pytest.fixture(scope="session")
def planned(asked, options):
    """Return a function that checks the same options in Python."""
    return lambda **more: asked(**options, product="vllm", **more)


@pytest.fixture(scope="session")
def compressed(place, words):
    """A finished compression, which tests must not change."""
    finish(place, words(place / "vllm"))
    return place / "vllm"


def test_the_checkpoint_is_what_is_scored(calmix, words, out):
    ended = calmix(*words(out)).ok()
    assert ended.err.count("already done") == len(STAGES) - 1
    levels = "levels: 4 bits, and a scale for every 32 inputs (128 does not divide all rows)"
    run = f"vllm serve {out}/model"
    shows(ended.out, f"run: {run}", levels)
    made, weights = read_card(out), out / "model" / "model.safetensors"
    assert made.size == weights.stat().st_size
    assert made.title == "llama quantised to 4 bits, groups of 32"
    scored = read(out / "scores.json")["model"]["sha256"]
    assert scored == open_model(out / "model").fingerprint == made.file["opened"]
    for text in pages(out):
        shows(text, run, f"{made.bits:.2f} bits per weight: 4 bits in 14 matrices")
    assert "library_name: transformers" in pages(out)[1]
    assert not {"Modelfile", "quantised"} & {path.name for path in out.iterdir()}
    assert calmix("check", out, "--keep-at-least", "0.05").code in (0, 1, 2)
    calmix("doctor", "inspect", out).ok()
    damage(weights)
    for command in (("report", out), words(out), ("doctor", "inspect", out)):
        assert "model.safetensors is damaged or changed" in calmix(*command).line


@pytest.mark.long
def test_an_interrupt_resumes_to_the_same_checkpoint(calmix, words, compressed, tmp_path):
    out = tmp_path / "out"
    assert {ended.code for ended in interrupts(calmix, words(out), 3)} == {130}
    calmix(*words(out)).ok()
    for name in ("model.safetensors", "config.json"):
        assert (out / "model" / name).read_bytes() == (compressed / "model" / name).read_bytes()


def test_what_no_checkpoint_holds_is_refused_before_any_work(calmix, words, tmp_path, tiny_folder):
    out = tmp_path / "out"
    save_tiny_model(tmp_path / "transposed", "gpt2")
    save_tiny_model(tmp_path / "odd", intermediate_size=72)
    for model, more, said in (
        (tiny_folder, ("--bits", 7.5, "--asymmetric"), "levels have 2 to 7 bits, not 7.5"),
        (tiny_folder, ("--bits", 8, "--asymmetric"), "asymmetric levels have 2 to 7 bits, not 8"),
        (tiny_folder, ("--group", 128), "groups of 128 do not divide the 64 inputs of model."),
        (tiny_folder, ("--group", 48), "groups of 48 have no kernels: choose --group 128, 64 or"),
        (tiny_folder, ("--sparsity", 0.5), "vLLM has no use for zeros"),
        (tiny_folder, ("--size", "1kB"), "--size 1kB is out of reach: a checkpoint of"),
        (tmp_path / "transposed", (), "no transposed matrices, which this model has; or write"),
        (tmp_path / "odd", (), "groups of 32 do not divide the 72 inputs of model.layers.0.mlp"),
    ):
        assert said in calmix(*words(out, *more, model=model)).line
        assert not out.exists()
    planned = calmix(*words(out, "--dry-run")).ok().out
    assert "embeddings stay in 16 bits: with them the checkpoint takes" in planned
    other = [word if word != "vllm" else "none" for word in words(out, "--group", 32)]
    assert "--group has no effect with --for none" in calmix(*other).line


def test_a_model_that_was_replaced_is_opened_again(planned, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert planned(model=str(folder)).group
    shutil.rmtree(folder)
    save_tiny_model(folder, intermediate_size=72)
    with pytest.raises(InputError, match="do not divide the 72 inputs"):
        planned(model=str(folder))


def test_whole_bits_are_mixed_for_an_average(planned, tmp_path):
    """Few bits are recovered, and the recovered levels are those of the checkpoint."""
    out = tmp_path / "out"
    build(4, planned(bits=2.4), out)
    groups = read(out / "model" / "config.json")["quantization_config"]["config_groups"].values()
    bits = {name: one["weights"]["num_bits"] for one in groups for name in one["targets"]}
    tensors = load_file(out / "model" / "model.safetensors")
    sizes = {name: tensors[f"{name}.weight_shape"].prod().item() for name in bits}
    assert len(bits) == 14
    average = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert 2.1 < average <= 2.4
    assert len({*bits.values()}) > 1
    for block in range(2):
        for part, fused in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            assert len({bits[f"model.layers.{block}.{part}.{one}_proj"] for one in fused}) == 1
    for name, width in bits.items():
        columns = int(tensors[f"{name}.weight_shape"][1])
        assert tensors[f"{name}.weight_packed"].shape[1] == -(-width * columns // 32)
    state = open_model(out / "model").model.state_dict()
    recovered, pruned = (load_weights(out / name) for name in ("quantised", "pruned"))
    assert all(torch.equal(state[name], value) for name, value in recovered.items())
    assert not all(torch.equal(pruned[name], value) for name, value in recovered.items())
    if find_spec("compressed_tensors"):
        loaded = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
        ids = torch.arange(12).view(1, -1)
        with torch.no_grad():
            expected = open_model(out / "model", dtype="float32").model(ids).logits
            assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)


def test_sizes_are_met_in_whole_bits(calmix, words, planned, options, tiny_folder, tmp_path):
    for bits in (5, 3.4):
        size = checkpoint_bytes(planned(bits=bits), bits)
        assert planned(size=f"{size + 1:.0f}B").bits == bits
    searching = {"model": str(tiny_folder), "product": "vllm", "keep_at_least": "code=0.3"}
    walk = begin(Compression(**options, **searching), tmp_path / "out")
    assert walk.rates == (8, 6, 5, 4, 3, 2)
    costs = json.loads(calmix(*words(tmp_path / "out", "--dry-run", "--json")).ok().out)
    (written,) = (one["disk"] for one in costs if one["stage"] == "write the checkpoint")
    assert written == checkpoint_bytes(planned(), 4)
    requests = planned(bits=3), planned(asymmetric=True, group=32)
    few, odd = ([one.command for one in stages(request, tmp_path)] for request in requests)
    assert "--method gptq,group=32 --bits 3" in few[1]
    assert "calmix recover" in few[2]
    assert few[2].endswith(f"-o {tmp_path}/quantised")
    assert "gptq,group=32,symmetric=false" in odd[1]
    assert "calmix recover" not in odd[2]
