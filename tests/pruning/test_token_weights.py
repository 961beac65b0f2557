"""What errors cost by token, beside gradients of the whole model."""

from contextlib import contextmanager

import pytest
import torch

from calmix import prune
from calmix.models.blocks import find_blocks, outer_layers
from calmix.models.streaming import StreamedModel
from calmix.pruning import token_weights as module
from calmix.pruning.checkpoint import prune_checkpoint
from calmix.pruning.engine import costs_in_memory
from calmix.pruning.requests import prune_request
from calmix.pruning.token_weights import token_weights, weighting
from tests.pruning.test_engine import given_to
from tests.tiny import save_tiny_model, tiny_ids, tiny_model, tiny_text

CPU = torch.device("cpu")


def costs_of(model, ids):
    return token_weights(model, find_blocks(model), ids, device=CPU, rows_at_once=2)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
def test_costs_are_squared_gradients_of_the_whole_model(kind, monkeypatch):
    """Of the loss whose gradient at the logits is given, a stand-in for drawn tokens."""
    model, ids = tiny_model(kind), tiny_ids(3)

    def slopes(logits, rng):
        slope = torch.sin(torch.arange(logits.numel()).view_as(logits).to(logits.dtype))
        return slope, logits[:, 0].float()

    monkeypatch.setattr(module, "_drawn_slopes", slopes)
    costs = costs_of(model, ids)
    blocks, outputs = find_blocks(model), {}
    layers = {layer.name: layer.module for layer in blocks.layers if layer.expert is None}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *of, name=name: outputs.update({name: of[-1]}))
    for row in range(3):
        embedded = model.get_input_embeddings()(ids[row : row + 1]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        parts = logits[0].split(module.LOGIT_POSITIONS)
        loss = sum((part * slopes(part.detach(), None)[0]).sum() for part in parts)
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            expected = gradient.float().square().mean(-1).flatten()
            assert torch.allclose(costs[name][row], expected, rtol=1e-3, atol=1e-9), name
    assert costs.keys() >= {next(iter(outer_layers(model))), *layers}
    assert not any("experts" in name for name in costs)


def test_drawn_tokens_follow_the_prediction():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(20_000, 4)
    slopes, costs = module._drawn_slopes(logits, torch.Generator().manual_seed(0))
    shares = logits[0].softmax(-1)
    drawn = (shares - slopes).round()
    assert torch.equal(drawn.sum(-1), torch.ones(20_000))
    assert torch.allclose(drawn.mean(0), shares, atol=0.01)
    assert costs[0] == pytest.approx(float(slopes.square().mean()), rel=0.02)


def test_costs_depend_neither_on_groups_nor_on_what_is_in_memory(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    source, ids = StreamedModel(str(folder)), tiny_ids(5)

    @contextmanager
    def loaded(index):
        source.fetch_outside(head=True) if index is None else source.fetch(index)
        yield
        source.drop_outside() if index is None else source.drop(index)

    whole = costs_of(tiny_model("llama", tie_word_embeddings=True), ids)
    monkeypatch.setattr(module, "STORED", 1)
    how = {"device": CPU, "rows_at_once": 1, "loaded": loaded}
    streamed = token_weights(source.model, source.blocks, ids, **how)
    assert all(weight.is_meta for weight in source.model.parameters())
    source.close()
    assert streamed.keys() == whole.keys()
    for name, cost in whole.items():
        assert torch.allclose(streamed[name], cost, rtol=1e-4, atol=1e-9), name


def test_inputs_are_multiplied_by_a_power_of_the_mean_cost():
    costs = {"a": torch.full((4, 3), 4.0), "b": torch.full((4, 3), 16.0)}
    weigh, inputs = weighting(costs), torch.ones(2, 3, 5)
    assert torch.equal(weigh({"a": 7}, slice(1, 3), inputs), inputs * 2**0.5)
    assert torch.allclose(weigh({"a": 2, "b": 1}, slice(1, 3), inputs), inputs * 8**0.25)
    assert torch.equal(weighting(costs, 1)({"a": 7}, slice(1, 3), inputs), inputs * 2)
    assert weigh({"c": 7}, slice(1, 3), inputs) is inputs  # experts


def test_costs_predict_the_distance():
    """To second order, and on average over models: what is drawn is random."""
    predicted, measured = 0.0, 0.0
    for seed in range(6):
        model, ids = tiny_model("llama", seed=seed), tiny_ids()
        blocks = find_blocks(model)
        costs = costs_in_memory(model, blocks, ids)
        before = {layer.name: layer.view().clone() for layer in blocks.layers}
        inputs = {layer.name: given_to(layer.module, model, ids)[0][0] for layer in blocks.layers}
        with torch.no_grad():
            dense = model(input_ids=ids).logits.log_softmax(-1)
            prune(model, ids, method="gptq", pattern="6 bits", statistics="plain")
            for layer in blocks.layers:
                change = inputs[layer.name] @ (layer.view() - before[layer.name]).T
                lost = costs[layer.name] * change.square().sum(-1)
                predicted += float(lost.sum()) / (2 * ids.numel())
            after = model(input_ids=ids).logits.log_softmax(-1)
        measured += float((dense.exp() * (dense - after)).sum(-1).mean())
    assert predicted == pytest.approx(measured, rel=0.4)


def test_models_without_gradient_weigh_tokens_alike():
    model, ids = tiny_model("gemma3n_text"), tiny_ids()
    assert costs_in_memory(model, find_blocks(model), ids) == {}
    report = prune(model, ids, pattern=0.5)
    assert not report.weighted
    assert report.layers[0].shrinkage > 0


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """Prune a model with a cache; return the weights as stored, and whether tokens were weighed."""
    drawn = {"calibration": str(tiny_text(tmp_path / "text.txt")), "rows": 8, "length": 32}

    def made(model, name, cache, **options):
        monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / cache))
        notes, request = [], prune_request(**drawn, leakage="off", **options)
        prune_checkpoint(str(model), tmp_path / name, request, note=notes.append)
        files = [file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))]
        return files, any("weighing tokens" in one for one in notes)

    return made


def test_costs_of_a_set_are_computed_once(tiny_folder, tmp_path, pruned):
    """Another method has the same; without the cache, or with a damaged one, nothing changes."""
    first = pruned(tiny_folder, "first", "a", sparsity=0.5)
    other = pruned(tiny_folder, "other", "a", bits=4, method="gptq,group=32")
    again = pruned(tiny_folder, "again", "a", sparsity=0.5)
    [file] = (tmp_path / "a" / "token-weights").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    damaged = pruned(tiny_folder, "damaged", "a", sparsity=0.5)
    fresh = pruned(tiny_folder, "fresh", "b", sparsity=0.5)
    assert first == damaged == fresh == (again[0], True)
    assert not other[1]
    assert not again[1]


def test_costs_of_a_model_without_some_experts_are_its_own(tmp_path, pruned):
    """Also where no layer that is pruned tells the two models apart."""
    model = save_tiny_model(tmp_path / "model", "mixtral")
    how, fewer = {"skip": ["*experts*"], "sparsity": 0.5}, {"drop_experts": 0.5}
    pruned(model, "whole", "shared", **how)
    after, _ = pruned(model, "after", "shared", **how, **fewer)
    assert len([*(tmp_path / "shared" / "token-weights").iterdir()]) == 2
    assert after == pruned(model, "fresh", "own", **how, **fewer)[0]
