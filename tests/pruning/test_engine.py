"""The engine against plain reference loops over whole forward passes, on many architectures."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from calmix.errors import InputError, ModelError, SolverError
from calmix.models.blocks import find_blocks
from calmix.pruning.engine import prune
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import Solution, get_method
from calmix.pruning.methods.magnitude import Magnitude
from calmix.pruning.patterns import SemiStructured, Unstructured
from tests.tiny import ARCHITECTURES, MIXTURES, quick, tiny_ids, tiny_model

HALF = Unstructured(0.5)


def weights_of(model):
    return {layer.name: layer.view().float().clone() for layer in find_blocks(model).layers}


def check_equal(ours, theirs):
    """All parameters have the same bytes."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def given_to(module, model, ids):
    """What a module is given, call by call, over a whole forward pass of the model."""
    given = []

    def hook(_, args, more):
        given.append((*args, *more.values()))

    with module.register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        model(ids, use_cache=False)
    return given


def input_gram(model, module, ids):
    """The Gram matrix of one module's input."""
    flat = [x.reshape(-1, x.shape[-1]).double() for x, *_ in given_to(module, model, ids)]
    return sum(x.T @ x for x in flat).float()


@pytest.mark.parametrize(
    "kind",
    quick(["phi3", "bloom", "qwen2_moe", "granitemoe"], (*ARCHITECTURES, *MIXTURES)),
)
def test_architectures_are_pruned_exactly(kind):
    model, ids = tiny_model(kind), tiny_ids()
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = prune(model, ids, method="sparsegpt", pattern=HALF)
    pruned = weights_of(model)
    assert pruned.keys() == {layer.name for layer in report.layers}
    for name, weight in pruned.items():
        rows, columns = weight.shape
        blocks = [min(128, columns - at) for at in range(0, columns, 128)]
        assert int((weight == 0).sum()) == sum(round(0.5 * rows * width) for width in blocks), name
        others = ("embed", "head", "router", ".gate.", "expert_gate.")
        assert not any(part in f"{name}." for part in others), name
    held = {layer.parameter_name for layer in find_blocks(model).layers}
    for name, parameter in model.named_parameters():
        assert name in held or torch.equal(parameter, before[name]), f"{name} was changed"
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    assert all(0 < layer.error < 1 for layer in report.layers)
    assert bool(report.experts) == (kind in MIXTURES)
    assert any("shared" in name for name in pruned) == (
        kind in ("qwen2_moe", "deepseek_v3", "llama4_text")
    )
    semi = tiny_model(kind)
    how = (ids, "sparsegpt") if report.experts else (None, "magnitude")
    prune(semi, how[0], method=how[1], pattern=SemiStructured(2, 4))
    for name, weight in weights_of(semi).items():
        assert ((weight.view(len(weight), -1, 4) == 0).sum(-1) == 2).all(), name


@pytest.mark.parametrize(
    ("kind", "method", "paused"), [("llama", "sparsegpt", 0), ("gemma4_text", "wanda", 1)]
)
def test_restarted_blocks_give_the_same_bytes(kind, method, paused):
    """Of 12 rows in micro-batches of 5 the last one is smaller."""
    made, seen = [], []
    for few in (None, paused):
        model = tiny_model(kind)
        how = {"micro_tokens": 5 * 32, "paused": few, "progress": lambda *of: seen.append(of)}
        report = prune(model, tiny_ids(), method=method, pattern=HALF, **how)
        made.append((model, report.layers))
    check_equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
    blocks = len(find_blocks(model))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first == second == sorted(first)  # a pass that weighs tokens, then one that prunes
    assert first[-blocks:] == [(blocks + number + 1, 2 * blocks) for number in range(blocks)]


