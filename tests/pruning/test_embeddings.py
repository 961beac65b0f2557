"""Embeddings and output head rounded: in memory and from disk, whole or resumed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix.errors import InputError, ModelError, SolverError
from calmix.models.blocks import outer_weights
from calmix.models.opening import open_model
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
)


@pytest.mark.parametrize(
    "kind", quick(("llama", "gemma2", "opt", "gpt2", "mixtral"), (*ARCHITECTURES, *MIXTURES))
)
def test_embeddings_and_head_are_rounded(kind, tmp_path):
    folder = save_tiny_model(tmp_path / "model", kind)
    dense, model = open_model(str(folder)).model, open_model(str(folder)).model
    prune(dense, tiny_ids(), bits=4)
    report = prune(model, tiny_ids(), bits=4, embeddings=4)
    changed = {
        name
        for (name, one), (_, other) in zip(
            model.named_parameters(), dense.named_parameters(), strict=True
        )
        if not torch.equal(one, other)
    }
    assert changed == {f"{one.name}.weight" for one in report.outer}
    assert len(changed) == len(outer_weights(model))
    for one in report.outer:
        assert one.bits == pytest.approx(4, abs=0.7)  # 2 bytes a row or column weigh
        name = f"{one.name}.weight"
        grid, value = report.grids[name], model.get_parameter(name)
        assert torch.equal(grid.values(grid.levels(value)).to(value.dtype), value)
    wide = {id(weight) for weight in outer_weights(model)}
    assert wide == {id(model.get_parameter(name)) for name in changed}


@pytest.mark.parametrize("alike", [True, False])
def test_stored_head_is_rounded(tmp_path, alike):
    """With the embeddings, as which it is configured, or where it is another one, apart."""
    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    weights, head = load_file(folder / "model.safetensors"), "lm_head.weight"
    embedded = weights["model.embed_tokens.weight"]
    weights[head] = embedded.clone() if alike else embedded.flip(0).clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    source = StreamedModel(str(folder))
    assert len(outer_weights(source.model)) == 1 or not alike
    source.close()
    model, found = in_memory(folder, 5), streamed_prune(folder, tmp_path / "out", embeddings=5)
    for name in (head, "model.embed_tokens.weight"):
        assert torch.equal(found[name], model.get_parameter(name))
        assert 0 < (found[name] - weights[name]).norm() < 0.2 * weights[name].norm()


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", {"tie_word_embeddings": False}), ("bert", {"is_decoder": True})]
)
def test_head_is_solved_on_its_inputs(tmp_path, kind, how):
    """Than if its weights were just rounded; in BERT that is not what the decoder returns."""
    folder = save_tiny_model(tmp_path / "model", kind, **how)
    ids, apart = tiny_ids(), []
    for calibrated in (True, False):
        model = open_model(str(folder)).model
        head = model.get_output_embeddings()
        dense = head.weight.clone()
        with pytest.MonkeyPatch.context() as patched:
            if not calibrated:
                patched.setattr(Run, "_head_gram", lambda *_: None)
            prune(model, ids, pattern=0.01, embeddings=3)
        seen = []
        head.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        model(ids)
        apart.append(float((seen[0].flatten(0, 1) @ (head.weight - dense).T).norm()))
    assert apart[0] < 0.9 * apart[1]


def test_unroundable_embeddings_are_refused_first(tmp_path):
    model = open_model(str(save_tiny_model(tmp_path / "model", "llama"))).model
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
    weights = load_file(folder / "model.safetensors")
    mixed = torch.Generator().manual_seed(0)
    low = torch.randn(32, 12, generator=mixed) @ torch.randn(12, 64, generator=mixed)
    weights["model.layers.1.mlp.down_proj.weight"] = low
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    data = ("--calibration", text_file, "--length", 32, "--leakage", "off")
    data = (*data, "--rows", 16)
    two = tmp_path / "two"
    calmix("prune", folder, *data, "--bits", 4, "--embeddings", 2, "-o", two).ok()
    for way in ("blocks", "distill"):
        made = tmp_path / way
        how = (*data, "--method", way, "--epochs", 1)
        calmix("recover", two, "--against", folder, *how, "-o", made).ok()
        name = "model.embed_tokens.weight"
        assert torch.equal(load_weights(made)[name], load_weights(two)[name])
        calmix("export", made, "--to", "pack", "-o", tmp_path / f"{way}-pack").ok()
        back = tmp_path / f"{way}-back"
        calmix("export", tmp_path / f"{way}-pack", "--to", "model", "-o", back).ok()
        assert hashes(back) == hashes(made)
