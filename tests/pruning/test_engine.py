"""The engine against plain reference loops over whole forward passes, on many architectures."""

import re
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from calmix import SemiStructured, Unstructured, prune
from calmix.errors import InputError, ModelError, SolverError
from calmix.models.blocks import find_blocks
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import Solution, get_method
from calmix.pruning.methods.magnitude import Magnitude
from tests.pruning.toy import EVERY, cases, refused
from tests.tiny import MIXTURES, quick, tiny_ids, tiny_model

HALF = Unstructured(0.5)


def weights_of(model):
    return {layer.name: layer.view().float().clone() for layer in find_blocks(model).layers}


def check_equal(ours, theirs):
    """All parameters have the same bytes."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def given_to(module, model, ids):
    """What a module is given, call by call, over a whole forward pass of the model."""
    given, kept = [], lambda _, args, more: given.append((*args, *more.values()))
    with module.register_forward_pre_hook(kept, with_kwargs=True), torch.no_grad():
        model(ids, use_cache=False)
    return given


def input_gram(model, module, ids):
    """The Gram matrix of one module's input."""
    flat = [x.reshape(-1, x.shape[-1]).double() for x, *_ in given_to(module, model, ids)]
    return sum(x.T @ x for x in flat).float()


@pytest.mark.parametrize("kind", quick(["phi3", "bloom", "qwen2_moe", "granitemoe"], EVERY))
def test_architectures_are_pruned_exactly(kind):
    model, ids = tiny_model(kind), tiny_ids()
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = prune(model, ids, method="sparsegpt", pattern=HALF)
    pruned = weights_of(model)
    assert pruned.keys() == {layer.name for layer in report.layers}
    for name, weight in pruned.items():
        blocks = weight.split(128, dim=1)
        assert int((weight == 0).sum()) == sum(round(0.5 * one.numel()) for one in blocks), name
        assert not re.search(r"embed|head|router|\.gate\.|expert_gate\.", f"{name}."), name
    held = {layer.parameter_name for layer in find_blocks(model).layers}
    for name, parameter in model.named_parameters():
        assert name in held or torch.equal(parameter, before[name]), f"{name} was changed"
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    assert all(0 < layer.error < 1 for layer in report.layers)
    experts = any(layer.tokens is not None for layer in report.layers)
    assert experts == (kind in MIXTURES)
    shared = any("shared" in name for name in pruned)
    assert shared == (kind in ("qwen2_moe", "deepseek_v3", "llama4_text"))
    semi = tiny_model(kind)
    rows, method = (ids, "sparsegpt") if experts else (None, "magnitude")
    prune(semi, rows, method=method, pattern=SemiStructured(2, 4))
    for name, weight in weights_of(semi).items():
        assert ((weight.view(len(weight), -1, 4) == 0).sum(-1) == 2).all(), name


@cases("kind method paused", ("llama", "sparsegpt", 0), ("gemma4_text", "wanda", 1))
def test_restarted_blocks_give_the_same_bytes(kind, method, paused):
    """Of 12 rows in micro-batches of 5 the last one is smaller."""
    made = []
    for few in (None, paused):
        model, seen = tiny_model(kind), []
        how = {"progress": lambda *of, to=seen: to.append(of), "method": method, "paused": few}
        report = prune(model, tiny_ids(), pattern=HALF, micro_tokens=5 * 32, **how)
        made.append((model, report.layers, seen))
    check_equal(made[0][0], made[1][0])
    assert made[0][1:] == made[1][1:]
    blocks = len(find_blocks(model))
    assert seen == sorted(seen)  # a pass that weighs tokens, then one that prunes
    assert seen[-blocks:] == [(blocks + number + 1, 2 * blocks) for number in range(blocks)]


