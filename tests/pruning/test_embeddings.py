"""Embeddings and output head rounded: in memory and from disk, whole or resumed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix.errors import InputError, ModelError, SolverError
from calmix.models.blocks import outer_weights
from calmix.models.streaming import StreamedModel
from calmix.pruning.engine import Run, prune
from tests.pruning.test_streamed import in_memory, streamed_prune
from tests.tiny import (
    ARCHITECTURES,
    MIXTURES,
    hashes,
    load_weights,
    quick,
    save_tiny_model,
    tiny_ids,
    tiny_model,
)

EMBEDDED = "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", quick(("llama", "opt"), (*ARCHITECTURES, *MIXTURES)))
def test_embeddings_and_head_are_rounded(kind):
    dense, model = tiny_model(kind), tiny_model(kind)
    prune(dense, tiny_ids(), bits=4)
    report = prune(model, tiny_ids(), bits=4, embeddings=4)
    pairs = zip(model.named_parameters(), dense.parameters(), strict=True)
    changed = {name for (name, one), other in pairs if not torch.equal(one, other)}
    assert changed == {f"{one.name}.weight" for one in report.outer}
    wide = {id(weight) for weight in outer_weights(model)}
    assert wide == {id(model.get_parameter(name)) for name in changed}
    for one in report.outer:
        assert one.bits == pytest.approx(4, abs=0.7)  # 2 bytes a row or column weigh
        grid, value = report.grids[f"{one.name}.weight"], model.get_parameter(f"{one.name}.weight")
        assert torch.equal(grid.values(grid.levels(value)).to(value.dtype), value)


@pytest.mark.parametrize("alike", [True, False])
def test_stored_head_is_rounded(tmp_path, alike):
    """With the embeddings, as which it is configured, or where it is another one, apart."""
    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    weights, head = load_file(folder / "model.safetensors"), "lm_head.weight"
    weights[head] = (weights[EMBEDDED] if alike else weights[EMBEDDED].flip(0)).clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    source = StreamedModel(str(folder))
    assert len(outer_weights(source.model)) == 1 or not alike
    source.close()
    model, tensors = in_memory(folder, 5), streamed_prune(folder, tmp_path / "out", embeddings=5)
    for name in (head, EMBEDDED):
        assert torch.equal(tensors[name], model.get_parameter(name))
        assert 0 < (tensors[name] - weights[name]).norm() < 0.2 * weights[name].norm()


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", {"tie_word_embeddings": False}), ("bert", {"is_decoder": True})]
)
def test_head_is_solved_on_its_inputs(kind, how):
    """Than if its weights were just rounded; in BERT that is not what the decoder returns."""
    ids, apart = tiny_ids(), []
    for calibrated in (True, False):
        model, seen = tiny_model(kind, **how), []
        head = model.get_output_embeddings()
        dense = head.weight.clone()
        with pytest.MonkeyPatch.context() as patched:
            if not calibrated:
                patched.setattr(Run, "_head_gram", lambda *_: None)
            prune(model, ids, pattern=0.01, embeddings=3)
        head.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        model(ids)
        apart.append(float((seen[0].flatten(0, 1) @ (head.weight - dense).T).norm()))
    assert apart[0] < 0.9 * apart[1]


def test_unroundable_embeddings_are_refused_first():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="9 bits"):
        prune(model, tiny_ids(), bits=4, embeddings=9)
    with pytest.raises(ModelError, match="LlamaModel has no output head"):
        prune(model.model, tiny_ids(), bits=4, embeddings=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(SolverError, match="its weights or inputs are not finite"):
        prune(model, pattern=0.5, method="magnitude", embeddings=4)


def test_recover_and_pack_two_bits(calmix, text_file, tmp_path):
    """However far from the dense ones they are where the head hardly looks."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    weights, rng = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    low = torch.randn(32, 12, generator=rng) @ torch.randn(12, 64, generator=rng)
    weights["model.layers.1.mlp.down_proj.weight"] = low
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    data = ("--calibration", text_file, "--length", 32, "--leakage", "off", "--rows", 16)
    two, packed = tmp_path / "two", tmp_path / "pack"
    calmix("prune", folder, *data, "--bits", 4, "--embeddings", 2, "-o", two).ok()
    for way in ("blocks", "distill"):
        made, back = tmp_path / way, tmp_path / f"{way}-back"
        how = (*data, "--method", way, "--epochs", 1)
        calmix("recover", two, "--against", folder, *how, "-o", made).ok()
        assert torch.equal(load_weights(made)[EMBEDDED], load_weights(two)[EMBEDDED])
        calmix("export", made, "--to", "pack", "--overwrite", "-o", packed).ok()
        calmix("export", packed, "--to", "model", "-o", back).ok()
        assert hashes(back) == hashes(made)
