"""Mixtures of experts: pruned as plain loops with a Gram matrix per expert do, or dropped whole."""

import itertools
import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from calmix import Unstructured, prune
from calmix.errors import ModelError
from calmix.models.blocks import Mixture, find_blocks
from calmix.pruning.engine import Run, run_through
from calmix.pruning.expert_pruning import ScorePass, chosen_experts, cut
from calmix.pruning.experts import SMOOTHING, Routed, starved
from calmix.pruning.gram import Gram, relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.report import Dropped
from calmix.pruning.requests import prune_request
from calmix.pruning.trace import Calls, observe_block
from tests.pruning.test_engine import given_to, input_gram, weights_of
from tests.pruning.toy import SMALL, cases, pruning_of, refused
from tests.tiny import MIXTURES, load_weights, quick, save_tiny_model, tiny_ids, tiny_model

HALF = Unstructured(0.5)
EVERY = 3  # of how many tokens one stands for all: two of four experts, and no factor of 32


def inputs_of(model, routed, ids, step):
    """Yield the inputs of every expert at a step: its own tokens and a sample of all."""
    module, count = routed.module, routed.mixture.count
    hidden, *chosen = given_to(module, model, ids)[0]
    flat = hidden.reshape(-1, hidden.shape[-1])
    for expert in range(count):
        if chosen:
            own, every = flat[(chosen[0] == expert).any(-1)], flat[::EVERY]
        else:  # Llama 4: an expert's tokens after another's, scaled by the router
            apart = flat.view(count, -1, flat.shape[-1])
            used = (apart != 0).any(-1)
            own, every = apart[expert][used[expert]], (apart.sum(0) / used.sum(0)[:, None])[::EVERY]
        if step:
            own, every = (neurons(module, expert, x) for x in (own, every))
        yield own, every


def neurons(module, expert, x):
    """What an expert's last linear map is applied to."""
    weight = module.gate_up_proj[expert]
    both = x @ (weight if weight.shape[0] == x.shape[1] else weight.T)
    if hasattr(module, "gate_up_proj_bias"):
        both = both + module.gate_up_proj_bias[expert]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(both)
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def reference(model, ids, method, pattern, propagation):
    """Prune as the definition says, with Gram matrices in float64; return output errors."""
    kind, errors = get_method(method), {}

    def solve(layers, gram):
        gram = gram.float()
        weights = [layer.view().float() for layer in layers]
        statistic = gram if kind.name == "sparsegpt" else gram.diagonal()
        solved = kind.solve(weights, statistic, [pattern] * len(weights))
        for layer, dense, weight in zip(layers, weights, solved.weights, strict=True):
            known = kind.needs is Gram
            errors[layer.name] = float(relative_error(dense, weight, gram)) if known else None
            todo.append((layer, weight)) if propagation == "block" else layer.view().copy_(weight)

    found = find_blocks(model)
    hidden, batch = Calls(model, found, ids[:1, :8]).record(ids[:1, :8])
    for inputs, _ in [observe_block(found, at, batch, hidden) for at in range(len(found))]:
        todo = []
        for shared in inputs:
            if not isinstance(shared, Routed):
                solve(shared, input_gram(model, shared[0].module, ids))
                continue
            for number, step in enumerate(shared.steps):
                for expert, (own, every) in enumerate(inputs_of(model, shared, ids, number)):
                    gram, whole = (x.double().T @ x.double() for x in (own, every))
                    solve(step.layers[expert], gram + SMOOTHING * whole / len(every))
        for layer, weight in todo:
            layer.view().copy_(weight)
    return errors


