"""Methods with a refit: the same mask, never a larger error, and what it needs is planned for."""

import pytest
import torch

from calmix.errors import InputError
from calmix.pruning import prune
from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import SemiStructured, Unstructured
from calmix.pruning.solvers import refit
from calmix.specs import prune_request
from tests.tiny import tiny_ids, tiny_model


def problem(rows=24, columns=48):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), x.T @ x


def error(weight, pruned, gram):
    lost = (weight - pruned).double()
    return float((lost @ gram.double() * lost).sum())


@pytest.mark.parametrize("pattern", [Unstructured(0.6), SemiStructured(2, 4)])
@pytest.mark.parametrize("name", ["sparsegpt", "wanda", "ria", "magnitude"])
def test_a_refit_keeps_the_mask_and_lowers_the_error(name, pattern):
    weight, gram = problem()
    plain, fitted = get_method(name), get_method(name, refit=10)
    own = {None: None, Gram: gram}.get(plain.needs, gram.diagonal())
    before = plain.solve([weight], own, [pattern])
    after = fitted.solve([weight], gram, [pattern])
    assert torch.equal(before.weights[0] == 0, after.weights[0] == 0)
    assert after.pruned == before.pruned == [int((after.weights[0] == 0).sum())]
    least = error(weight, before.weights[0], gram)
    assert error(weight, after.weights[0], gram) < least * (1 if name == "sparsegpt" else 0.7)


OWN = ["sparsegpt", "admm", "wanda", "ria", "magnitude"]


@pytest.mark.parametrize("text", [*OWN, "sparsegpt,refit=2", "wanda,refit=2", "magnitude,refit=2"])
def test_inputs_that_never_fired_are_counted(text):
    weight, gram = problem()
    gram[[3, 7]] = 0
    gram[:, [3, 7]] = 0
    method = get_method(text)
    statistic = {None: None, Gram: gram}.get(method.needs, gram.diagonal())
    made = method.solve([weight] * 2, statistic, [Unstructured(0.5)] * 2)
    assert int(made.dead) == (0 if text == "magnitude" else 2)
    assert len(made.weights) == len(made.pruned) == 2
    with pytest.raises(ValueError, match="shorter"):  # every layer has a pattern
        method.counts([weight] * 2, [Unstructured(0.5)])


def test_options_reach_the_solver():
    weight, gram = problem()
    half = [Unstructured(0.5)]
    made = get_method("admm,iterations=3,rho=2,damping=0.1,refit=1").solve([weight], gram, half)
    assert (made.damping, made.dtype) == (0.1, torch.float32)
    for other in ("iterations=2", "rho=1", "damping=0.5", "refit=0"):
        key, _, value = other.partition("=")
        options = {"iterations": 3, "rho": 2, "damping": 0.1, "refit": 1} | {key: value}
        less = get_method("admm", **options).solve([weight], gram, half)
        assert not torch.equal(made.weights[0], less.weights[0]), other
    linear = get_method("ria,power=1").solve([weight], gram.diagonal(), half)
    assert not torch.equal(
        linear.weights[0], get_method("ria").solve([weight], gram.diagonal(), half).weights[0]
    )
    damped = get_method("sparsegpt,damping=0.3").solve([weight], gram, half)
    assert (damped.damping, damped.dtype) == (0.3, torch.float32)
    chosen = get_method("wanda").solve([weight], gram.diagonal(), half).weights
    fitted = get_method("wanda,refit=3").solve([weight], gram, half).weights
    assert torch.equal(fitted[0], refit.refit([weight], chosen, gram, steps=3).weights[0])


def test_the_engine_gathers_what_a_refit_needs():
    plain, fitted = tiny_model("llama"), tiny_model("llama")
    before = prune(plain, tiny_ids(), method="wanda", pattern=Unstructured(0.6))
    after = prune(fitted, tiny_ids(), method="wanda", pattern=Unstructured(0.6), refit=8)
    assert before.sparsity == after.sparsity
    assert all(layer.error is None for layer in before.layers)
    assert all(0 < layer.error < 1 for layer in after.layers)
    assert after.options["refit"] == 8
    prune(tiny_model("llama"), tiny_ids(), method="magnitude", pattern=Unstructured(0.5), refit=3)


def test_a_refit_without_data_is_one_line():
    with pytest.raises(InputError, match="method magnitude needs --calibration"):
        prune_request(method="magnitude", sparsity=0.5, refit=5)
    with pytest.raises(InputError, match="refit"):
        prune_request(method="wanda", sparsity=0.5, refit=-1, calibration="x")
    with pytest.raises(InputError, match="iterations has no effect with method wanda"):
        prune_request(method="wanda", sparsity=0.5, iterations=3, calibration="x")
