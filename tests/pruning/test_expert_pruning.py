"""Whole experts dropped: scores by definition, smaller checkpoints that load, what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from calmix.errors import InputError, ModelError
from calmix.models.blocks import Mixture, find_blocks
from calmix.pruning.engine import run_through
from calmix.pruning.expert_pruning import ScorePass, chosen_experts, cut
from calmix.pruning.experts import Routed
from calmix.pruning.report import Dropped
from calmix.specs import prune_request
from tests.pruning.test_engine import given_to
from tests.pruning.toy import SMALL, pruning_of
from tests.tiny import load_weights, quick, save_tiny_model, tiny_ids, tiny_model


@pytest.mark.parametrize("kind", quick(["gpt_oss"], ["mixtral", "qwen2_moe"]))
def test_expert_scores_match_the_definition(kind):
    model, ids = tiny_model(kind), tiny_ids(6)
    look = ScorePass(model, find_blocks(model))
    run_through(look, ids, 5 * 32)
    assert len(look.scores) == 2
    for name, scores in look.scores.items():
        module = model.get_submodule(name)
        hidden, index, gates = given_to(module, model, ids)[0]
        for expert, score in enumerate(scores):
            parts = []
            for token, place in (index == expert).nonzero().tolist():
                made = module(hidden[token : token + 1], torch.tensor([[expert]]), torch.ones(1, 1))
                parts.append(float(gates[token, place] / gates[token].sum() * made.norm()))
            assert score == pytest.approx(sum(parts) / len(parts), rel=1e-4)


def drop(folder, text, output, *more):
    asked = ("--calibration", text, *SMALL, "--drop-experts", 0.25, *more)
    return ("prune", folder, *asked, "-o", output)


@pytest.mark.parametrize(
    "kind", quick(["qwen3_moe", "gpt_oss"], ["mixtral", "granitemoe", "llama4_text"])
)
def test_checkpoint_without_dropped_experts_loads(calmix, tmp_path, text_file, kind):
    folder, output = save_tiny_model(tmp_path / "model", kind), tmp_path / "out"
    calmix(*drop(folder, text_file, output, "--sparsity", 0.5, "--only", "*.o_proj")).ok()
    told = pruning_of(output)
    dense, small = map(AutoModelForCausalLM.from_pretrained, (folder, output))
    before, after = dense.state_dict(), small.state_dict()
    for one in told["dropped"]:
        (gone,) = set(range(4)) - set(one["kept"])
        assert one["scores"][gone] == min(one["scores"])
        for name, value in before.items():
            if name.startswith(one["name"]):
                assert torch.equal(after[name], value[one["kept"]]), name
    assert sum(v.numel() for v in after.values()) < sum(v.numel() for v in before.values())
    apart = kind in ("mixtral", "qwen3_moe")  # the files hold experts one by one
    assert (load_weights(output).keys() < load_weights(folder).keys()) == apart
    assert torch.isfinite(small(tiny_ids(2)).logits).all()
    assert not (tmp_path / "out.unfinished").exists()


def test_deepseek_configuration_fits_engines(calmix, tmp_path, text_file):
    """Groups of the same size, a bias an expert, the settings of the router as they were; and no
    layer that predicts further tokens, with a mixture of another size than the configuration says.
    """
    folder = save_tiny_model(tmp_path / "model", "deepseek_v3", n_routed_experts=8)
    asked = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | asked
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    held = load_weights(folder)
    second = {n: v.clone() for n, v in held.items() if ".layers.1." in n}
    more = {name.replace(".layers.1.", ".layers.2."): value for name, value in second.items()}
    more["model.layers.2.enorm.weight"] = torch.ones(32)
    save_file(held | more, folder / "model.safetensors", {"format": "pt"})
    ended = calmix(*drop(folder, text_file, tmp_path / "out")).ok()
    assert "model.layers.2: left out" in ended.err
    told = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    asked |= {"num_nextn_predict_layers": 0, "n_routed_experts": 6, "n_group": 2, "topk_group": 2}
    assert {key: told[key] for key in asked} == asked
    found = load_weights(tmp_path / "out")
    gate = "model.layers.1.mlp.gate."
    assert found[f"{gate}weight"].shape == (6, 32)
    assert found[f"{gate}e_score_correction_bias"].shape == (6,)
    gone = {n for n in second if ".experts.6." in n or ".experts.7." in n}
    assert found.keys() == held.keys() - gone


def test_router_biases_are_cut():
    """LFM2 and AFMoE keep it beside the router, ERNIE with a dimension for groups."""
    sizes = {
        "a.expert_bias": (4,),
        "a.e_score_correction_bias": (4,),
        "a.gate.weight": (4, 8),
        "a.gate.moe_statics.e_score_correction_bias": (1, 4),
        "a.experts.down_proj": (4, 8, 4),
        "a.shared_expert.down_proj.weight": (8, 4),
        "a.experts.scale": (4, 4),
        "b.bias": (4,),
    }
    tensors = {name: torch.randn(*size) for name, size in sizes.items()}
    one = Dropped("a.experts", [0.0] * 4, [0, 2, 3])
    made = cut([Mixture("a.experts", None, 4, ())], {one.name: one}, tensors)
    assert {name: tuple(value.shape) for name, value in made.items()} == sizes | {
        "a.expert_bias": (3,),
        "a.e_score_correction_bias": (3,),
        "a.gate.weight": (3, 8),
        "a.gate.moe_statics.e_score_correction_bias": (1, 3),
        "a.experts.down_proj": (3, 8, 4),
        "a.experts.scale": (3, 4),
    }
    name = "a.gate.moe_statics.e_score_correction_bias"
    assert torch.equal(made[name], tensors[name][:, one.kept])


def test_lowest_scores_per_group_are_dropped():
    def left(scores, share, groups=1, reach=None, chosen=2):
        config = AutoConfig.for_model(
            "mixtral", n_group=groups, topk_group=reach, num_experts_per_tok=chosen
        )
        (made,) = chosen_experts(config, {"a": scores}, share)
        return made.kept

    assert left([3.0, 1.0, 2.0, 4.0], 0.25) == [0, 2, 3]
    assert left([3, 1, 2, 9, 0, 8, 7, 6], 0.25, 2) == [0, 2, 3, 5, 6, 7]
    assert left([1.0, 1.0, 1.0, 1.0], 0.5) == [0, 1]
    assert left([1.0] * 8, 0.5, 2, chosen=4) == [0, 1, 4, 5]
    for scores, share, how, says in (
        ([1, 2, 3, 4], 0.75, {}, "leaves 1 of the 4 experts of a, .* routed to 2: drop fewer"),
        ([1.0] * 8, 0.5, {"groups": 2, "reach": 1, "chosen": 4}, "to 4 in 1 of 2 groups: drop"),
        ([1, 2, 3, 4], 0.1, {}, "drops none of the 4 experts of a"),
    ):
        with pytest.raises(InputError, match=says):
            left(scores, share, **how)


@pytest.mark.parametrize("how", ["table", "wider", "unseen"])
def test_undroppable_experts_are_refused(how, monkeypatch):
    """DeepSeek V4 has a table of experts by token, LongCat experts that do nothing."""
    model = tiny_model("mixtral")
    mixture = model.model.layers[1].mlp
    if how == "table":
        mixture.gate.register_buffer("table", torch.zeros(320, 2, dtype=torch.int64))
    elif how == "wider":
        some = mixture.experts.gate_up_proj.data
        mixture.experts.gate_up_proj = torch.nn.Parameter(torch.cat([some, some[:2]]))
    else:

        def unseen(self, *given):
            raise ModelError("no inputs")

        monkeypatch.setattr(Routed, "learn", unseen)
    with pytest.raises(ModelError, match="--drop-experts does not support this architecture"):
        run_through(ScorePass(model, find_blocks(model)), tiny_ids(6), 5 * 32)


def test_options_without_effect_on_a_drop(text_file):
    given = {"calibration": str(text_file), "drop_experts": 0.25}
    for method in ("magnitude", "wanda"):  # text for what is left, or none
        assert prune_request(method=method, sparsity="0.5", **given).drop_experts == 0.25
    for wrong, says in (
        ({"method": "wanda"}, "method has no effect if only experts are dropped"),
        ({"calibration": None}, "--drop-experts needs --calibration"),
        ({"method": "magnitude", "sparsity": "0.5", "propagation": "block"}, "propagation has no"),
        ({"drop_experts": None}, "give either --sparsity"),
    ):
        with pytest.raises(InputError, match=says):
            prune_request(**given | wrong)
