"""GGUF files with the levels of a grid, read back by other libraries; importance matrices."""

import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants

from calmix.calibration import resolve
from calmix.deploy.gguf import export, export_imatrix
from calmix.errors import ModelError
from calmix.models import open_model
from calmix.pruning.checkpoint import prune_checkpoints
from calmix.specs import prune_request
from tests.fuzz.readers import tiny_gguf
from tests.tiny import load_weights, save_tiny_model

ASKED = {
    "four": {"method": "gptq,group=32", "bits": 4},
    "eight": {"method": "gptq,group=64", "bits": 8},
    "ecq": {"bits": 3},
    "sparse": {"sparsity": 0.5, "bits": 4},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model from a GGUF file, and what it was quantised to."""
    folder = tmp_path_factory.mktemp("gguf")
    tiny_gguf(folder / "tiny.gguf")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Line {n} of some text." for n in range(400)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CALMIX_CACHE", str(folder / "cache"))
        drawn = {"calibration": str(text), "rows": 6, "length": 32, "leakage": "off"}
        targets = {folder / name: prune_request(**asked, **drawn) for name, asked in ASKED.items()}
        prune_checkpoints(str(folder / "tiny.gguf"), targets)
    return folder


@pytest.fixture(autouse=True)
def own_cache(made, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(made / "cache"))


@pytest.mark.parametrize(
    ("name", "kind"), [("four", "Q4_0"), ("eight", "Q8_0"), ("sparse", "Q4_0"), ("ecq", "F16")]
)
def test_a_file_has_the_levels_of_the_grid(made, name, kind, tmp_path):
    """Types as asked for; transformers and the gguf library read the checkpoint's weights."""
    written = export(str(made / name), tmp_path / "out.gguf")
    assert written.types[kind] == 14 + (kind == "F16")
    assert written.ours == (0 if name == "ecq" else 14)
    assert written.kl < 1e-4
    assert written.after == (tmp_path / "out.gguf").stat().st_size
    weights, again = load_weights(made / name), open_model(str(tmp_path / "out.gguf")).model
    for key, value in again.state_dict().items():
        if ".layers." in key and value.ndim == 2:  # a file of type Q4_0 is opened in bfloat16
            rtol = 1e-3 if name == "ecq" else 0
            torch.testing.assert_close(value, weights[key].to(value.dtype), rtol=rtol, atol=0)
    reader, before = GGUFReader(tmp_path / "out.gguf"), GGUFReader(made / "tiny.gguf")
    assert [one.name for one in reader.tensors] == [one.name for one in before.tensors]
    for field in before.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.file_type":
            assert reader.get_field(field.name).contents() == field.contents()
    up = next(one for one in reader.tensors if one.name == "blk.1.ffn_up.weight")
    found = quants.dequantize(up.data, up.tensor_type)
    np.testing.assert_allclose(
        found, weights["model.layers.1.mlp.up_proj.weight"].float().numpy(), rtol=1e-3, atol=1e-6
    )


def test_weights_without_a_grid_are_rounded_plainly(calmix, made, tmp_path):
    out = tmp_path / "out.gguf"
    ended = calmix(
        "export", made / "tiny.gguf", "--to", "gguf", "--weights", "q8_0", "-o", out
    ).ok()
    assert "(15 Q8_0, 5 F32; 0 with the levels" in ended.out
    kinds = {one.name: one.tensor_type.name for one in GGUFReader(out).tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")


def test_what_cannot_be_written_is_one_line(calmix, made, tmp_path):
    save_tiny_model(tmp_path / "llama", "llama")
    save_tiny_model(tmp_path / "qwen", "qwen2")
    save_tiny_model(tmp_path / "wide", "llama", hidden_size=64)
    (tmp_path / "cut.gguf").write_bytes((made / "tiny.gguf").read_bytes()[:3000])
    shutil.copy(made / "tiny.gguf", tmp_path / "tiny.gguf")
    like = "--like", tmp_path / "tiny.gguf"
    for model, more, says in (
        ("llama", (), "--to gguf needs a GGUF file of the same model"),
        ("qwen", like, "is not of the same model as"),
        ("wide", like, "is not of the same model as"),
        ("llama", ("--like", tmp_path / "cut.gguf"), "cut.gguf"),
        ("llama", ("--like", tmp_path / "none.gguf"), "there is no model folder or .gguf file"),
        ("llama", ("--like", tmp_path / "qwen"), "is not a GGUF file"),
        ("llama", (*like, "--weights", "int8"), "--to gguf has no --weights int8"),
    ):
        ended = calmix("export", tmp_path / model, "--to", "gguf", "-o", tmp_path / "o.gguf", *more)
        assert (ended.code, says in ended.line) == (2, True), ended.err
    assert not list(tmp_path.glob("*o.gguf*"))


def test_an_importance_matrix_is_the_sum_of_squares_of_inputs(calmix, made, text_file, tmp_path):
    model = str(made / "tiny.gguf")
    opened = open_model(model)
    drawn = resolve(str(text_file), opened, rows=5, length=32, leakage="off")
    drawn.save(tmp_path / "set")
    out = tmp_path / "imatrix.gguf"
    ended = calmix("export", tmp_path / "set", "--to", "imatrix", "-m", model, "-o", out).ok()
    assert "14 matrices" in ended.out
    sums = {}
    for number, block in enumerate(opened.model.model.layers):
        for name, layer in (("attn_q", block.self_attn.q_proj), ("ffn_down", block.mlp.down_proj)):

            def add(_, args, key=f"blk.{number}.{name}.weight"):
                sums[key] = sums.get(key, 0) + args[0].float().square().sum((0, 1))

            layer.register_forward_pre_hook(add)
    with torch.no_grad():
        opened.model(drawn.ids)
    reader = GGUFReader(out)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.chunk_count").contents() == 5
    assert reader.get_field("imatrix.chunk_size").contents() == 32
    assert reader.get_field("imatrix.datasets").contents() == list(drawn.counts)
    held = {one.name: one for one in reader.tensors}
    assert len(held) == 28
    for name, expected in sums.items():
        assert list(held[f"{name}.in_sum2"].shape) == [len(expected), 1]
        assert held[f"{name}.counts"].data.reshape(-1).tolist() == [160]
        np.testing.assert_allclose(
            held[f"{name}.in_sum2"].data.reshape(-1), expected.numpy(), rtol=1e-4
        )


def test_an_importance_matrix_needs_names(text_file, tmp_path):
    save_tiny_model(tmp_path / "opt", "opt")
    opened = open_model(str(tmp_path / "opt"))
    resolve(str(text_file), opened, rows=2, length=16, leakage="off").save(tmp_path / "set")
    with pytest.raises(ModelError, match=r"no (form|name) in GGUF"):
        export_imatrix(tmp_path / "set", str(tmp_path / "opt"), tmp_path / "i.gguf")
    assert not (tmp_path / "i.gguf").exists()
