"""Checkpoints in compressed-tensors: written from levels, decoded independently and by the library,
and those of other tools."""

import json
import shutil
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix.deploy import compressed_tensors
from calmix.deploy.compressed_tensors import export, quantization_config
from calmix.errors import InputError, ModelError
from calmix.models import loading
from calmix.models.opening import forget, open_model, resolve_model, size_of
from calmix.models.packed import pack, unpack
from calmix.models.shards import write_model
from tests.tiny import load_weights, save_tiny_model

LAYER = "model.layers.1.mlp.up_proj"


def by_hand(tensors, layer, bits):
    """Decode a matrix integer by integer."""
    rows, columns = tensors[f"{layer}.weight_shape"].tolist()
    scale, words = tensors[f"{layer}.weight_scale"], tensors[f"{layer}.weight_packed"]
    streams = [sum((w % 2**32) << 32 * at for at, w in enumerate(row)) for row in words.tolist()]
    levels = torch.tensor([[(s >> bits * c) % 2**bits for c in range(columns)] for s in streams])
    zero = torch.full((rows, scale.shape[1]), 2 ** (bits - 1))
    if f"{layer}.weight_zero_point" in tensors:
        packed = tensors[f"{layer}.weight_zero_point"].T.tolist()
        streams = [sum((w % 2**32) << 32 * at for at, w in enumerate(row)) for row in packed]
        zero = torch.tensor([[(s >> bits * r) % 2**bits for s in streams] for r in range(rows)])
    wide = columns // scale.shape[1]
    return (levels - zero.repeat_interleave(wide, 1)) * scale.repeat_interleave(wide, 1)


