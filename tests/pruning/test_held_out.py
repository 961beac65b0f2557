"""Rows that are not fitted: which, what they say of a layer, and what follows."""

import pytest
import torch

from calmix import prune
from calmix.models.blocks import find_blocks
from calmix.pruning import engine
from calmix.pruning.engine import Run, run_through
from calmix.pruning.gram import Cross, Gram, inverse_factor, relative_error
from calmix.pruning.held_out import (
    JUDGING_TOKENS,
    MOVE_SHARE,
    SHARE,
    HeldOut,
    checked,
    held_out_rows,
)
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Rate, as_pattern
from tests.pruning.test_engine import check_equal
from tests.pruning.toy import cases
from tests.tiny import tiny_ids, tiny_model

ROWS = 32


def solved_and_checked(method, target, weights, tokens, judge, harmful):
    """Solve weights on tokens, and once more without the corrections that do harm on others."""
    chosen, pattern = get_method(method).aim(as_pattern(target))
    gram, patterns = tokens.T @ tokens, [pattern] * len(weights)
    solved = chosen.solve(weights, gram, patterns)
    given = (solved, gram.diagonal(), patterns, judge, [*range(len(weights))])
    made, replaced = checked(chosen, weights, *given)
    assert replaced == harmful
    return solved, made


def test_held_out_rows_are_spread_over_the_sources():
    assert [held_out_rows(rows) for rows in (1, 15, 16)] == [[], [], [8]]
    sources = ["code", "math"] * 32
    rows = held_out_rows(64, sources)
    assert len(rows) == 4
    assert sorted(sources[row] for row in rows) == ["code", "code", "math", "math"]


def test_error_is_that_of_the_tokens_given():
    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 64), torch.randn(6, 40, 64)
    changed, judge = weight + 0.1 * torch.randn(24, 64), HeldOut(spacing=2)
    for part in inputs.split(2):
        judge.add(part)
    assert judge.judges
    seen = torch.cat([part.reshape(-1, 64)[::2] for part in inputs.split(2)])
    expected = relative_error(weight, changed, seen.T @ seen)
    assert judge.error(weight, changed) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("propagation", ["sequential", "block"])
def test_held_out_rows_are_not_fitted(propagation, monkeypatch):
    """Other tokens in those rows change the errors reported, and no weight."""
    monkeypatch.setattr(HeldOut, "share", lambda *_: 0.4)  # chosen by them, for each input
    monkeypatch.setattr(engine, "costs_in_memory", lambda *_: {})  # their mean is over all rows
    monkeypatch.setattr(engine, "checked", lambda _, weights, solved, *__: (solved, []))
    one, other, reports, apart = tiny_model("llama"), tiny_model("llama"), [], held_out_rows(ROWS)
    for model, ids in ((one, tiny_ids(ROWS)), (other, tiny_ids(ROWS))):
        if model is other:
            ids[apart] = tiny_ids(rows=len(apart), seed=9)
        reports.append(prune(model, ids, pattern=0.5, propagation=propagation))
    check_equal(one, other)
    for before, after in zip(*(report.layers for report in reports), strict=True):
        assert before.held_out
        assert before.fitted_error == after.fitted_error
        assert before.error != after.error
        assert before.error != before.fitted_error


@pytest.mark.parametrize(("rows", "statistics"), [(ROWS, "plain"), (8, "robust")])
def test_every_row_is_fitted(rows, statistics):
    """By the papers' statistics, and of few rows."""
    how = {"method": "sparsegpt", "pattern": 0.5, "statistics": statistics}
    report = prune(tiny_model("llama"), tiny_ids(rows=rows), **how)
    assert not any(layer.held_out for layer in report.layers)
    assert all(layer.error == layer.fitted_error for layer in report.layers)


