"""The engine on mixtures of experts, against plain loops with a Gram matrix per expert."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calmix.errors import ModelError
from calmix.models.blocks import find_blocks
from calmix.pruning.engine import Run, prune, run_through
from calmix.pruning.experts import SMOOTHING, Routed, starved
from calmix.pruning.gram import Gram, relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Unstructured
from tests.pruning.test_engine import given_to, input_gram, weights_of
from tests.pruning.toy import SMALL, pruning_of, wiring
from tests.tiny import MIXTURES, load_weights, quick, save_tiny_model, tiny_ids, tiny_model

HALF = Unstructured(0.5)
EVERY = 3  # of how many tokens one stands for all: two of four experts, and no factor of 32


def test_expert_modules_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts are separate modules"):
        prune(model, tiny_ids(), pattern=HALF)


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

    for inputs in wiring(model, ids):
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


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "gpt_neox", *EVERY_KIND])
@pytest.mark.parametrize(
    ("method", "propagation"), [("sparsegpt", "sequential"), ("wanda", "block")]
)
def test_experts_match_the_definition(kind, method, propagation):
    ids = tiny_ids()
    ours, theirs = tiny_model(kind), tiny_model(kind)
    found = find_blocks(ours)
    run = Run(ours, found, get_method(method), HALF, propagation)
    run_through(run, ids, 96)
    errors = reference(theirs, ids, method, HALF, propagation)
    expected, made = weights_of(theirs), weights_of(ours)
    same = torch.cat([((made[n] == 0) == (expected[n] == 0)).flatten() for n in made])
    assert same.float().mean() >= 0.999
    experts = [layer for layer in run.report.layers if layer.tokens is not None]
    assert len(experts) == sum(".experts." in name for name in made)
    assert bool(experts) == (kind in MIXTURES)
    for layer in run.report.layers:
        expected = errors[layer.name]
        assert layer.error == (None if expected is None else pytest.approx(expected, rel=0.01))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_expert_without_tokens_uses_all(kind):
    """Tokens that are all alike go to the same two experts; they are counted by source."""
    model, names = tiny_model(kind), ["prose", "code", "prose"]
    report = prune(model, torch.full((3, 32), 7), pattern=HALF, sources=names)
    assert len(report.experts) == sum(dense.reason == "router" for dense in report.dense)
    for mixture in report.experts:
        assert sorted(mixture.tokens) == [0, 0, 96, 96]
        assert list(mixture.sources) == ["prose", "code"]
        prose, code = mixture.sources.values()
        assert sorted(code) == [0, 0, 32, 32]
        assert mixture.tokens == [sum(pair) for pair in zip(prose, code, strict=True)]
    for name, weight in weights_of(model).items():
        assert int((weight == 0).sum()) == weight.numel() // 2, name
    assert {layer.tokens for layer in report.layers} == {None, 0, 96}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "model"
    return save_tiny_model(folder, "qwen3_moe", num_hidden_layers=4)


def test_starved_experts_warn(calmix, deep, tmp_path, text_file):
    few = ("--rows", 1, "--length", 16, "--leakage", "off", "--sparsity", 0.5)
    output = tmp_path / "out"
    ended = calmix("prune", deep, "--calibration", text_file, *few, "-o", output).ok()
    said = "of 16 experts see fewer tokens than they have inputs"
    assert said in ended.out
    told = pruning_of(output)
    names = [f"model.layers.{index}.mlp.experts" for index in range(4)]
    assert [mixture["name"] for mixture in told["experts"]] == names
    assert {sum(mixture["tokens"]) for mixture in told["experts"]} == {16 * 2}
    assert {dense["reason"] for dense in told["dense"]} == {"router"}
    seen = [("a.0.up", 8), ("a.1.up", 40), ("q", None)]
    layers = [SimpleNamespace(name=name, tokens=tokens, columns=32) for name, tokens in seen]
    assert starved(layers, 2).startswith("1 of 2 experts see")
    assert starved(layers, 2).endswith("worst a.0 with 8 for 32: use 8 rows")
    assert starved(layers[1:], 2) is None


def test_only_and_skip(calmix, deep, text_file, tmp_path):
    output = tmp_path / "out"
    names = ("--only", "*.mlp.*", "--skip", r"re:experts\.3\.", "--skip", "*.layers.0.*")
    asked = ("prune", deep, "--calibration", text_file, *SMALL, "--sparsity", 0.5, *names)
    calmix(*asked, "-o", output).ok()
    before, after = (load_weights(f) for f in (deep, output))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in (1, 2, 3)
        for expert in (0, 1, 2)
        for part in ("gate", "up", "down")
    }
    told = pruning_of(output)
    assert (told["weights"], told["pruned"]) == (27 * 32 * 32, 27 * 32 * 16)
    assert {dense["reason"] for dense in told["dense"]} == {"router", "skipped"}
