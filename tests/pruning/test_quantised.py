"""Quantisers against an independent loop in float64, and what users see of them."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from calmix.errors import InputError
from calmix.pruning import prune
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Rate, SemiStructured, Unstructured, as_pattern
from calmix.pruning.solvers.grids import read_grids
from calmix.specs import prune_request, requests
from tests.pruning.test_methods import as_tensors, problem, statistic_of
from tests.tiny import load_weights, tiny_ids, tiny_model


def slow(weight, gram, nearest, keep=None, damping=0.01):
    """Optimal brain surgeon with the explicit inverse of what remains, a weight at a time."""
    w = weight.astype(np.float64).copy()
    h = gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    made = np.zeros_like(w)
    for j in range(w.shape[1]):
        left = np.linalg.inv(h[j:, j:])
        for row in range(len(w)):
            kept = keep is None or keep[row, j]
            made[row, j] = nearest(row, j, w[row, j]) if kept else 0.0
            w[row, j:] -= (w[row, j] - made[row, j]) * left[0] / left[0, 0]
    return made


def spread(grid, columns):
    return grid._spread(columns).expand(-1, columns).numpy().astype(np.float64)


def agree(ours, expected):
    """The same but for the few weights that lie between two levels, and what they shift."""
    near = np.isclose(ours.double().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert near.mean() > 0.98, near.mean()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [8, 40, 60])  # the last is longer than a row
def test_gptq_equals_a_slow_loop_on_its_scales(bits, group):
    weight, gram = problem(rows=10)
    w, h = as_tensors(weight, gram)
    solved = get_method(f"gptq,group={group}").solve([w], h, [Rate(bits)])
    (grid,), half = solved.grids, 2 ** (bits - 1)
    assert grid.scale.shape == (10, 40 // min(group, 40))
    assert grid.bits == pytest.approx(bits + 16 / min(group, 40))
    scale = spread(grid, 40)

    def nearest(row, j, value):
        return np.clip(np.round(value / scale[row, j]), -half, half - 1) * scale[row, j]

    agree(solved.weights[0], slow(weight, gram, nearest))
    levels = grid.levels(solved.weights[0])
    assert -half <= levels.min() <= levels.max() < half


@pytest.mark.parametrize("bits", [1.3, 2.4])
def test_ecq_equals_a_slow_loop_with_its_steps(bits):
    weight, gram = problem(rows=64)
    w, h = as_tensors(weight, gram)
    solved = get_method("ecq").solve([w], h, [Rate(bits)])
    scale = np.broadcast_to(spread(solved.grids[0], 40), weight.shape)

    def nearest(row, j, value):
        return np.sign(value) * np.floor(abs(value) / scale[row, j] + 0.42) * scale[row, j]

    agree(solved.weights[0], slow(weight, gram, nearest))
    assert solved.pruned == [int((solved.weights[0] == 0).sum())]


def test_sparsegpt_rounds_what_it_keeps_in_the_same_loop():
    weight, gram = problem(rows=10)
    w, h = as_tensors(weight, gram)
    solved = get_method("sparsegpt,bits=4,group=8").solve([w], h, [Unstructured(0.5)])
    keep, scale = (solved.weights[0] != 0).numpy(), spread(solved.grids[0], 40)

    def nearest(row, j, value):
        return np.clip(np.round(value / scale[row, j]), -8, 7) * scale[row, j]

    assert solved.pruned == [200]
    assert 200 <= (~keep).sum() < 225  # some that are kept are rounded to zero
    agree(solved.weights[0], slow(weight, gram, nearest, keep))
    assert solved.grids[0].bits == pytest.approx(2 + 1 + 2)  # levels, mask, scales


def test_ecq_hits_its_rate_and_loses_less_with_more():
    weight, gram = problem(rows=200, columns=128, tokens=1000)
    w, h = as_tensors(weight, gram)
    errors = []
    for bits in (1.2, 2, 2.8, 4):
        solved = get_method("ecq").solve([w, w[:60]], h, [Rate(bits)] * 2)
        assert [grid.bits for grid in solved.grids] == pytest.approx([bits] * 2, abs=0.04)
        errors.append(relative_error(w, solved.weights[0], h))
    assert all(more < 0.5 * less for less, more in pairwise(errors))
    gptq = get_method("gptq").solve([w], h, [Rate(3)])
    assert gptq.grids[0].bits > 3.2
    assert errors[2] < relative_error(w, gptq.weights[0], h)


@pytest.mark.parametrize("method", ["gptq", "sparsegpt,bits={}"])
def test_more_bits_lose_less(method):
    w, h = as_tensors(*problem(rows=48, columns=128, tokens=1000))
    joint, errors = "{}" in method, []
    for bits in (2, 3, 4, 8):
        target = Unstructured(0.5) if joint else Rate(bits)
        solved = get_method(method.format(bits)).solve([w], h, [target])
        errors.append(relative_error(w, solved.weights[0], h))
    assert errors == sorted(errors, reverse=True)
    if joint:  # as many as there are lose next to nothing
        plain = get_method("sparsegpt").solve([w], h, [Unstructured(0.5)])
        assert errors[-1] == pytest.approx(relative_error(w, plain.weights[0], h), rel=0.05)


@pytest.mark.parametrize(
    "text", ["admm", "wanda", "magnitude", "wanda,refit=4", "sparsegpt,refit=4"]
)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(2, 4)], ids=str)
def test_bits_behind_a_mask_keep_it(text, pattern):
    weight, gram = problem(rows=24, columns=64)
    w, h = as_tensors(weight, gram)
    method = get_method(text)
    masked = method.solve([w], statistic_of(method, h), [pattern])
    solved = get_method(text, bits=4).solve([w], h, [pattern])
    assert solved.pruned == masked.pruned
    assert not (solved.weights[0][masked.weights[0] == 0]).any()
    (grid,) = solved.grids
    assert grid.bits == pytest.approx(2 + 1 + 0.25)
    assert torch.equal(grid.values(grid.levels(solved.weights[0])), solved.weights[0])


@pytest.mark.parametrize("text", ["gptq 3 bits", "ecq 2.8 bits",
                                  "sparsegpt,bits=3 0.5", "sparsegpt,bits=4 2:4"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_levels_are_read_off_stored_weights(text, dtype):
    """Layers with dead inputs and dead rows; every stored value comes back, to the bit."""
    weight, gram = problem(rows=33, columns=64)
    gram[5] = gram[:, 5] = 0
    w, h = as_tensors(weight, gram)
    w[3] = 0
    name, _, pattern = text.partition(" ")
    solved = get_method(name).solve([w, w[:7]], h, [as_pattern(pattern)] * 2)
    for made, grid in zip(solved.weights, solved.grids, strict=True):
        stored = made.to(dtype).contiguous()
        again = grid.values(grid.levels(stored)).to(dtype)
        assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))


def test_python_and_requests_take_bits_in_place_of_a_sparsity():
    model = tiny_model("llama")
    report = prune(model, tiny_ids(), bits=3)
    assert (report.method, report.pattern) == ("ecq", "3 bits")
    assert report.bits == pytest.approx(3, abs=0.15)  # of so few weights
    assert all(0 < layer.error < 0.2 and layer.bits for layer in report.layers)
    joint = prune(tiny_model("llama"), tiny_ids(), pattern=0.5, bits=4)
    assert (joint.method, joint.sparsity) == ("sparsegpt", 0.5)
    assert 2 + 1 + 16 / 64 < joint.bits < 2 + 1 + 16 / 32  # rows of 32 and 64 inputs
    made = requests(bits="2.4,3", calibration="x")
    assert [one.name for one in made] == ["ecq-2.4bits", "ecq-3bits"]
    made = requests(method="wanda,magnitude", sparsity="0.5", bits="4", calibration="x")
    assert [one.name for one in made] == ["wanda-bits=4-0.5", "magnitude-bits=4-0.5"]
    both = prune_request(method="gptq,bits=4,group=32", calibration="x")
    assert (both.pattern, both.options["bits"]) == ("4 bits", 0)
    assert both == prune_request(method="gptq,group=32", pattern="4 bits", calibration="x")
    joint = prune_request(sparsity=0.5, bits=4, calibration="x")
    assert joint.name == "sparsegpt-bits=4-0.5"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"method": "gptq", "bits": 2.8}, "gptq takes whole bits from 2 to 8, not 2.8 bits"),
        ({"method": "gptq"}, "method gptq needs --bits, such as 4"),
        ({"method": "gptq", "pattern": 0.5}, "method gptq takes --bits, not 0.5: for zeros and"),
        ({"method": "ecq", "pattern": 0.5, "bits": 3}, "method ecq takes --bits alone"),
        ({"method": "ecq", "bits": 9}, "method ecq: bits 9: Input should be less than or equal to"),
        ({"method": "ecq", "bits": 0.01}, "0.01 bits a weight is not between 0.1 and 8"),
        ({"method": "sparsegpt", "pattern": "3 bits"}, "takes a sparsity, not 3 bits alone"),
        ({"method": "sparsegpt", "pattern": 0.5, "bits": 1}, "at least 2 bits"),
        ({"method": "gptq,group=24", "bits": 4}, "groups of 24 do not divide the 32 inputs of"),
        ({"method": "sparsegpt,group=7", "pattern": 0.5, "bits": 4}, "groups of 7 do not divide"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(asked, says):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=says):
        prune(model, tiny_ids(), **asked)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_quantised_checkpoint_says_what_it_takes(calmix, tiny_folder, text_file, tmp_path):
    common = ("prune", tiny_folder, "--calibration", text_file, "--rows", 6, "--length", 32)
    out = tmp_path / "out"
    ended = calmix(*common, "--bits", "4", "--method", "gptq", "-o", out).ok()
    assert "4.44 bits a weight" in ended.out
    told = json.loads((out / "calmix.json").read_text())["pruning"]
    assert (told["method"], told["pattern"]) == ("gptq", "4 bits")
    assert {layer["bits"] for layer in told["layers"]} == {4.25, 4.5}
    grids, weights = read_grids(out), load_weights(out)
    assert len(grids) == len(told["layers"])
    for name, grid in grids.items():
        weight = weights[name]
        assert torch.equal(grid.values(grid.levels(weight)).to(weight.dtype), weight)
    assert "bits a weight: 4.444" in calmix("doctor", "inspect", out).out
    for more, says in (
        (("--bits", "3", "--method", "wanda"), "give either --sparsity"),
        (("--bits", "3", "--method", "gptq,group=5"), "groups of 5 do not divide"),
        (("--bits", "many"), "bits many"),
    ):
        ended = calmix(*common, *more, "-o", tmp_path / "other")
        assert (ended.code, says in ended.line) == (2, True), ended.err
    assert not (tmp_path / "other").exists()