def test_experts_and_head_are_judged_too():
    """Experts on tokens held out, however few of them are in a micro-batch; the head on rows."""
    how = {"method": "sparsegpt", "pattern": 0.5, "micro_tokens": 32}
    report = prune(tiny_model("mixtral"), tiny_ids(rows=96), **how)
    experts = [layer for layer in report.layers if layer.tokens is not None]
    enough = [layer for layer in experts if layer.held_out]
    assert enough == [layer for layer in experts if layer.tokens // SHARE >= JUDGING_TOKENS]
    assert all(layer.error != layer.fitted_error for layer in enough)
    head = prune(tiny_model("llama"), tiny_ids(rows=ROWS), bits=4, embeddings=3).outer[0]
    assert head.held_out
    assert 0 < head.error < 0.2
    assert head.shrinkage > 0


@cases(
    "method target",
    ("gptq,damping=1e-6,group=32", "3 bits"),
    ("ecq,damping=1e-6", "3 bits"),
    ("ggml,damping=1e-6", "IQ4_NL blocks"),
    ("sparsegpt,damping=1e-6", "0.5"),
    ("sparsegpt,damping=1e-6,bits=4,group=32", "0.5"),
    ("admm,damping=1e-6,rho=0.01", "0.5"),
    ("magnitude,refit=50", "2:4"),
)
def test_corrections_that_do_harm_are_dropped(method, target):
    """A Gram matrix of few tokens is fitted, and the corrections are wrong on all others."""
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    few, judge = torch.randn(10, 128), HeldOut()
    judge.add(torch.randn(600, 128))
    solved, made = solved_and_checked(method, target, [weight, weight], few, judge, [0, 1])
    harmless = torch.ones(128).diag()
    for before, after in zip(solved.weights, made.weights, strict=True):
        assert judge.error(weight, after) < judge.error(weight, before)
        assert relative_error(weight, after, harmless) < relative_error(weight, before, harmless)
    assert len(made.grids) == len(solved.grids)
    assert made.pruned == [int((one == 0).sum()) for one in made.weights] or solved.grids


def test_corrections_that_help_stay():
    torch.manual_seed(0)
    mixing = torch.randn(128, 128)
    tokens, others = (torch.randn(2048, 128) @ mixing for _ in range(2))
    weight, judge = torch.randn(96, 128), HeldOut()
    judge.add(others)
    solved, made = solved_and_checked("gptq,group=32", "3 bits", [weight], tokens, judge, [])
    assert torch.equal(made.weights[0], solved.weights[0])


def test_moves_bring_outputs_nearest_to_the_dense_models():
    rng = torch.Generator().manual_seed(0)
    inputs, weight, noise = (torch.randn(n, 12, generator=rng) for n in (400, 5, 400))
    dense = inputs + 0.1 * noise
    gram, cross, held_out = Gram(12, inputs.device), Cross(12, inputs.device), HeldOut()
    gram.add(inputs[None])
    cross.add(dense[:100], inputs[:100])
    cross.add(dense[100:], inputs[100:])
    whole = gram.matrix()
    [move] = cross.moves([weight], whole, inverse_factor(whole, 1e-6).upper)
    best = torch.linalg.lstsq(inputs, dense @ weight.T).solution.T
    assert torch.allclose(weight + move, best, atol=1e-3)
    assert held_out.share([weight], [move]) == 0  # too few tokens
    held_out.add(inputs, dense)
    assert held_out.share([weight], [move]) == pytest.approx(MOVE_SHARE, abs=1e-3)
    assert held_out.share([weight], [2 * move]) == pytest.approx(MOVE_SHARE / 2, abs=1e-3)
    assert held_out.share([weight], [-move]) == 0
    exact = float(((inputs @ best.T) - dense @ weight.T).square().sum())
    assert held_out.apart(weight, best) == pytest.approx(exact, rel=0.02)
    assert held_out.apart(weight, best) < held_out.apart(weight, weight)


def test_layers_make_up_for_earlier_ones(monkeypatch):
    """Later blocks end nearer to the dense model's states if their targets come from it."""
    ids, apart = tiny_ids(ROWS), []
    dense = tiny_model("llama").model(ids).last_hidden_state
    for _ in ("dense", "own"):
        pruned = tiny_model("llama")
        run = Run(pruned, find_blocks(pruned), get_method("gptq,group=32"), Rate(2))
        run.robust = True
        run_through(run, ids)
        apart.append(float((pruned.model(ids).last_hidden_state - dense).square().mean()))
        assert not run.states.keys() - range(2 * len(run.states))  # inputs are dropped
        monkeypatch.setattr(Run, "has_dense_targets", False)
    assert apart[0] < 0.98 * apart[1]
