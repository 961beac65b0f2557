"""Packs: bytes are restored for every type, packs are smaller, and altered files are refused."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calmix.deploy import pack as packed
from calmix.deploy.pack import load, pack, unpack
from calmix.errors import InputError, ModelError
from calmix.manifest import sealed
from calmix.models.folder import PACK
from calmix.models.opening import open_model
from calmix.models.shards import with_length
from tests.faults.places import tree


def comes_back(model, folder):
    """Pack and unpack a model, compare the two, and return the result of packing."""
    made = pack(str(model), str(folder / "pack"), overwrite=True)
    assert unpack(str(folder / "pack"), str(folder / "back"), overwrite=True) == made.dense
    assert tree(folder / "back") == tree(model)
    return made


def test_pack_round_trip(pruned, tmp_path, calmix, monkeypatch):
    made = comes_back(pruned, tmp_path)
    assert made.packed < 0.9 * made.dense  # tiny tensors; docs have real figures
    assert made.levels == (0, 0)
    dense, seen = open_model(str(pruned)).model, []
    monkeypatch.setenv("HOME", str(tmp_path))
    model = load("~/pack", progress=lambda *of: seen.append(of))
    ids = torch.arange(1, 9)[None]
    assert (model.dtype, seen) == (torch.float32, [(1, 1)])
    assert torch.equal(model(ids).logits, dense(ids).logits)
    assert load(tmp_path / "pack", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"is a pack: run 'calmix export .* --to model"):
        open_model(str(tmp_path / "pack"))
    assert "of weights in" in calmix("export", pruned, "-o", tmp_path / "again").ok().out
    assert tree(tmp_path / "again") == tree(tmp_path / "pack")
    calmix("export", tmp_path / "again", "--to", "model", "-o", tmp_path / "dense").ok()
    for words in (("evaluate", tmp_path / "again"), ("export", tmp_path / "again", "--to", "gguf")):
        line = calmix(*words, "-o", tmp_path / "no").line
        assert f"again is a pack: run 'calmix export {tmp_path / 'again'} --to model" in line
    assert tree(tmp_path / "dense") == tree(pruned)
    # To transformers, whose plain configuration would give a model of random weights.
    with pytest.raises(ValueError, match="model type `calmix-pack`"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pack")
    for config in (None, AutoConfig.from_pretrained(pruned)):
        with pytest.raises(OSError, match=r"does not appear to have a file|no file named"):
            LlamaForCausalLM.from_pretrained(tmp_path / "pack", config=config)


def test_transformers_opens_packs_after_an_import(pruned, tmp_path, monkeypatch):
    pack(pruned, tmp_path / "pack")
    for mapping in (CONFIG_MAPPING, AutoModelForCausalLM._model_mapping):
        monkeypatch.setattr(mapping, "_extra_content", {})  # registered for this test alone
    monkeypatch.delitem(sys.modules, "calmix.packs", raising=False)
    importlib.import_module("calmix.packs")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pack", dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    assert all(
        torch.equal(dense.state_dict()[key], value) for key, value in model.state_dict().items()
    )
    (tmp_path / "pack" / "packed-model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="does not have its original content"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pack")


def test_pack_restores_all_files_or_refuses(pruned, tmp_path):
    model = shutil.copytree(pruned, tmp_path / "model")
    for name in ("code/a/b.py", "code/model.safetensors", ".hidden"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name, encoding="utf-8")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}', encoding="utf-8")
    comes_back(model, tmp_path)
    assert load(tmp_path / "pack").generation_config.eos_token_id == [2, 7]
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    save_file({}, weights)
    assert comes_back(model, tmp_path / "none").dense == weights.stat().st_size
    weights.write_bytes(whole + b"more")
    with pytest.raises(ModelError, match="is cut short or damaged"):
        pack(model, tmp_path / "out")
    weights.write_bytes(whole)
    for link, to in (("sub", "code"), ("gone", "nowhere")):
        (model / link).symlink_to(to)
        with pytest.raises(InputError, match=f"cannot pack .*'{link}' is not a regular file"):
            pack(model, tmp_path / "out")
        (model / link).unlink()
    assert not (tmp_path / "out").exists()


@given(data=st.data())
def test_all_types_and_values_survive(data, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("any")
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8]
    tensors = {}
    for number in range(data.draw(st.integers(1, 3))):
        dtype = data.draw(st.sampled_from([*kinds, torch.bool]))
        size = (count := data.draw(st.integers(0, 40))) * dtype.itemsize
        # Half of it zeros, or what looks like a frame of zstandard.
        first = data.draw(
            st.sampled_from([b"", bytes(count // 2 * dtype.itemsize), packed.ZSTANDARD_MAGIC])
        )
        raw = (first + data.draw(st.binary(min_size=size, max_size=size)))[:size]
        most = 1 if dtype == torch.bool else 255
        tensors[f"t{number}"] = torch.tensor([b & most for b in raw], dtype=torch.uint8).view(dtype)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    save_file(tensors, folder / "model" / "model.safetensors")
    monkeypatch.setattr(packed, "PACKED_VALUES", 16)  # several chunks per tensor
    comes_back(folder / "model", folder)


def test_damaged_packs_are_one_line(pruned, tmp_path):
    pack(pruned, tmp_path / "pack")
    whole = (tmp_path / "pack" / "packed-model.safetensors").read_bytes()

    def refused(match, content=whole, **manifest):
        folder = shutil.copytree(tmp_path / "pack", tmp_path / "bad", dirs_exist_ok=True)
        (folder / "packed-model.safetensors").write_bytes(content)
        kept = json.loads((folder / PACK).read_text(encoding="utf-8"))
        (folder / PACK).write_text(json.dumps(sealed(kept | manifest)), encoding="utf-8")
        for act in (lambda: unpack(folder, tmp_path / "out"), lambda: load(folder)):
            with pytest.raises(InputError, match=match):
                act()
        assert not list(tmp_path.glob("*out*")), "nothing is left"

    altered, outside = "does not have its original content", "names a file outside the pack"
    for at in range(0, len(whole), len(whole) // 12):
        refused(altered, whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
    for at in (0, 7, len(whole) // 2, len(whole) - 1):
        refused(altered, whole[:at])
    for match, manifest in (
        ("is a pack of format 6, but this calmix reads 7", {"format": 6}),
        (outside, {"files": {"a/../../evil": "0"}}),
        (outside, {"files": {"/evil": "0"}}),
        (outside, {"weights": {"model.safetensors": {"file": "../model"}}}),
        (outside, {"weights": {"../x": {"file": "packed-model.safetensors"}}}),
        (outside, {"weights": {"a\0b": {"file": "packed-model.safetensors"}}}),
        ("lacks sub/model.safetensors", {"weights": {"x": {"file": "sub/model.safetensors"}}}),
        ("lacks gone.txt, which is part of the pack", {"files": {"gone.txt": "0"}}),
        (altered, {"files": {"config.json": "0"}}),
        ("is damaged", {"weights": {"packed-model.safetensors": {"packed": "0"}}}),
        ("is damaged", {"weights": 3}),
        ("is damaged", {"weights": ["model.safetensors"]}),
        ("is damaged", {"files": [["a"]]}),
        ("is damaged", {"names": ["a"]}),
        ("is damaged", {"config": 3}),
    ):
        refused(match, **manifest)
    (tmp_path / "pack" / PACK).write_text("[" * 10**6)
    with pytest.raises(InputError, match="is damaged"):
        unpack(tmp_path / "pack", tmp_path / "out")
    (tmp_path / "zeros").mkdir()  # a bomb
    (tmp_path / "zeros" / "config.json").write_text("{}")
    zeros = {"zeros": torch.zeros(2**20, 40, dtype=torch.bfloat16)}
    save_file(zeros, tmp_path / "zeros" / "model.safetensors")
    pack(tmp_path / "zeros", tmp_path / "bomb")
    assert (tmp_path / "bomb" / "packed-model.safetensors").stat().st_size < 10_000
    with pytest.raises(InputError, match=altered):
        unpack(tmp_path / "bomb", tmp_path / "out")


@pytest.mark.parametrize("name", ["ecq", "eight", "joint"])
def test_levels_round_trip(quantised, name, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "PACKED_VALUES", 500)  # several chunks per tensor
    model = quantised / name
    before, after = comes_back(model, tmp_path).levels
    assert after < 0.6 * before
    entries = json.loads((tmp_path / "pack" / PACK).read_text())["weights"]
    tensors = [one for file in entries.values() for one in file["tensors"].values()]
    levels = [one for one in tensors if "levels" in one]
    assert len(levels) == 14
    halves = {half for one in levels for half in one["levels"]}
    assert halves == {False} if name == "eight" else True in halves
    rest = [size for one in levels for size in one["sizes"]["rest"]]
    assert sum(rest) < 20 * len(rest)  # bytes of 1000 or 2000: next to nothing
    dense, loaded = open_model(str(model)).model.state_dict(), load(tmp_path / "pack").state_dict()
    assert all(torch.equal(dense[key], value) for key, value in loaded.items())


def test_levels_of_changed_models(quantised, tmp_path):
    """With other names in the files, and with weights off the grid."""
    model = shutil.copytree(quantised / "ecq", tmp_path / "model")
    for file in model.glob("*.safetensors"):
        weights = {name.removeprefix("model."): value for name, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.', '"'))
    comes_back(model, tmp_path)
    manifest = json.loads((tmp_path / "pack" / PACK).read_text())
    tensors = [one for file in manifest["weights"].values() for one in file["tensors"].values()]
    assert sum("levels" in entry for entry in tensors) == 14 == len(manifest["names"])
    model = shutil.copytree(quantised / "ecq", tmp_path / "other")
    for number, file in enumerate(sorted(model.glob("*.safetensors"))):
        weights = load_file(file)
        for value in weights.values():
            if value.ndim == 2:  # one weight, or all
                (value[:1, :1] if number % 2 else value).mul_(1.1)
        save_file(weights, file, metadata={"format": "pt"})
    comes_back(model, tmp_path)


def test_foreign_scales_are_refused(quantised, tmp_path):
    for name in ("ecq", "joint"):
        pack(quantised / name, tmp_path / name)
    scales = next((tmp_path / "joint" / "calmix-scales").iterdir())
    shutil.copy(scales, tmp_path / "ecq" / "calmix-scales" / scales.name)
    entry = {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}
    header = torch.frombuffer(bytearray(with_length({"a": entry})), dtype=torch.uint8)
    for _ in range(2):  # the second header asks for more bytes than there are
        with pytest.raises(InputError, match="does not have its original content"):
            load(tmp_path / "ecq")
        save_file({"header": header}, tmp_path / "ecq" / "calmix-scales" / scales.name)
    scales.unlink()
    with pytest.raises(InputError, match="lacks calmix-scales"):
        load(tmp_path / "joint")
