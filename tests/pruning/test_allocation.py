"""Patterns by layer, in Python."""

import pytest
import torch

from calmix.errors import InputError
from calmix.models.blocks import find_blocks
from calmix.pruning.allocation import allocate
from calmix.pruning.engine import prune
from calmix.pruning.patterns import SemiStructured, Unstructured
from calmix.pruning.solvers.grids import Asymmetric, Symmetric
from tests.tiny import tiny_ids, tiny_model


def test_pattern_mapping():
    names = [layer.name for layer in find_blocks(tiny_model("llama")).layers]
    mixed = {n: SemiStructured(2, 4) if "mlp" in n else Unstructured(0.7) for n in names}
    report = prune(tiny_model("llama"), tiny_ids(), pattern=mixed)
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.5 if "mlp" in layer.name else 0.7, abs=1e-3)
    few = {name: Unstructured(0.5) for name in names[1:]}
    for pattern, says in (
        (few, f"the pattern lacks 1 layers, the first is {names[0]}$"),
        (few | {"x": Unstructured(0.5)}, "the pattern names 'x', which is not a layer"),
        (mixed | {names[0]: SemiStructured(2, 5)}, "does not divide the 32 inputs of model"),
    ):
        with pytest.raises(InputError, match=says):
            prune(tiny_model("llama"), tiny_ids(), pattern=pattern)


def test_whole_bits_by_what_they_lose():
    method, ids = "gptq,group=32", tiny_ids()
    for bits in (2, 3.5, 8):
        model = tiny_model("llama")
        chosen = allocate(model, ids, f"{bits} bits", method=method)
        sizes = {one.name: one.shape[0] * one.shape[1] for one in find_blocks(model).layers}
        total = sum(chosen[name].bits * size for name, size in sizes.items())
        assert 0.95 * bits < total / sum(sizes.values()) <= bits
        assert len({chosen[f"model.layers.0.self_attn.{one}_proj"] for one in "qkv"}) == 1
        report = prune(model, ids, method=method, pattern=chosen)
        assert {int(layer.bits) for layer in report.layers} == {one.bits for one in chosen.values()}
    wrong = {"1.5 bits": "gptq takes 2 to 8 bits, not 1.5", "0.5": "for a number of"}
    for target, says in wrong.items():
        with pytest.raises(InputError, match=says):
            allocate(tiny_model("llama"), ids, target, method=method)


@pytest.mark.parametrize("kind", [Symmetric, Asymmetric])
def test_nearest_levels(kind):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in range(2, 8):
        rounded = kind([weight], 16, bits).nearest(weight.T.contiguous(), torch.ones(32)).T
        groups = rounded.reshape(12, 16)
        assert max(len(set(one.tolist())) for one in groups) <= 2**bits
        errors.append(float((rounded - weight).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.25 * float(weight.square().mean())