@pytest.mark.parametrize("paused", [None, 1])
def test_autocast_stays_inside_the_block(paused):
    """Autocast is one for all coroutines of a thread; a paused one must not leave it behind."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    reached = []

    def under_autocast(forward):
        def wrapped(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args, **kwargs)

        return wrapped

    for block in model.model.layers:
        block.forward = under_autocast(block.forward)
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: reached.append(torch.is_autocast_enabled("cpu"))
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
    gram, method = x.T @ x, get_method(name)
    weights = [torch.randn(rows, 96).bfloat16() for rows in (40, 700)]
    solved = method.solve(weights, gram, [HALF, SemiStructured(2, 4)])
    for weight, made in zip(weights, solved.weights, strict=True):
        dense, lost = weight.double(), weight.double() - made.bfloat16().double()
        exact = ((lost @ gram.double()) * lost).sum() / ((dense @ gram.double()) * dense).sum()
        assert relative_error(weight, made, gram) == pytest.approx(float(exact), rel=1e-4)


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
        with pytest.raises(ZeroDivisionError):
            prune(model, tiny_ids(), pattern=HALF)
    prune(model, tiny_ids(), pattern=HALF)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


# What is wrong with a model


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_non_finite_layers_are_named(method, monkeypatch):
    """Weights, inputs that overflow, and pruned weights that do not fit their type."""
    ids = None if method == "magnitude" else tiny_ids()
    for value in (torch.nan, torch.inf):
        model = tiny_model("llama")
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        with pytest.raises(SolverError, match=r"layers\.1\.mlp\.up_proj: its weights are not fini"):
            prune(model, ids, method=method, pattern=HALF)
    model = tiny_model("llama").half()
    if method == "magnitude":
        monkeypatch.setattr(
            Magnitude,
            "solve",
            lambda _, weights, *more: Solution([weight * 1e6 for weight in weights], [0]),
        )
        says = r"0\.self_attn\.q_proj: its pruned weights are not fini"
    else:
        for layer in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj):
            layer.weight.mul_(1000)
        says = r"0\.mlp\.down_proj: its inputs .* use --dtype bfloat16"
    with pytest.raises(SolverError, match=says):
        prune(model, ids, method=method, pattern=HALF)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_partial_failure_names_pruned_blocks(kind):
    model, ids = tiny_model(kind), tiny_ids()
    before = weights_of(model)
    find_blocks(model).prunables(1)[-1].view().view(-1)[0] = torch.nan
    with pytest.raises(SolverError, match="the model is left pruned in blocks 0 to 1: open it"):
        prune(model, ids, pattern=0.5)
    changed = {
        n.split(".layers.")[1][0]
        for n, w in weights_of(model).items()
        if not torch.equal(w, before[n])
    }
    assert changed == {"0", "1"}

    def interrupted(done, total):
        if done > total // 2:  # after the pass that weighs tokens
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="pruned in blocks 0 to 0"):
        prune(tiny_model(kind), ids, pattern=0.5, progress=interrupted)


def out_of_vocabulary(number):
    ids = tiny_ids()
    ids[7, 20] = number
    return ids


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


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: "a/b", r"open it first with calmix\.open_model\('a/b'\)\.model"),
        (lambda: torch.nn.Linear(4, 4), "no list of decoder blocks"),
        (half_in_bfloat16, "LlamaModel does not run on token ids in bfloat16: exp"),
        (piece_by_piece, r"rows of 32 tokens .* a shorter --length"),
    ],
)
def test_unsupported_models_are_refused(model, says):
    with pytest.raises((InputError, ModelError), match=says):
        prune(model(), tiny_ids(), pattern=0.5)


def test_invalid_requests_change_nothing():
    model = tiny_model("llama")
    before = weights_of(model)
    for ids, pattern, says in (
        (None, 0.5, "^sparsegpt needs calibration ids"),
        (torch.zeros(3, dtype=torch.int64), 0.5, "needs calibration ids"),
        (out_of_vocabulary(-1), 0.5, r"no embedding for token id -1 \(the last"),
        (out_of_vocabulary(320), 0.5, r"no embedding for token id 320 \(the"),
        (tiny_ids(), "2:5", "does not divide"),
    ):
        with pytest.raises((InputError, ModelError), match=says):
            prune(model, ids, pattern=pattern)
    assert all(torch.equal(weights_of(model)[name], weight) for name, weight in before.items())
