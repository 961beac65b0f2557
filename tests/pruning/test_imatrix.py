"""Importance matrices of llama.cpp, in both of its formats, in place of calibration text."""

import struct

import numpy as np
import torch
from gguf import GGUFWriter

from calmix import prune
from calmix.models.blocks import find_blocks
from calmix.pruning.imatrix import read_imatrix
from calmix.pruning.methods import get_method
from calmix.pruning.requests import prune_request
from calmix.pruning.solvers.libggml import quantise
from tests.pruning.test_engine import check_equal
from tests.pruning.toy import refused
from tests.tiny import tiny_model

ROLES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
ROLES |= {name: f"ffn_{name.split('_')[0]}" for name in ("gate_proj", "up_proj", "down_proj")}


def vectors(model, seed=0):
    """Positive float32 vectors by the names of GGUF."""
    rng, named = np.random.default_rng(seed), {}
    for layer in find_blocks(model).layers:
        *_, block, _, role = layer.name.split(".")
        name = f"blk.{block}.{ROLES[role]}.weight"
        named[name] = rng.uniform(0.01, 4, layer.shape[1]).astype(np.float32)
    return named


def save_gguf(file, named):
    writer = GGUFWriter(file, "")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    for name, vector in named.items():
        writer.add_tensor(f"{name}.in_sum2", vector[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def save_legacy(file, named):
    parts = [struct.pack("<i", len(named))]
    for name, vector in named.items():
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", 7, len(vector))]
        parts.append(vector.tobytes())
    file.write_bytes(b"".join([*parts, struct.pack("<ii", 7, 4), b"text"]))
    return file


def test_files_round_weights_as_in_llama_cpp_or_are_refused(tmp_path):
    """In both formats. One that does not fit is refused before any change."""
    dense, named = tiny_model("llama"), vectors(tiny_model("llama"))
    files = save_gguf(tmp_path / "one.gguf", named), save_legacy(tmp_path / "one.dat", named)
    weight = dense.model.layers[1].mlp.down_proj.weight
    importance = torch.from_numpy(named["blk.1.ffn_down.weight"])
    expected = quantise(weight, importance, name="Q4_0").values()
    assert not torch.equal(expected, quantise(weight, None, name="Q4_0").values())
    for file in files:
        read = read_imatrix(file)
        assert read.keys() == named.keys()
        assert all(torch.equal(read[name], torch.from_numpy(one)) for name, one in named.items())
        model = tiny_model("llama")
        assert prune(model, method=f"llama,type=Q4_0,imatrix={file}").tokens == 0
        assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected)
    short = {name: one[:16] if "ffn_up" in name else one for name, one in named.items()}
    few = {name: one for name, one in named.items() if "blk.1" not in name}
    broken = {name: np.full_like(one, np.nan) for name, one in named.items()}
    (tmp_path / "cut.dat").write_bytes(files[1].read_bytes()[:200])
    (tmp_path / "cut.gguf").write_bytes(files[0].read_bytes()[:2000])
    (tmp_path / "text.dat").write_text("some text of another file")
    for file, said in (
        (save_gguf(tmp_path / "short.gguf", short), "has 16 values for the 32 inputs of model.lay"),
        (save_legacy(tmp_path / "few.dat", few), "few.dat is of another model: it has no values"),
        (save_gguf(tmp_path / "nan.gguf", broken), "nan.gguf is damaged"),
        (tmp_path / "cut.dat", "cut.dat is damaged, or no importance matrix of llama.cpp"),
        (tmp_path / "cut.gguf", "cut.gguf is damaged"),
        (tmp_path / "text.dat", "text.dat is damaged"),
        (tmp_path / "none.dat", "cannot read .*none.dat"),
    ):
        model = tiny_model("llama")
        refused(said, prune, model, method=f"llama,imatrix={file}")
        check_equal(model, dense)


def test_it_takes_the_place_of_calibration_text():
    assert get_method("llama,imatrix=x").needs is None
    request = prune_request(method="llama,imatrix=x.gguf")
    assert (request.calibration, request.options["imatrix"]) == (None, "x.gguf")
    given = {"method": "llama,imatrix=x", "calibration": "stories"}
    refused("--calibration has no effect", prune_request, **given)
    said = "4.5 bits per weight are chosen on calibration"
    refused(said, prune_request, method="llama,bits=4.5,imatrix=x")
