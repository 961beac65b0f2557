"""From a model to a checkpoint for vLLM: the checkpoint is what is scored."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calmix.compression.card import read_card
from calmix.compression.compress import begin
from calmix.compression.plan import check_request, checkpoint_bytes
from calmix.compression.run_stages import stages
from calmix.models.opening import open_model
from calmix.options import Compression
from calmix.progress import Progress
from tests.compress.conftest import arguments, damage, finish, interrupts
from tests.tiny import load_weights, save_tiny_model

STAGES = ["calibrate", "prune", "export", "evaluate", "report"]


@pytest.fixture(scope="session")
def words(options, tiny_folder):
    """Return a function that makes the arguments of a compression to a checkpoint."""

    def made(output, *more, model=tiny_folder):
        return arguments(options, model, output, "--for", "vllm", *more)

    return made


@pytest.fixture(scope="session")
def usual(options, tiny_folder):
    """The same options in Python."""
    return options | {"model": str(tiny_folder), "product": "vllm"}


@pytest.fixture(scope="session")
def compressed(place, words):
    """A finished compression, which tests must not change."""
    finish(place, words(place / "vllm"))
    return place / "vllm"


def test_the_checkpoint_is_what_is_scored(calmix, words, out):
    ended = calmix(*words(out)).ok()
    assert ended.err.count("already done") == len(STAGES) - 1
    assert f"run: vllm serve {out}/model" in ended.out
    levels = "levels: 4 bits, and a scale for every 32 inputs (128 does not divide all rows)"
    assert levels in ended.out
    made = read_card(out)
    assert made.size == (out / "model" / "model.safetensors").stat().st_size
    assert made.title == "llama quantised to 4 bits, groups of 32"
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    opened = open_model(out / "model")
    assert scores["model"]["sha256"] == opened.fingerprint == made.file["opened"]
    for page in (out / "card.html", out / "model" / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert f"vllm serve {out}/model" in text
        assert f"{made.bits:.2f} bits per weight: 4 bits in 14 matrices" in text
    assert "library_name: transformers" in text
    assert not (out / "Modelfile").exists()
    assert not (out / "quantised").exists()
    assert calmix("check", out, "--keep-at-least", "0.05").code in (0, 1, 2)
    calmix("doctor", "inspect", out).ok()
    damage(out / "model" / "model.safetensors")
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


def test_whole_bits_are_mixed_for_an_average(usual, tmp_path):
    """Few bits are recovered, and the recovered levels are those of the checkpoint."""
    out = tmp_path / "out"
    for stage in stages(check_request(Compression(**usual, bits=2.4)), out)[:4]:
        stage.run(Progress())
    settings = json.loads((out / "model" / "config.json").read_text())["quantization_config"]
    bits = {
        name: scheme["weights"]["num_bits"]
        for scheme in settings["config_groups"].values()
        for name in scheme["targets"]
    }
    tensors = load_file(out / "model" / "model.safetensors")
    sizes = {name: tensors[f"{name}.weight_shape"].prod().item() for name in bits}
    assert len(bits) == 14
    average = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert 2.1 < average <= 2.4
    assert len({*bits.values()}) > 1
    for block in range(2):
        for part, fused in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            names = [f"model.layers.{block}.{part}.{one}_proj" for one in fused]
            assert len({bits[name] for name in names}) == 1
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


def test_sizes_are_met_and_searches_have_whole_bits(calmix, words, usual, tmp_path):
    for bits in (5, 3.4):
        size = checkpoint_bytes(check_request(Compression(**usual, bits=bits)), bits)
        assert check_request(Compression(**usual, size=f"{size + 1:.0f}B")).bits == bits
    walk = begin(Compression(**usual, keep_at_least="code=0.3"), tmp_path / "out")
    assert walk.rates == (8, 6, 5, 4, 3, 2)
    costs = json.loads(calmix(*words(tmp_path / "out", "--dry-run", "--json")).ok().out)
    size = checkpoint_bytes(check_request(Compression(**usual)), 4)
    assert [one["disk"] for one in costs if one["stage"] == "write the checkpoint"] == [size]
    few, odd = (
        [one.command for one in stages(check_request(Compression(**usual, **more)), tmp_path)]
        for more in ({"bits": 3}, {"asymmetric": True, "group": 32})
    )
    assert "--method gptq,group=32 --bits 3" in few[1]
    assert "calmix recover" in few[2]
    assert few[2].endswith(f"-o {tmp_path}/quantised")
    assert "gptq,group=32,symmetric=false" in odd[1]
    assert "calmix recover" not in odd[2]
