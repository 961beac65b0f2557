"""Exports: the other engine's predictions match the model's, or nothing is written."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec

import pytest
import torch
import transformers
from packaging.version import Version

import calmix
from calmix.cli import app
from calmix.deploy import openvino as exported
from calmix.deploy.openvino import MANIFEST, Session, export
from calmix.errors import ModelError
from calmix.models.opening import fingerprint
from tests.tiny import VOCABULARY, save_tiny_model, tiny_ids

needs_openvino = pytest.mark.skipif(
    not (find_spec("openvino") and find_spec("nncf"))
    or Version(transformers.__version__) < Version("5.23"),
    reason="openvino, nncf or transformers 5.23 is not installed: pip install 'calmix[export]'",
)
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@pytest.fixture(scope="module")
def made(pruned, tmp_path_factory):
    """Its export by the command line, which prints one line whatever the libraries print."""
    output = tmp_path_factory.mktemp("made") / "export"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert not app(
            ["export", str(pruned), "--to", "openvino", "-o", str(output)], standalone_mode=False
        )
    said = [one for one in err.getvalue().splitlines() if not one.startswith("export check, ")]
    assert (said, out.getvalue().count("\n")) == ([], 1)  # progress is shown only if it takes long
    assert "same top-1 token" in out.getvalue()
    return output


@needs_openvino
def test_an_export_computes_what_the_model_does(pruned, made):
    """Rows it was not traced with, at once and token by token."""
    ids = tiny_ids(3, 24, seed=7)
    wanted = calmix.open_model(str(pruned)).model(ids).logits
    session = Session(made, **EXACT)
    whole, scale = session(ids), float(wanted.abs().max())
    assert float((whole - wanted).abs().max()) < 0.05 * scale  # 8 bits: 1/254 of a row's largest
    session.reset()
    assert torch.equal(session(ids[0].tolist()), Session(made, **EXACT)(ids[:1].numpy()))
    session.reset()
    parts = [session(ids[:, :20]), *(session(ids[:, at : at + 1]) for at in range(20, 24))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4 * scale, rtol=0)


@needs_openvino
def test_an_export_is_small_keeps_zeros_and_says_what_it_is_of(pruned, made, tmp_path, calmix):
    import openvino

    weights = [
        node.data
        for node in openvino.Core().read_model(made / exported.GRAPH).get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8
    ]
    zeros = [float((data == 0).mean()) for data in weights if data.shape != (VOCABULARY, 32)]
    assert len(zeros) == 7
    assert min(zeros) > 0.599
    size = (made / "openvino_model.bin").stat().st_size
    assert size < 0.3 * (pruned / "model.safetensors").stat().st_size
    manifest = json.loads((made / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["model"]["sha256"] == fingerprint(pruned)
    assert {"openvino", "nncf", "calmix"} <= set(manifest["versions"])
    assert {"openvino_model.xml", "tokenizer.json", "config.json"} <= set(manifest["files"])
    assert "openvino, int8 weights" in calmix("doctor", "inspect", made).ok().out
    shutil.copytree(made, tmp_path / "changed")
    with (tmp_path / "changed" / "openvino_model.bin").open("ab") as file:
        file.write(b"\0")
    ended = calmix("doctor", "inspect", tmp_path / "changed")
    assert (ended.code, "openvino_model.bin is damaged or changed" in ended.err) == (2, True)


@needs_openvino
@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt2", "olmo2", "phi3", "mixtral"])
def test_with_its_own_weights_an_export_is_the_model(kind, tmp_path):
    """Beyond the window of those with one, and in more steps than the export was checked with."""
    folder = save_tiny_model(tmp_path / "model", kind)
    found = export(str(folder), tmp_path / "out", weights="own")
    assert found.kl < 1e-5
    assert found.top1 == 1
    ids = tiny_ids(2, 40, seed=5)
    session = Session(tmp_path / "out", **EXACT)
    parts = torch.cat([session(ids[:, at : at + 8]) for at in range(0, 40, 8)], 1)
    wanted = calmix.open_model(str(folder)).model(ids).logits
    torch.testing.assert_close(parts, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_what_is_another_model_is_not_written(pruned, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(exported, "_library", lambda name: None)
    monkeypatch.setattr(exported, "_convert", lambda opened, weights, folder: None)
    shape = (*tiny_ids(2, 16).shape, VOCABULARY)
    logits = torch.full(shape, wrong) * torch.arange(VOCABULARY)
    monkeypatch.setattr(exported, "_logits", lambda folder, ids: logits)
    with pytest.raises(ModelError, match=r"differs from the model \(KL .* nats per token, limit 0"):
        export(str(pruned), tmp_path / "out")
    assert not list(tmp_path.iterdir())