@pytest.mark.parametrize(("name", "bits", "symmetric"), [("four", 4, True), ("three", 3, False)])
def test_a_checkpoint_decodes_to_the_levels(quantised, name, bits, symmetric, tmp_path):
    made = export(str(quantised / name), tmp_path / "out")
    assert (made["bits"], made["group"], made["symmetric"]) == (bits, 32, symmetric)
    assert made["matrices"] == 14
    assert made["bytes"] < made["before"]
    before = load_weights(quantised / name)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(by_hand(after, LAYER, bits), before[f"{LAYER}.weight"])
    assert f"{LAYER}.weight" not in after
    opened = open_model(tmp_path / "out")
    state = opened.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
    size, rate = size_of(str(tmp_path / "out"))
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert rate == 8 * size / sum(value.numel() for value in before.values())
    copy = opened.folder
    forget(tmp_path / "out")
    assert not copy.exists()
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_packed_without_gaps(bits):
    numbers = torch.arange(7 * 33).remainder(2**bits).to(torch.uint8).view(7, 33)
    words = pack(numbers, bits)
    assert words.dtype == torch.int32
    assert words.shape == (7, -(-33 * bits // 32))
    first = sum((word % 2**32) << 32 * at for at, word in enumerate(words[0].tolist()))
    assert first == sum(int(number) << bits * at for at, number in enumerate(numbers[0]))
    assert torch.equal(unpack(words, bits, 33), numbers)
    if find_spec("compressed_tensors"):
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        signed = (numbers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(words, pack_to_int32(signed, bits))


def checkpoint(folder, scale, **more):
    """Write a model with one matrix packed in 4 bits by hand, and return it in float32 levels."""
    save_tiny_model(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    levels = torch.arange(64 * 32).remainder(15).to(torch.uint8).view(64, 32)
    del tensors[f"{LAYER}.weight"]
    tensors |= {
        f"{LAYER}.weight_packed": pack(levels, 4),
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.weight_shape": torch.tensor([64, 32]),
        **{f"{LAYER}.{name}": value for name, value in more.items()},
    }
    save_file(tensors, file, metadata={"format": "pt"})
    settings = {"quantization_config": quantization_config({4: [LAYER]}, 32, True, [])}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return levels.float()


def test_checkpoints_of_other_tools_open(tmp_path):
    """Scales by row or for the whole matrix, plain zero points, groups out of order."""
    rows, order = torch.rand(64, 1) + 0.5, torch.randint(2, (32,))
    pairs, zeros = torch.rand(64, 2) + 0.5, torch.randint(-8, 8, (64, 2), dtype=torch.int8)
    more = {"weight_zero_point": zeros, "weight_g_idx": order}
    for name, factor, zero, scale, beside in (
        ("rows", rows, 8, rows, {}),
        ("whole", 0.5, 8, torch.tensor([0.5]), {}),
        ("order", pairs[:, order], 8 + zeros[:, order], pairs, more),
    ):
        levels = checkpoint(tmp_path / name, scale, **beside)
        opened = open_model(tmp_path / name).model.get_parameter(f"{LAYER}.weight")
        assert torch.equal(opened, (levels - zero) * factor)


def words_of(numbers, bits, order=range(8)):
    """Integers (n, columns), joined along the rows as GPTQ's and AWQ's own programs do."""
    per = 32 // bits
    parts = [numbers[place::per].long() << bits * at for at, place in enumerate(order[:per])]
    whole = sum(parts)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"quant_method": "gptq", "bits": 4}, range(8)),
        ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, range(8)),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, range(8)),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, (0, 2, 4, 6, 1, 3, 5, 7)),
    ],
)
def test_gptq_and_awq_checkpoints_open(tmp_path, settings, order):
    bits, ours = settings["bits"], tmp_path / "model"
    torch.manual_seed(0)
    checkpoint(ours, torch.ones(64, 1))
    levels, zeros = (torch.randint(2**bits, size) for size in ((64, 32), (64, 2)))
    scale, index = torch.rand(64, 2).half() + 0.5, torch.arange(32) // 16
    if settings.get("desc_act"):
        index = index[torch.randperm(32)]
    tensors = {
        name: value
        for name, value in load_file(ours / "model.safetensors").items()
        if LAYER not in name
    }
    stored = zeros.T if "checkpoint_format" in settings else (zeros.T - 1) % 2**bits
    if settings["quant_method"] == "awq":
        tensors[f"{LAYER}.qweight"] = words_of(levels, bits, order).T
        tensors[f"{LAYER}.qzeros"] = words_of(zeros, bits, order).T
    else:
        tensors[f"{LAYER}.qweight"] = words_of(levels.T, bits)
        tensors[f"{LAYER}.qzeros"] = words_of(stored.T, bits).T
        tensors[f"{LAYER}.g_idx"] = index.int()
    tensors[f"{LAYER}.scales"] = scale.T
    save_file({k: v.contiguous() for k, v in tensors.items()}, ours / "model.safetensors")
    config = json.loads((ours / "config.json").read_text()) | {"quantization_config": settings}
    (ours / "config.json").write_text(json.dumps(config))
    opened = open_model(ours).model.get_parameter(f"{LAYER}.weight")
    wanted = (levels - zeros[:, index]).half() * scale[:, index]
    assert torch.equal(opened, wanted.float())


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    for scale, said in (
        (torch.ones(64, 3), "model.safetensors is damaged: the packed weights of model.layers.1"),
        (torch.ones(63, 1), "do not fit their scales"),
    ):
        checkpoint(folder, scale)
        with pytest.raises(ModelError, match=said):
            open_model(folder)
        shutil.rmtree(folder)
    checkpoint(folder, torch.ones(64, 1), weight_shape=torch.tensor([64, 2**40]))
    with pytest.raises(ModelError, match="words for a matrix of 64 x 1099511627776"):
        open_model(folder)
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    for changed, said in (
        ({"format": "float-quantized"}, "pip install compressed-tensors, then run it again"),
        ({"quant_method": "awq", "bits": 3}, r"is quantised by awq in a .*\(pip install gptqmodel"),
        ({"quant_method": "quip"}, "is quantised by quip in a form that calmix does not read"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "has rotated weights"),
    ):
        text = json.dumps(config | {"quantization_config": config["quantization_config"] | changed})
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=said):
            resolve_model(str(folder))


def test_what_has_no_levels_of_one_scheme_is_refused(quantised, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for name, said in (
        ("ecq", "was not quantised by GPTQ.*calmix compress MODEL --for vllm"),
        ("eight", "has groups of 32, 64 weights"),
    ):
        with pytest.raises(InputError, match=said):
            export(str(quantised / name), out)
    changed = shutil.copytree(quantised / "four", tmp_path / "changed")
    for file in changed.glob("*.safetensors"):
        if f"{LAYER}.weight" in (tensors := load_file(file)):
            tensors[f"{LAYER}.weight"][3, 5] *= 1.25  # no longer on its grid
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not decode to its weights"):
        export(str(changed), out)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_large_checkpoints_have_several_files(quantised, tmp_path, monkeypatch):
    small = partial(write_model, most=20_000)
    monkeypatch.setattr(compressed_tensors, "write_model", small)
    export(str(quantised / "four"), tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    before = load_weights(quantised / "four")
    state = open_model(tmp_path / "out").model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_export_prints_size_and_bits(calmix, quantised, tmp_path):
    command = "export", quantised / "four", "--to", "vllm", "-o", tmp_path / "out"
    assert "14 matrices of 4 bits in groups of 32" in calmix(*command).ok().out
    assert "already" in calmix(*command).line or "not empty" in calmix(*command).line
    assert "--like has no effect with --to vllm" in calmix(*command, "--like", "x").line
    inspected = calmix("doctor", "inspect", tmp_path / "out").ok().out
    assert "compressed-tensors checkpoint" in inspected
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in calmix("doctor", "inspect", tmp_path / "out").line
