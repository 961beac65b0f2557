"""Block types of GGML: bytes against the gguf package, scale search, and the column solver."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from calmix import prune
from calmix.models.blocks import find_blocks
from calmix.pruning.gram import inverse_factor, relative_error
from calmix.pruning.methods import get_method, ggml
from calmix.pruning.patterns import Blocks, as_pattern
from calmix.pruning.solvers.ggml_scales import BlockGrid, rounded_alone, solve_blocks
from calmix.pruning.solvers.ggml_types import TYPES, Encoded, block_type, encode
from calmix.pruning.solvers.libggml import quantise
from calmix.pruning.solvers.surgeon import solve_columns
from tests.pruning.test_engine import input_gram
from tests.pruning.toy import cases, refused
from tests.tiny import tiny_ids, tiny_model

BY_COLUMN = [name for name, kind in TYPES.items() if kind.group]


def correlated(tokens=1500, columns=512, seed=0):
    """Return inputs of a few strong directions."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.randn(columns, columns, generator=rng) * torch.randn(columns, generator=rng).exp()
    return torch.randn(tokens, columns, generator=rng) @ turn


def matrix(rows=24, columns=512, seed=2):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def solved(name, weights, gram, **options):
    return get_method("ggml", **options).solve(weights, gram, [Blocks(name)] * len(weights))