@pytest.mark.parametrize("paused", [None, 1])
def test_autocast_stays_inside_the_block(paused):
    """Autocast is one for all coroutines of a thread; a paused one must not leave it behind."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    reached = []

    def under_autocast(forward, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    for block in model.model.layers:
        block.forward = partial(under_autocast, block.forward)
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda *_: reached.append(torch.is_autocast_enabled("cpu"))
        )
    report = prune(model, tiny_ids(), pattern=HALF, micro_tokens=5 * 32, paused=paused)
    assert not torch.is_autocast_enabled("cpu")
    assert len(reached) > 6
    assert all(reached)
    expected = prune(plain, tiny_ids(), pattern=HALF, micro_tokens=5 * 32)
    for ours, theirs in zip(report.layers, expected.layers, strict=True):
        assert ours.pruned == theirs.pruned
        assert ours.error == pytest.approx(theirs.error, rel=0.2)


def test_caller_settings_do_not_matter():
    """Autocast, gradients, and training mode, which is what it was again afterwards."""
    model, plain = tiny_model("gpt2"), tiny_model("gpt2")
    model.train()
    model.transformer.h[0].attn.eval()
    modes = [module.training for module in model.modules()]
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        prune(model, tiny_ids(), pattern=HALF)
    prune(plain, tiny_ids(), pattern=HALF)
    assert [module.training for module in model.modules()] == modes
    check_equal(model, plain)


@pytest.mark.parametrize("massive", [1.0, 1e3])
@pytest.mark.parametrize("name", ["admm", "sparsegpt,refit=4"])
def test_reported_errors_are_exact(name, massive):
    """The undamped share of output energy that the weights lose as they are stored."""
    x = torch.randn(500, 96, generator=torch.Generator().manual_seed(0)) + 0.3
    x[:, 5] *= massive
    gram, weights = x.T @ x, [torch.randn(rows, 96).bfloat16() for rows in (40, 700)]
    solved = get_method(name).solve(weights, gram, [HALF, SemiStructured(2, 4)])
    for weight, made in zip(weights, solved.weights, strict=True):
        dense, lost = weight.double(), weight.double() - made.bfloat16().double()
        exact = ((lost @ gram.double()) * lost).sum() / ((dense @ gram.double()) * dense).sum()
        assert relative_error(weight, made, gram) == pytest.approx(float(exact), rel=1e-4)


def test_shrinkage_does_not_depend_on_micro_batches():
    """OPT makes one row of all before its feed-forward layers."""
    for_each = []
    for micro in (2 * 32, 8 * 32):
        report = prune(tiny_model("opt"), tiny_ids(8), pattern=HALF, micro_tokens=micro)
        for_each.append([layer.shrinkage for layer in report.layers])
    assert for_each[0] == pytest.approx(for_each[1], rel=1e-3)


def test_reports_count_masked_weights():
    model = tiny_model("llama")
    for layer in find_blocks(model).prunables(0):
        layer.view()[:, ::3] = 0
    report = prune(model, tiny_ids(), pattern=0.2)
    assert report.sparsity == pytest.approx(0.2, abs=1e-3)
    assert sum(int((w == 0).sum()) for w in weights_of(model).values()) > report.pruned


def test_engine_leaves_no_hooks(monkeypatch):
    """Whether it fails or not."""
    model = tiny_model("llama")
    with monkeypatch.context() as patched:
        patched.setattr("calmix.pruning.engine.LayerReport", lambda *given: 1 / 0)
        refused("zero", prune, model, tiny_ids(), pattern=HALF, error=ZeroDivisionError)
    prune(model, tiny_ids(), pattern=HALF)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not {**module._forward_pre_hooks, **module._forward_hooks}


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_non_finite_layers_are_named(method, monkeypatch):
    """Weights, inputs that overflow, and pruned weights that do not fit their type."""
    ids = None if method == "magnitude" else tiny_ids()
    how = {"method": method, "pattern": HALF, "error": SolverError}
    for value in (torch.nan, torch.inf):
        model = tiny_model("llama")
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        refused(r"layers\.1\.mlp\.up_proj: its weights are not fini", prune, model, ids, **how)
    model = tiny_model("llama").half()
    first = model.model.layers[0].mlp
    for layer in () if method == "magnitude" else (first.up_proj, first.gate_proj):
        layer.weight.mul_(1000)
    large = Mock(side_effect=lambda weights, *_: Solution([one * 1e6 for one in weights], [0]))
    monkeypatch.setattr(Magnitude, "solve", large)
    says = r"0\.mlp\.down_proj: its inputs .* use --dtype bfloat16"
    if method == "magnitude":
        says = r"0\.self_attn\.q_proj: its pruned weights are not fini"
    refused(says, prune, model, ids, **how)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_partial_failure_names_pruned_blocks(kind):
    model, ids = tiny_model(kind), tiny_ids()
    before = weights_of(model)
    find_blocks(model).prunables(1)[-1].view().view(-1)[0] = torch.nan
    says = "the model is left pruned in blocks 0 to 1: open it"
    refused(says, prune, model, ids, pattern=0.5, error=SolverError)
    changed = {n for n, weight in weights_of(model).items() if not torch.equal(weight, before[n])}
    assert {name.split(".layers.")[1][0] for name in changed} == {"0", "1"}

    def interrupted(done, total):
        if done > total // 2:  # after the pass that weighs tokens
            raise KeyboardInterrupt

    how = {"pattern": 0.5, "progress": interrupted, "error": KeyboardInterrupt}
    refused("pruned in blocks 0 to 0", prune, tiny_model(kind), ids, **how)


def half_in_bfloat16():
    """As XLNet, which does not run in bfloat16."""
    model = tiny_model("llama").bfloat16()
    model.model.embed_tokens.float()
    return model


def piece_by_piece():
    """Its blocks run several times a row, with states of their own in between."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "embedding_dim": 64, "num_heads": 2}
    sizes |= {"num_blocks": 2, "num_hidden_layers": 2, "qk_dim_factor": 1.0, "chunk_size": 16}
    config = AutoConfig.for_model("xlstm", max_inference_chunksize=16, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@cases(
    "model says",
    (lambda: "a/b", r"open it first with calmix\.open_model\('a/b'\)\.model"),
    (lambda: torch.nn.Linear(4, 4), "no list of decoder blocks"),
    (half_in_bfloat16, "LlamaModel does not run on token ids in bfloat16: exp"),
    (piece_by_piece, r"rows of 32 tokens .* a shorter --length"),
)
def test_unsupported_models_are_refused(model, says):
    refused(says, prune, model(), tiny_ids(), pattern=0.5, error=(InputError, ModelError))


def test_invalid_requests_change_nothing():
    model = tiny_model("llama")
    outside = {number: tiny_ids() for number in (-1, 320)}
    for number, ids in outside.items():
        ids[7, 20] = number
    for ids, pattern, says in (
        (None, 0.5, "^sparsegpt needs calibration ids"),
        (torch.zeros(3, dtype=torch.int64), 0.5, "needs calibration ids"),
        (outside[-1], 0.5, r"no embedding for token id -1 \(the last"),
        (outside[320], 0.5, r"no embedding for token id 320 \(the"),
        (tiny_ids(), "2:5", "does not divide"),
    ):
        refused(says, prune, model, ids, pattern=pattern, error=(InputError, ModelError))
    check_equal(model, tiny_model("llama"))
