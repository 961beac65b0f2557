"""Mixtures of experts from disk to disk, under the names that checkpoints have."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from calmix.models.streaming import NotStreamableError, StreamedModel
from calmix.pruning.experts import starved
from tests.pruning.test_streamed import in_memory, streamed_prune
from tests.tiny import load_weights, save_tiny_model

SMALL = ("--rows", 6, "--length", 32, "--leakage", "off")


def test_a_checkpoint_of_merged_experts_keeps_its_names(tmp_path):
    """Not every tool that saves a model takes experts apart again."""
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    apart = load_weights(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    merged.pop("lm_head.weight")
    save_file(merged, folder / "model.safetensors", {"format": "pt"})
    found = streamed_prune(folder, tmp_path / "out")
    assert found.keys() == merged.keys() != apart.keys()
    in_memory(folder).save_pretrained(tmp_path / "whole")
    expected = load_weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_that_lacks_an_expert_is_no_model(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen3_moe")
    stored = load_weights(folder)
    del stored["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotStreamableError):
        StreamedModel(str(folder))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "model"
    return save_tiny_model(folder, "qwen3_moe", num_hidden_layers=4)


def test_starved_experts_are_told(calmix, deep, tmp_path, text_file):
    few = ("--rows", 1, "--length", 16, "--leakage", "off", "--sparsity", 0.5)
    output = tmp_path / "out"
    ended = calmix("prune", deep, "--calibration", text_file, *few, "-o", output).ok()
    said = "of 16 experts see fewer tokens than they have inputs"
    assert said in ended.out
    assert said in calmix("doctor", "inspect", output).out
    told = json.loads((output / "calmix.json").read_text())["pruning"]
    assert [mixture["name"] for mixture in told["experts"]] == [
        f"model.layers.{index}.mlp.experts" for index in range(4)
    ]
    for mixture in told["experts"]:
        assert sum(mixture["tokens"]) == 16 * 2
        assert mixture["tokens"] == next(iter(mixture["sources"].values()))
    assert {dense["reason"] for dense in told["dense"]} == {"router"}
    seen = [("a.0.up", 8), ("a.1.up", 40), ("q", None)]
    layers = [SimpleNamespace(name=name, tokens=tokens, columns=32) for name, tokens in seen]
    assert starved(layers, 2).startswith("1 of 2 experts see")
    assert starved(layers, 2).endswith("least a.0 with 8 for 32: 8 rows would do")
    assert starved(layers[1:], 2) is None


def test_names_choose_what_is_pruned(calmix, deep, text_file, tmp_path):
    output = tmp_path / "out"
    calmix(
        "prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o", output,
        "--only", "*.mlp.*", "--skip", r"re:experts\.3\.", "--skip", "*.layers.0.*",
    ).ok()  # fmt: skip
    before, after = (load_weights(f) for f in (deep, output))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in (1, 2, 3)
        for expert in (0, 1, 2)
        for part in ("gate", "up", "down")
    }
    told = json.loads((output / "calmix.json").read_text())["pruning"]
    assert (told["weights"], told["pruned"]) == (27 * 32 * 32, 27 * 32 * 16)
    assert {dense["reason"] for dense in told["dense"]} == {"router", "skipped"}