EVERY_KIND = quick(["mixtral", "gpt_oss", "llama4_text"], MIXTURES)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", *EVERY_KIND])
@cases("method propagation", ("sparsegpt", "sequential"), ("wanda", "block"))
def test_experts_match_the_definition(kind, method, propagation):
    ids, ours, theirs = tiny_ids(), tiny_model(kind), tiny_model(kind)
    run = Run(ours, find_blocks(ours), get_method(method), HALF, propagation)
    run_through(run, ids, 96)
    errors = reference(theirs, ids, method, HALF, propagation)
    expected, made = weights_of(theirs), weights_of(ours)
    same = torch.cat([((made[n] == 0) == (expected[n] == 0)).flatten() for n in made])
    assert same.float().mean() >= 0.999
    experts = sum(layer.tokens is not None for layer in run.report.layers)
    assert experts == sum(".experts." in name for name in made)
    assert bool(experts) == (kind in MIXTURES)
    for layer in run.report.layers:
        error = errors[layer.name]
        assert layer.error == (error and pytest.approx(error, rel=0.01))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_expert_without_tokens_uses_all(kind):
    """Tokens that are all alike go to the same two experts."""
    model = tiny_model(kind)
    report = prune(model, torch.full((3, 32), 7), pattern=HALF)
    for name, weight in weights_of(model).items():
        assert int((weight == 0).sum()) == weight.numel() // 2, name
    assert {layer.tokens for layer in report.layers} == {None, 0, 96}


def test_starved_experts_and_only_some_layers(calmix, tmp_path, text_file):
    """A warning if experts see few tokens; of all layers, those named are pruned."""
    model, output = tmp_path / "model", tmp_path / "out"
    save_tiny_model(model, "qwen3_moe", num_hidden_layers=3)
    few = ("--rows", 1, "--length", 16, "--leakage", "off", "--sparsity", 0.5)
    names = ("--only", "*.mlp.*", "--skip", r"re:experts\.3\.", "--skip", "*.layers.0.*")
    ended = calmix("prune", model, "--calibration", text_file, *few, *names, "-o", output).ok()
    assert "of 6 experts see fewer tokens than they have inputs" in ended.out
    before, after = (load_weights(folder) for folder in (model, output))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    pairs = itertools.product((1, 2), (0, 1, 2), ("gate", "up", "down"))
    assert changed == {"model.layers.{}.mlp.experts.{}.{}_proj.weight".format(*of) for of in pairs}
    manifest = pruning_of(output)
    assert (manifest["weights"], manifest["pruned"]) == (18 * 32 * 32, 18 * 32 * 16)
    assert {dense["reason"] for dense in manifest["dense"]} == {"router", "skipped"}
    seen = [("a.0.up", 8), ("a.1.up", 40), ("q", None)]
    layers = [SimpleNamespace(name=name, tokens=tokens, columns=32) for name, tokens in seen]
    assert starved(layers, 2).startswith("1 of 2 experts see")
    assert starved(layers, 2).endswith("worst a.0 with 8 for 32: use 8 rows")
    assert starved(layers[1:], 2) is None


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
                made = module(hidden[token, None], torch.tensor([[expert]]), torch.ones(1, 1))
                parts.append(float(gates[token, place] / gates[token].sum() * made.norm()))
            assert score == pytest.approx(sum(parts) / len(parts), rel=1e-4)


DROP = (*SMALL, "--drop-experts", 0.25)
DROPPED = quick(["qwen3_moe", "gpt_oss"], ["mixtral", "granitemoe", "llama4_text"])


@pytest.mark.parametrize("kind", DROPPED)
def test_checkpoint_without_dropped_experts_loads(calmix, tmp_path, text_file, kind):
    folder, output = save_tiny_model(tmp_path / "model", kind), tmp_path / "out"
    how = (*DROP, "--sparsity", 0.5, "--only", "*.o_proj", "-o", output)
    calmix("prune", folder, "--calibration", text_file, *how).ok()
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
    """Equal groups, a bias an expert, the router as it was; nothing to predict further tokens."""
    folder = save_tiny_model(tmp_path / "model", "deepseek_v3", n_routed_experts=8)
    asked = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | asked
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    held, out = load_weights(folder), tmp_path / "out"
    second = {n: v.clone() for n, v in held.items() if ".layers.1." in n}
    more = {name.replace(".layers.1.", ".layers.2."): value for name, value in second.items()}
    more["model.layers.2.enorm.weight"] = torch.ones(32)
    save_file(held | more, folder / "model.safetensors", {"format": "pt"})
    ended = calmix("prune", folder, "--calibration", text_file, *DROP, "-o", out).ok()
    assert "model.layers.2: left out" in ended.err
    told = json.loads((out / "config.json").read_text(encoding="utf-8"))
    asked |= {"num_nextn_predict_layers": 0, "n_routed_experts": 6, "n_group": 2, "topk_group": 2}
    assert {key: told[key] for key in asked} == asked
    found, gate = load_weights(out), "model.layers.1.mlp.gate."
    assert found[f"{gate}weight"].shape == (6, 32)
    assert found[f"{gate}e_score_correction_bias"].shape == (6,)
    gone = {n for n in second if ".experts.6." in n or ".experts.7." in n}
    assert found.keys() == held.keys() - gone


