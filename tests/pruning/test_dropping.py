"""Whole experts dropped: scores by definition, smaller checkpoints that load, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calmix.errors import InputError
from calmix.models import find_blocks
from calmix.pruning.dropping import ScorePass, choose
from calmix.pruning.engine import run_through
from tests.pruning.test_experts import routed_inputs
from tests.tiny import save_tiny_model, tiny_ids, tiny_model

SMALL = ("--rows", 6, "--length", 32)
KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text")


def scores_of(model, ids):
    look = ScorePass(model, find_blocks(model))
    run_through(look, ids, 5 * 32)
    return look.scores


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_scores_are_those_of_the_definition(kind):
    model, ids = tiny_model(kind), tiny_ids(6)
    found = scores_of(model, ids)
    assert len(found) == 2
    for name, scores in found.items():
        module = model.get_submodule(name)
        hidden, index, gates = routed_inputs(model, module, ids)
        for expert, score in enumerate(scores):
            parts = []
            for token, place in (index == expert).nonzero().tolist():
                own = torch.tensor([[expert]])
                with torch.no_grad():
                    made = module(hidden[token : token + 1], own, torch.ones(1, 1))
                parts.append(float(gates[token, place] / gates[token].sum() * made.norm()))
            assert score == pytest.approx(sum(parts) / len(parts), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_checkpoint_computes_what_the_router_left_gives(
    calmix, tmp_path, text_file, kind
):
    """With the dropped experts' router outputs at minus infinity the dense model does the same."""
    folder = save_tiny_model(tmp_path / "model", kind)
    output = tmp_path / "out"
    ended = calmix(
        "prune", folder, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "-o", output,
        "--drop-experts", 0.25 if kind != "deepseek_v3" else 0.4, "--only", "*.o_proj",
    )  # fmt: skip
    if kind == "deepseek_v3":  # two groups of two, and a group needs two for its score
        assert ended.code == 2
        assert "drop fewer" in ended.line or "leaves" in ended.line
        return
    assert ended.code == 0, ended.err
    told = json.loads((output / "calmix.json").read_text())["pruning"]
    assert [len(one["kept"]) for one in told["dropped"]] == [3] * len(told["dropped"])
    small = AutoModelForCausalLM.from_pretrained(output)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    before, after = dense.state_dict(), small.state_dict()
    for one in told["dropped"]:
        kept = torch.tensor(one["kept"])
        gone = next(e for e in range(4) if e not in one["kept"])
        assert one["scores"][gone] == min(one["scores"])
        for name, value in before.items():
            if name.startswith(one["name"]):
                assert torch.equal(after[name], value[kept]), name
    size = sum(p.stat().st_size for p in output.glob("*.safetensors"))
    assert size < sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert load_file(output / "model.safetensors").keys() < load_file(
        folder / "model.safetensors"
    ).keys() or kind in ("gpt_oss", "granitemoe", "llama4_text")
    with torch.no_grad():
        assert torch.isfinite(small(tiny_ids(2)).logits).all()
    assert not (tmp_path / "out.unfinished").exists()


def test_the_choice_is_of_the_least_scores_in_every_group():
    assert choose([3.0, 1.0, 2.0, 4.0], 0.25, chosen=2) == [0, 2, 3]
    assert choose([3, 1, 2, 9, 0, 8, 7, 6], 0.25, 2, chosen=2) == [0, 2, 3, 5, 6, 7]
    assert choose([1.0, 1.0, 1.0, 1.0], 0.5, chosen=2) == [0, 1]
    with pytest.raises(InputError, match=r"leaves 1 of the 4 experts .* sent to 2: drop fewer"):
        choose([1, 2, 3, 4], 0.75, chosen=2)
    with pytest.raises(InputError, match="drops none of the 4 experts"):
        choose([1, 2, 3, 4], 0.1, chosen=2)


@pytest.mark.parametrize(
    ("kind", "share", "said"),
    [
        ("llama", 0.25, "--drop-experts has no effect: this model has no experts"),
        ("mixtral", 0.75, "every token is sent to 2: drop fewer"),
        ("mixtral", 1.5, "is not between 0 and 1"),
    ],
)
def test_what_cannot_be_dropped_is_one_line(calmix, tmp_path, text_file, kind, share, said):
    folder = save_tiny_model(tmp_path / "model", kind)
    ended = calmix(
        "prune", folder, "--calibration", text_file, *SMALL, "--sparsity", 0.5,
        "--drop-experts", share, "-o", tmp_path / "out",
    )  # fmt: skip
    assert ended.code == 2
    assert said in ended.line
    assert not (tmp_path / "out.unfinished").exists()