@pytest.mark.parametrize("name", BY_COLUMN)
def test_blocks_decode_with_the_gguf_package(name):
    """Random matrices on the grid of a type, in which every level and scale can occur."""
    for each, kind in TYPES.items():
        assert (kind.size, kind.bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[each]]
    kind, rng = TYPES[name], torch.Generator().manual_seed(0)
    groups = 6 * kind.size // kind.group

    def numbers(ends, count):
        return torch.randint(ends[0], ends[1] + 1, (20, count), generator=rng)

    scales, minima = (numbers(kind.scales or (1, 1), groups) for _ in range(2))
    levels = numbers((kind.low, kind.high), 6 * kind.size)
    step, least = ((torch.rand(20, 6, generator=rng) + 0.01).half() for _ in range(2))
    worth = torch.tensor(kind.codebook)[levels] if kind.codebook else levels
    scale, minimum = (u.float().repeat_interleave(groups // 6, 1) for u in (step, least))
    values = worth.view(20, groups, -1) * (scale * scales)[..., None]
    values -= (minimum * minima)[..., None] if kind.minima else 0
    encoded = encode(kind, levels, step, scales, least, minima)
    assert encoded.data.shape == (20, 6 * kind.bytes)
    decoded = quants.dequantize(encoded.data.numpy(), GGMLQuantizationType[name])
    np.testing.assert_array_equal(decoded, values.view(20, -1).numpy())
    assert torch.equal(encoded.values(), values.view(20, -1))


def test_unknown_type_is_one_line():
    assert block_type("q3_k").name == "Q3_K"
    refused("unknown type 'Q3K': did you mean", block_type, "Q3K")
    refused("unknown type 'Q9'", get_method, "ggml,type=Q9")
    given, says = get_method("ggml,type=Q3_K"), "the type is given twice: Q3_K_M and Q2_K"
    refused(says, given.aim, as_pattern("q2_k"))
    says = r"method ggml takes a type such as Q3_K_M, not 0\.5"
    refused(says, get_method("ggml").check, as_pattern(0.5), 256)


@pytest.mark.parametrize("name", BY_COLUMN)
def test_solution_weights_match_its_blocks(name):
    x, weights = correlated(columns=256), [matrix(24, 256), matrix(9, 256, seed=3)]
    weights[0][3] = 0
    weights[1][:, 160:200] = 0
    solution = solved(name, weights, x.T @ x)
    for weight, result, grid in zip(weights, solution.weights, solution.grids, strict=True):
        assert (grid.name, grid.bits) == (name, 8 * TYPES[name].bytes / TYPES[name].size)
        assert grid.data.shape == (len(weight), 256 // TYPES[name].size * TYPES[name].bytes)
        assert torch.equal(grid.values(), result)
        assert not result[(weight == 0).all(1)].any()


def nearest_values(grid, column, wanted):
    """Return the values that a column of a grid can have which are nearest to those wanted."""
    kind, group = grid.kind, column // grid.kind.group
    levels = torch.tensor(kind.codebook or range(kind.low, kind.high + 1)).double()
    scale, minimum = (unit[group, :, None].double() for unit in grid.scales.units())
    values = scale * levels - minimum
    return values.gather(1, (wanted[:, None] - values).abs().argmin(1)[:, None])[:, 0]


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_0", "IQ4_XS"])
def test_ggml_levels_match_a_plain_loop(name):
    """GPTQ in float64, with the values that the blocks can hold."""
    x, weight = correlated(columns=256), matrix(columns=256)
    factor, grid = inverse_factor(x.T @ x, 0.1), BlockGrid([weight], TYPES[name], torch.ones(256))
    [result], _ = solve_columns([weight], factor, None, grid)
    upper, rest = factor.upper.double(), weight.double()
    for column in range(256):
        wrong = rest[:, column] - nearest_values(grid, column, rest[:, column])
        rest[:, column:] -= torch.outer(wrong, upper[column, column:] / upper[column, column])
    assert (result - rest.float()).abs().gt(1e-6).float().mean() < 0.002


@pytest.mark.parametrize("name", ["Q2_K", "IQ4_NL"])
def test_sweep_is_coordinate_descent(name):
    x, weight = correlated(columns=256), matrix(columns=256)
    gram, grid = x.T @ x, BlockGrid([weight], TYPES[name], torch.ones(256))
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(256)
    [first], _ = solve_columns([weight], inverse_factor(gram, 0.1), None, grid)
    second = first.T.clone()
    grid.sweep(weight.T, second, damped)
    [swept] = solved(name, [weight], gram, sweeps=1).weights
    now, target, damped = first.double(), weight.double(), damped.double()
    for column in range(256):
        pull = (target - now) @ damped[:, column] / damped[column, column]
        now[:, column] = nearest_values(grid, column, now[:, column] + pull)
    assert (second.T - now.float()).abs().gt(1e-6).float().mean() < 0.002
    errors = [relative_error(weight, result, damped.float()) for result in (first, second.T)]
    assert errors[1] < 0.97 * errors[0]
    assert relative_error(weight, swept, gram) < relative_error(weight, first, gram)
    [grid_of] = grid.grids([second.T], [0])
    assert torch.equal(grid_of.values(), second.T)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "IQ4_NL"])
def test_scales_are_as_good_as_ggmls(name):
    pytest.importorskip("libggml")
    kind, weight = TYPES[name], matrix(64, 256) * (1 + matrix(64, 256, 5).abs() * 30)
    importance = (30 * matrix(1, 256, seed=4)[0]).exp()
    theirs = quantise(weight, importance, name=name).values()
    identity = inverse_factor(torch.eye(256), 1e-9)
    [ours], _ = solve_columns([weight], identity, None, BlockGrid([weight], kind, importance))

    def error(result):
        return float(((result - weight).square() * importance).sum())

    assert error(ours) < 1.01 * error(theirs)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q8_0", "IQ4_NL", "IQ4_XS"])
def test_rounding_alone_is_the_loop_without_corrections(name):
    """All blocks at once, also where there are more outputs than are searched at a time."""
    kind, weight = TYPES[name], torch.cat([matrix(200, 512), matrix(400, 512, seed=7)])
    importance = (3 * matrix(1, 512, seed=4)[0]).exp()
    identity = inverse_factor(torch.eye(512), 1e-9)
    [_], [grid] = solve_columns([weight], identity, None, BlockGrid([weight], kind, importance))
    assert torch.equal(rounded_alone(weight, kind, importance).data, grid.data)


@cases("name share", ("Q2_K", 0.85), ("Q3_K", 0.85), ("IQ4_NL", 0.95), ("IQ3_S", 1))
def test_feedback_beats_an_importance_matrix(name, share):
    pytest.importorskip("libggml")
    x = correlated(tokens=3000)
    fitted, other = x[:2000], x[2000:]
    weight, gram = matrix(48), fitted.T @ fitted
    plain = quantise(weight, gram.diagonal(), name=name).values()
    [result] = solved(name, [weight], gram).weights
    before, after = (relative_error(weight, one, other.T @ other) for one in (plain, result))
    assert after < share * before


def test_block_feedback_of_one_column_is_gptq():
    x, weight = correlated(columns=32), matrix(columns=32)
    factor = inverse_factor(x.T @ x)

    def quantise(part, importance):
        assert len(importance) == part.shape[1]
        return Halves(part)

    class Halves(Encoded):
        def __init__(self, part):
            super().__init__("Q8_0", (part * 50).round().to(torch.int8))

        def values(self):
            return self.data / 50

    result, rest = solve_blocks(weight, factor, 1, quantise).data / 50, weight.clone()
    for column in range(32):
        wrong = rest[:, column] - (rest[:, column] * 50).round() / 50
        slope = factor.upper[column, column:] / factor.upper[column, column]
        rest[:, column:] -= torch.outer(wrong, slope)
    torch.testing.assert_close(result, rest)
    whole = solve_blocks(weight, factor, 32, quantise).data
    torch.testing.assert_close(whole, (weight * 50).round().to(torch.int8))


def test_fallback_type_for_narrow_rows():
    method = get_method("ggml")
    instead = {"Q2_K": "IQ4_NL", "Q4_K": "Q5_0", "Q6_K": "Q8_0", "IQ2_S": "IQ4_NL"}
    for name in instead:
        [grid] = solved(name, [matrix(4, 96)], torch.eye(96)).grids
        assert grid.name == instead[name]
    both = method.solve([matrix(4), matrix(4)], torch.eye(512), [Blocks("Q2_K"), Blocks("Q8_0")])
    assert [grid.name for grid in both.grids] == ["Q2_K", "Q8_0"]
    says = r"no type of GGML fits the 40 inputs of a\.b: .* '\*\.b'"
    refused(says, method.check, Blocks("Q4_K"), 40, "a.b")


@pytest.mark.parametrize("flat", [False, True])
def test_llama_rounds_by_the_dense_models_inputs(flat, monkeypatch):
    """As llama.cpp does: the importance matrix is of the dense model, and tokens count alike."""
    dense, ids, used = tiny_model("llama"), tiny_ids(), Mock(wraps=quantise)
    layers = find_blocks(dense).layers
    squares = {one.name: input_gram(dense, one.module, ids).diagonal() for one in layers}
    monkeypatch.setattr(ggml, "quantise", used)
    for way in ("sequential", "block"):
        made, how = tiny_model("llama"), {"pattern": "Q4_0 blocks", "propagation": way}
        used.reset_mock()
        report = prune(made, ids, method=f"llama,flat={flat}", **how)
        assert not report.weighted
        assert not any(layer.held_out for layer in report.layers)
        assert used.call_count == len(report.layers) == len(squares)
        for one, call in zip(report.layers, used.call_args_list, strict=True):
            own, grid = squares[one.name], report.grids[f"{one.name}.weight"]
            torch.testing.assert_close(call.args[1], torch.ones_like(own) if flat else own)
            weight = dense.get_submodule(one.name).weight
            assert torch.equal(grid.data, quantise(weight, call.args[1], name="Q4_0").data)
            assert torch.equal(made.get_submodule(one.name).weight, grid.values())
    report = prune(tiny_model("llama"), ids, method="llama,type=Q8_0")
    assert report.outer
    for name in (f"{outer.name}.weight" for outer in report.outer):
        plain = quantise(dense.get_parameter(name), None, name="Q8_0")
        assert torch.equal(report.grids[name].data, plain.data)