def test_router_biases_are_cut():
    """LFM2 and AFMoE keep it beside the router, ERNIE with a dimension for groups."""
    ernie = "a.gate.moe_statics.e_score_correction_bias"
    before = {"a.expert_bias": (4,), "a.e_score_correction_bias": (4,), "a.gate.weight": (4, 8)}
    before |= {ernie: (1, 4), "a.experts.down_proj": (4, 8, 4), "a.experts.scale": (4, 4)}
    after = {"a.expert_bias": (3,), "a.e_score_correction_bias": (3,), "a.gate.weight": (3, 8)}
    after |= {ernie: (1, 3), "a.experts.down_proj": (3, 8, 4), "a.experts.scale": (3, 4)}
    others = {"a.shared_expert.down_proj.weight": (8, 4), "b.bias": (4,)}
    tensors = {name: torch.randn(*size) for name, size in (before | others).items()}
    one = Dropped("a.experts", [0.0] * 4, [0, 2, 3])
    made = cut([Mixture("a.experts", None, 4, ())], {one.name: one}, tensors)
    assert {name: tuple(value.shape) for name, value in made.items()} == after | others
    assert torch.equal(made[ernie], tensors[ernie][:, one.kept])


def test_lowest_scores_per_group_are_dropped():
    def left(scores, share, groups=1, reach=None, chosen=2):
        sizes = {"n_group": groups, "topk_group": reach, "num_experts_per_tok": chosen}
        config = AutoConfig.for_model("mixtral", **sizes)
        (made,) = chosen_experts(config, {"a": scores}, share)
        return made.kept

    assert left([3.0, 1.0, 2.0, 4.0], 0.25) == [0, 2, 3]
    assert left([3, 1, 2, 9, 0, 8, 7, 6], 0.25, 2) == [0, 2, 3, 5, 6, 7]
    assert left([1.0, 1.0, 1.0, 1.0], 0.5) == [0, 1]
    assert left([1.0] * 8, 0.5, 2, chosen=4) == [0, 1, 4, 5]
    refused("leaves 1 of the 4 experts of a, .* routed to 2: drop fewer", left, [1, 2, 3, 4], 0.75)
    refused("to 4 in 1 of 2 groups: drop", left, [1.0] * 8, 0.5, 2, reach=1, chosen=4)
    refused("drops none of the 4 experts of a", left, [1, 2, 3, 4], 0.1)


@pytest.mark.parametrize("how", ["table", "wider", "unseen", "separate"])
def test_mixtures_of_other_kinds_are_refused(how, monkeypatch):
    """DeepSeek V4 has a table of experts by token, LongCat experts that do nothing."""
    model, ids = tiny_model("mixtral"), tiny_ids(6)
    mixture = model.model.layers[1].mlp
    if how == "separate":
        mixture.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        says = r"layers\.1\.mlp\.experts are separate modules"
        return refused(says, prune, model, ids, pattern=HALF, error=ModelError)
    if how == "table":
        mixture.gate.register_buffer("table", torch.zeros(320, 2, dtype=torch.int64))
    elif how == "wider":
        some = mixture.experts.gate_up_proj.data
        mixture.experts.gate_up_proj = nn.Parameter(torch.cat([some, some[:2]]))
    else:
        monkeypatch.setattr(Routed, "learn", Mock(side_effect=ModelError("no inputs")))
    says, blocks = "--drop-experts does not support this architecture", find_blocks(model)
    refused(says, lambda: run_through(ScorePass(model, blocks), ids, 5 * 32), error=ModelError)


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
        refused(says, prune_request, **given | wrong)
