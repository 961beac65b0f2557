"""Embeddings and output head rounded: in memory and from disk, whole or resumed."""

import json

import pytest
import torch

from calmix.models import open_model
from calmix.models.blocks import outer_weights, tied
from calmix.models.streaming import StreamedModel
from calmix.pruning import prune
from calmix.pruning.engine import Run
from calmix.pruning.solvers.grids import read_grids
from tests.pruning.test_streamed import check_same, streamed_prune
from tests.tiny import (
    ARCHITECTURES,
    MIXTURES,
    hashes,
    load_weights,
    quick,
    save_tiny_model,
    tiny_ids,
)

SMALL = ("--rows", 6, "--length", 32, "--leakage", "off", "--bits", 4)


@pytest.mark.parametrize("kind", quick(("llama", "gemma2", "opt", "gpt2", "mixtral"),
                                       (*ARCHITECTURES, *MIXTURES)))  # fmt: skip
def test_both_are_rounded_and_nothing_else_outside_the_blocks(kind, tmp_path):
    folder = save_tiny_model(tmp_path / "model", kind)
    dense, model = open_model(str(folder)).model, open_model(str(folder)).model
    prune(dense, tiny_ids(), bits=4)
    report = prune(model, tiny_ids(), bits=4, embeddings=4)
    changed = {name for (name, one), (_, other) in zip(
        model.named_parameters(), dense.named_parameters(), strict=True)
        if not torch.equal(one, other)}  # fmt: skip
    assert changed == report.embeddings.keys()
    assert len(changed) == 2 - tied(model)
    for name in changed:
        assert report.embeddings[name] == pytest.approx(4, abs=0.7)  # 2 bytes a row or column weigh
        grid, value = report.grids[name], model.get_parameter(name)
        assert torch.equal(grid.values(grid.levels(value)).to(value.dtype), value)
    wide = {id(weight) for weight in outer_weights(model)}
    assert wide == {id(model.get_parameter(name)) for name in changed}


def test_the_head_loses_less_on_what_it_sees(tmp_path):
    """Than if its weights were just rounded."""
    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=False)
    ids, apart = tiny_ids(), []
    for calibrated in (True, False):
        model = open_model(str(folder)).model
        with pytest.MonkeyPatch.context() as patched:
            if not calibrated:
                patched.setattr(Run, "_seen_by_head", lambda *_: None)
            prune(model, ids, pattern=0.01, embeddings=3)
        head = model.lm_head.weight
        dense = open_model(str(folder)).model
        seen = dense.model(input_ids=ids).last_hidden_state.flatten(0, 1)
        apart.append(float((seen @ (head - dense.lm_head.weight).T).norm()))
    assert apart[0] < 0.9 * apart[1]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma4_text", "phi", "opt"])
def test_weights_from_disk_are_those_in_memory(kind, tmp_path):
    folder = save_tiny_model(tmp_path / "model", kind)
    model = open_model(str(folder)).model
    prune(model, tiny_ids(), pattern=0.5, micro_tokens=5 * 32, embeddings=5)
    model.save_pretrained(tmp_path / "whole")
    found = streamed_prune(folder, tmp_path / "out", embeddings=5)
    check_same(found, load_weights(tmp_path / "whole"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma4_text"])
def test_a_killed_run_goes_on_to_the_same_bytes(calmix, text_file, tmp_path, monkeypatch, kind):
    folder = save_tiny_model(tmp_path / "model", kind)
    command = ("prune", folder, "--calibration", text_file, *SMALL, "--embeddings", 5, "-o")
    calmix(*command, tmp_path / "whole").ok()
    told = json.loads((tmp_path / "whole" / "calmix.json").read_text(encoding="utf-8"))
    found, grids = load_weights(tmp_path / "whole"), read_grids(tmp_path / "whole")
    for name in told["pruning"]["embeddings"]:
        grid = grids[name]
        assert torch.equal(grid.values(grid.levels(found[name])).to(found[name].dtype), found[name])

    for at in ("block", "outside"):
        with monkeypatch.context() as patched:
            patched.setattr(Run, at, stopping(getattr(Run, at), after=1 if at == "block" else 0))
            assert calmix(*command, tmp_path / at).code == 130
        calmix(*command, tmp_path / at, "--resume").ok()
        assert hashes(tmp_path / at) == hashes(tmp_path / "whole")


def stopping(act, after):
    """Return a method that is interrupted once it has run so often."""
    left = [after]

    def stopped(self, *given):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return act(self, *given)

    return stopped


def test_a_file_that_holds_the_head_too_holds_it_rounded(tmp_path, calmix, text_file):
    """Of a model whose head is its embeddings some files have both."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    source = StreamedModel(str(folder))
    assert tied(source.model)
    source.close()
    calmix("prune", folder, "--calibration", text_file, *SMALL, "--embeddings", 5,
           "-o", tmp_path / "out").ok()  # fmt: skip
    found = load_weights(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_mistakes_are_one_line(calmix, text_file, tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    command = ("prune", folder, "--calibration", text_file, *SMALL, "-o", tmp_path / "no")
    assert "less than or equal to 6" in calmix(*command, "--embeddings", 8).line
    assert "greater than or equal to 2" in calmix(*command, "--embeddings", 1).line
    assert not (tmp_path / "no").exists()
