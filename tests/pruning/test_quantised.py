"""Quantisers against an independent loop in float64, and what users see of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from calmix import prune
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Rate, Unstructured, as_pattern
from calmix.pruning.requests import prune_request
from tests.pruning.test_methods import HALF, as_tensors, problem, solved, textbook_obs
from tests.pruning.toy import cases, refused
from tests.tiny import tiny_ids, tiny_model


@cases(
    "text pattern taken",
    ("gptq,group=8", "2 bits", 2 + 2),
    ("gptq,group=40", "4 bits", 4 + 16 / 40),
    ("gptq,group=60", "4 bits", 4 + 16 / 40),  # longer than a row
    ("sparsegpt,bits=4,group=8", "0.5", 2 + 1 + 2),  # levels, mask, scales
    ("ecq", "1.3 bits", None),
    ("ecq", "2.4 bits", None),
)
def test_levels_match_textbook_loop(text, pattern, taken):
    weight, gram = problem(rows=64 if text == "ecq" else 10)
    (w, h), target = as_tensors(weight, gram), as_pattern(pattern)
    made = get_method(text).solve([w], h, [target])
    (grid,), (ours,) = made.grids, made.weights
    # Values are levels times scales: a level of one everywhere shows the scales.
    scale = grid.values(torch.ones(len(w), 40, dtype=torch.int16)).numpy().astype(np.float64)
    half = 2 if pattern == "2 bits" else 8

    def nearest(j, rest):
        column = rest[:, 0]
        level = column / np.where(scale[:, j], scale[:, j], 1)  # 0 where a whole group goes
        if text == "ecq":
            return np.sign(level) * np.floor(abs(level) + 0.42) * scale[:, j]
        return np.clip(np.round(level), -half, half - 1) * scale[:, j]

    sparse, zero = isinstance(target, Unstructured), (ours == 0).numpy()
    expected, _ = textbook_obs(weight, gram, mask=zero if sparse else None, nearest=nearest)
    near = np.isclose(ours.double().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert near.mean() > 0.98  # few lie between two levels, or behind one that does
    assert taken is None or grid.bits == pytest.approx(taken)
    assert made.pruned == [200 if sparse else zero.sum()]
    assert not sparse or 200 <= zero.sum() < 225  # some that are kept are rounded to zero


@pytest.mark.parametrize("group", [8, 24, 96])
def test_group_scale_uses_corrected_weights(group):
    """Also where groups are narrower than a panel of columns, or reach behind a block of them."""
    weight, gram = problem(rows=24, columns=192, tokens=800)
    h = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(192)
    importance = np.array([1 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(192)])
    scales = []

    def nearest(j, rest):  # the largest weight gets the lowest level of two bits or beyond
        if j % group == 0:
            values, best, least = rest[:, :group], np.zeros(24), np.full(24, np.inf)
            largest = values[np.arange(24), np.abs(values).argmax(1)]
            for shrink in (1, 0.92, 0.84, 0.76, 0.68, 0.6):
                scale = torch.tensor(largest / -2 * shrink).bfloat16().double().numpy()[:, None]
                wrong = values - np.clip(np.round(values / scale), -2, 1) * scale
                lost = wrong**2 @ importance[j : j + group]
                best, least = np.where(lost < least, scale[:, 0], best), np.minimum(lost, least)
            scales.append(best)
        return np.clip(np.round(rest[:, 0] / scales[-1]), -2, 1) * scales[-1]

    textbook_obs(weight, gram, nearest=nearest)
    w, h = as_tensors(weight, gram)
    (grid,) = get_method(f"gptq,group={group}").solve([w], h, [Rate(2)]).grids
    alike = np.isclose(grid.scale.numpy(), np.stack(scales, 1), rtol=2**-7)
    assert alike.mean() > 0.97  # a rounding can turn the choice between two scales, or a level


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_asymmetric_levels_reach_from_the_least_weight_to_the_largest(bits):
    """Of weights beside zero they use twice as many levels; zero stays one of them."""
    weight, gram = problem(rows=24, columns=64, tokens=800)
    w, h = as_tensors(weight + 0.5 * np.abs(weight).max(), gram)
    ways = ("gptq,group=32", "gptq,group=32,symmetric=false")
    other, made = (get_method(text).solve([w], h, [Rate(bits)]) for text in ways)
    lost = relative_error(w, other.weights[0], h)
    assert relative_error(w, made.weights[0], h) < 0.8 * lost
    (grid,) = made.grids
    assert grid.bits == pytest.approx(bits + (16 + bits) / 32)
    stored = made.weights[0].bfloat16().contiguous()
    levels = grid.levels(stored)
    assert torch.equal(grid.values(levels).bfloat16(), stored)
    low, high = levels.view(24, 2, 32).aminmax(dim=-1)
    assert int((high.clamp(min=0) - low.clamp(max=0)).max()) == 2**bits - 1


def test_groups_need_bits():
    up, says = "model.layers.0.mlp.up_proj", r"group=\d+ has no effect .* without bits: add"
    for text in ("wanda,group=32", "sparsegpt,group=7", "magnitude,group=128"):
        for pattern in (0.5, {up: 0.5}):
            how = {"method": text, "pattern": pattern, "only": [up]}
            refused(says, prune, tiny_model("llama"), tiny_ids(), **how)
        refused("without bits", prune_request, method=text, sparsity=0.5, calibration="x")
    prune_request(method="wanda,bits=4,group=32", sparsity=0.5, calibration="x")


def test_more_bits_lose_less():
    w, h = as_tensors(*problem(rows=200, columns=128, tokens=1000))
    lost = {}
    for method, rates, target in (
        ("ecq", (1.2, 2, 2.8, 4), None),
        ("gptq", (2, 3, 4, 8), None),
        ("sparsegpt,bits={}", (2, 3, 4, 8), HALF),
        ("sparsegpt", (0,), HALF),
    ):
        for bits in rates:
            made = get_method(method.format(bits)).solve([w, w[:60]], h, [target or Rate(bits)] * 2)
            lost[method, bits] = relative_error(w, made.weights[0], h)
            taken = [grid.bits for grid in made.grids]
            assert method != "ecq" or taken == pytest.approx([bits] * 2, abs=0.04)
        errors = [lost[method, bits] for bits in rates]
        factor = 0.5 if method == "ecq" else 1
        assert all(more < factor * less for less, more in pairwise(errors))
    assert lost["ecq", 2.8] < lost["gptq", 3]  # which takes 3.25
    # Eight bits lose next to nothing more.
    assert lost["sparsegpt,bits={}", 8] == pytest.approx(lost["sparsegpt", 0], rel=0.05)


@pytest.mark.parametrize("text", ["admm", "wanda", "magnitude", "wanda,refit=4"])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_bits_keep_the_mask(text, pattern):
    (w, h), target = as_tensors(*problem(rows=24, columns=64)), as_pattern(pattern)
    masked, made = (solved(text, [w], h, [target], **how) for how in ({}, {"bits": 4}))
    assert made.pruned == masked.pruned
    assert not made.weights[0][masked.weights[0] == 0].any()
    assert made.grids[0].bits == pytest.approx(2 + 1 + 0.25)


STORED = ["gptq 3 bits", "ecq 2.8 bits", "sparsegpt,bits=3 0.5", "sparsegpt,bits=4,refit=2 2:4"]


@pytest.mark.parametrize("text", STORED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_levels_from_stored_weights(text, dtype):
    """Layers with dead inputs and dead rows; every stored value comes back, to the bit."""
    weight, gram = problem(rows=33, columns=64)
    gram[5] = gram[:, 5] = 0
    w, h = as_tensors(weight, gram)
    w[3] = 0
    name, _, pattern = text.partition(" ")
    made = get_method(name).solve([w, w[:7]], h, [as_pattern(pattern)] * 2)
    for kept, grid in zip(made.weights, made.grids, strict=True):
        stored = kept.to(dtype).contiguous()
        again = grid.values(grid.levels(stored)).to(dtype)
        assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))


def test_bits_instead_of_sparsity():
    report = prune(tiny_model("llama"), tiny_ids(), bits=3)
    assert (report.method, report.pattern) == ("ecq", "3 bits")
    assert report.bits == pytest.approx(3, abs=0.15)  # of so few weights
    assert all(0 < layer.error < 0.2 and layer.bits for layer in report.layers)
    joint = prune(tiny_model("llama"), tiny_ids(), pattern=0.5, bits=4)
    assert (joint.method, joint.sparsity) == ("sparsegpt", 0.5)
    assert 2 + 1 + 16 / 64 < joint.bits < 2 + 1 + 16 / 32  # rows of 32 and 64 inputs
    assert prune_request(bits="2.4", calibration="x").chosen.text == "ecq"
    asked = prune_request(sparsity="0.5", bits="4", calibration="x")
    assert asked.chosen.text == "sparsegpt,bits=4"
    both = prune_request(method="gptq,bits=4,group=32", calibration="x")
    assert (both.pattern, both.options["bits"]) == ("4 bits", 0)
    assert both == prune_request(method="gptq,group=32", pattern="4 bits", calibration="x")


@cases(
    "method pattern bits says",
    ("gptq", None, 2.8, "2.8 bits are chosen first: pass pattern=calmix.pruning"),
    ("gptq", None, None, "method gptq needs --bits, such as 4"),
    ("gptq", 0.5, None, "method gptq takes --bits, not 0.5: for sparsity"),
    ("ecq", 0.5, 3, "method ecq takes --bits alone"),
    ("gptq,bits=4", "3.4 bits mixed", None, "method gptq takes --bits alone"),
    ("ecq", None, 9, "method ecq: bits 9: must be less than or equal to"),
    ("ecq", None, 0.01, "0.01 bits per weight is not between 0.1 and 8"),
    ("sparsegpt", "3 bits", None, "takes a sparsity, not 3 bits alone"),
    ("wanda", None, 3, "give either --sparsity"),
    ("sparsegpt", 0.5, 1, "take whole bits from 2 to 8"),
    ("gptq,group=24", None, 4, "groups of 24 do not divide the 32 inputs of"),
    ("sparsegpt,group=7", 0.5, 4, "groups of 7 do not divide"),
)
def test_invalid_combinations_are_one_line(method, pattern, bits, says):
    how = {"method": method, "pattern": pattern} | ({"bits": bits} if bits else {})
    refused(says, prune, tiny_model("llama"), tiny_ids(), **how)
