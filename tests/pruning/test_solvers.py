"""The pure solvers against naive implementations in float64 and their own promises."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from calmix import precision
from calmix.errors import InputError, SolverError
from calmix.pruning.methods.admm import Admm
from calmix.pruning.methods.ria import Ria
from calmix.pruning.methods.sparsegpt import SparseGPT
from calmix.pruning.methods.wanda import Wanda
from calmix.pruning.patterns import SemiStructured, Unstructured
from calmix.pruning.solvers import refit as solvers_refit
from calmix.pruning.solvers.refit import refit
from tests.pruning.test_methods import first_k, output_error, problem

PATTERNS = [Unstructured(0.6), SemiStructured(2, 4), SemiStructured(4, 8)]


def admm(weights, gram, patterns, **options):
    return Admm(**options).solve(weights, gram, patterns)


def ria(weights, squares, patterns):
    return Ria().solve(weights, squares, patterns).weights


def tensors(weight, gram, dtype=torch.float32):
    return torch.tensor(weight).to(dtype), torch.tensor(gram, dtype=torch.float32)


def share(weight, pruned, gram):
    """The error the solvers report, in float64 from the definition."""
    w, p = weight.double().numpy(), pruned.double().numpy()
    return output_error(w, p, gram) / output_error(w, 0 * w, gram)


def least_squares(weight, kept, gram):
    """Every row's kept weights from its own normal equations: minimum of the output error."""
    best = np.zeros_like(weight)
    for row, mask in enumerate(kept):
        inner = gram[np.ix_(mask, mask)]
        best[row, mask] = np.linalg.solve(inner, gram[mask] @ weight[row])
    return best


def half_mask(shape, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.5


def assert_pattern(pruned, pattern):
    if isinstance(pattern, Unstructured):
        assert int((pruned == 0).sum()) == pattern.count(pruned.numel())
    else:
        zeros = (pruned == 0).view(len(pruned), -1, pattern.m).sum(2)
        assert (zeros == pattern.m - pattern.n).all()


def test_refit_reaches_the_least_squares_optimum():
    weight, gram = problem(tokens=4000)
    kept = half_mask(weight.shape)
    best = least_squares(weight, kept, gram)
    w, h = tensors(weight, gram)
    start = w * torch.tensor(kept)
    refitted = refit([w], [start], h, steps=200, damping=0.0)
    assert ((refitted.weights[0] != 0).numpy() == kept).all()
    floor, before = output_error(weight, best, gram), output_error(weight, start.numpy(), gram)
    assert floor < 0.5 * before
    assert output_error(weight, refitted.weights[0].numpy(), gram) == pytest.approx(floor, rel=1e-3)


def test_refit_takes_the_textbook_steps():
    """Conjugate gradients on the damped normal equations, preconditioned, one row at a time."""
    weight, gram = problem(rows=5, tokens=4000)
    kept = half_mask(weight.shape)
    h = gram + np.diag(0.05 * np.diag(gram))
    expected = weight * kept
    for row, mask in enumerate(kept):
        inner, diagonal = h[np.ix_(mask, mask)], np.diag(h)[mask]
        x = weight[row, mask].copy()
        r = h[mask] @ weight[row] - inner @ x
        z = r / diagonal
        p = z.copy()
        for _ in range(4):
            length = (r @ z) / (p @ inner @ p)
            x, new = x + length * p, r - length * (inner @ p)
            p = new / diagonal + (new @ (new / diagonal)) / (r @ z) * p
            r, z = new, new / diagonal
        expected[row, mask] = x
    w, g = tensors(weight, gram)
    ours = refit([w], [w * torch.tensor(kept)], g, steps=4, damping=0.05).weights[0]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(5))
def test_refit_never_raises_a_rows_error_and_keeps_zeros(seed, dtype):
    weight, gram = problem(rows=12, tokens=30 + 20 * seed, seed=seed)  # rank-deficient at first
    w, h = tensors(weight, gram, dtype)
    start = w * torch.tensor(half_mask(weight.shape, seed))
    for steps in (1, 3, 40):
        refitted = refit([w], [start], h, steps=steps, damping=0.0)
        result = refitted.weights[0]
        assert result.dtype == dtype
        assert (result[start == 0] == 0).all()
        for row in range(len(w)):
            before, after = share(w[row], start[row], gram), share(w[row], result[row], gram)
            assert after <= before * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("coarse", [False, True])  # as on a CPU where bfloat16 alone is fast
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["even", "mean", "outliers", "spectrum"])
def test_refit_is_no_worse_with_more_steps(kind, rounded, coarse, monkeypatch):
    """Whether its products round the Gram matrix, or it came rounded: no Gram matrix, but near."""
    monkeypatch.setattr(precision, "_bfloat16_alone", lambda: coarse)
    monkeypatch.setattr(precision, "_set", nullcontext)  # oneDNN rounds nothing there
    generator = torch.Generator().manual_seed(2)
    x = shaped(kind, 600, 96, generator)
    gram, w = x.T @ x, torch.randn(48, 96, generator=generator)
    start = Wanda().solve([w], gram.diagonal(), [Unstructured(0.6)]).weights[0]
    given = gram.bfloat16().float() if rounded else gram
    exact = gram.double().numpy()
    errors = [share(w, start, exact)]
    for steps in (1, 4, 8, 12, 20, 40, 80):
        made = refit([w], [start], given, steps=steps).weights[0]
        assert torch.equal(made == 0, start == 0)
        errors.append(share(w, made, exact))
    # What is lost is measured on the exact one, of which a rounded one does not tell all.
    assert all(b <= a * (1.01 if rounded else 1 + 1e-4) for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.6 * errors[0] or kind == "even"


def test_refit_stops_a_row_that_got_worse_and_leaves_the_others(monkeypatch):
    weight, gram = problem(rows=6, tokens=4000)
    w, h = tensors(weight, gram)
    start = w * torch.tensor(half_mask(weight.shape))
    alone = {steps: refit([w], [start], h, steps=steps).weights[0] for steps in (4, 40)}
    product, calls = solvers_refit.add_rounded_product, []

    def astray(add, left, right, out, scale=1.0):
        calls.append(product(add, left, right, out, scale))
        if len(calls) > 5:  # after the check at four steps: so short a product, so long a step
            out[2].mul_(0.01)
        return out

    monkeypatch.setattr(solvers_refit, "add_rounded_product", astray)
    made = refit([w], [start], h, steps=40).weights[0]
    assert torch.equal(made[2], alone[4][2])
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(made[others], alone[40][others])


def test_refit_of_a_row_that_cannot_be_better_returns_it_as_it_was():
    weight, gram = problem(tokens=4000)
    w, h = tensors(weight, gram)
    best = torch.tensor(least_squares(weight, half_mask(weight.shape), gram)).float().bfloat16()
    refitted = refit([w.bfloat16()], [best], h, steps=1, damping=10.0)
    assert torch.equal(refitted.weights[0], best)  # so much damping leads away
    assert torch.equal(refit([w], [best.float()], h, steps=0).weights[0], best.float())


def test_nothing_given_is_changed():
    weight, gram = problem()
    w, h = tensors(weight, gram)
    start = w * torch.tensor(half_mask(weight.shape))
    given, copies = (w, h, start), (w.clone(), h.clone(), start.clone())
    admm([w], h, [Unstructured(0.5)])
    refit([w], [start], h)
    ria([w], h.diagonal(), [Unstructured(0.5)])
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def textbook_admm(weight, gram, pattern, iterations, rho=1.0, damping=0.001, power=4):
    """Boza's three updates with an explicit inverse, and a projection sorted in full.

    Inputs are scaled by what a ridge regression on the others leaves of each.
    """
    n = np.sqrt(np.diag(gram))
    unit = gram / np.outer(n, n)
    left = []
    for j in range(len(n)):
        others = np.delete(np.arange(len(n)), j)
        inner = unit[np.ix_(others, others)] + 0.6 * np.eye(len(others))
        left.append(1 - unit[j, others] @ np.linalg.solve(inner, unit[others, j]))
    n = n * np.sqrt(left)
    h = gram / np.outer(n, n) + damping * np.eye(len(n))
    w0 = weight * n
    inverse = np.linalg.inv(h + rho * np.eye(len(n)))
    x, u = w0.copy(), np.zeros_like(w0)

    def project(values, progress):
        if isinstance(pattern, Unstructured):
            count = round(pattern.sparsity * (1 - (1 - progress) ** power) * values.size)
            return np.where(first_k(np.abs(values), count), 0, values)
        groups = np.abs(values).reshape(len(values), -1, pattern.m)
        rank = groups.argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
        return np.where((rank < pattern.m - pattern.n).reshape(values.shape), 0, values)

    for number in range(iterations):
        z = project(x + u, (number + 1) / (iterations + 1))
        u = u + x - z
        x = (w0 @ h + rho * (z - u)) @ inverse
    return project(x + u, 1) / n


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_equals_the_textbook_updates(pattern):
    weight, gram = problem(rows=24, columns=40, tokens=800)
    w, h = tensors(weight, gram)
    expected = textbook_admm(weight, gram, pattern, 12)
    ours = admm([w], h, [pattern], iterations=12, refit=0).weights[0].numpy()
    assert ((ours == 0) == (expected == 0)).mean() > 0.97
    ratio = output_error(weight, ours, gram) / output_error(weight, expected, gram)
    assert 0.95 < ratio < 1.05


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.8), SemiStructured(1, 4)], ids=str)
def test_admm_is_exact_and_better_than_sparsegpt(pattern, seed):
    weight, gram = problem(rows=48, columns=64, tokens=600, seed=seed)
    w, h = tensors(weight, gram)
    solved = admm([w], h, [pattern])
    assert_pattern(solved.weights[0], pattern)
    other = SparseGPT().solve([w], h, [pattern]).weights[0]
    assert share(w, solved.weights[0], gram) < share(w, other, gram)


def shaped(kind, tokens, columns, generator):
    """Inputs of shapes that layers of real models have."""
    x = torch.randn(tokens, columns, generator=generator)
    if kind == "mean":  # little varies around a mean that all tokens share
        return 0.2 * x + torch.randn(columns, generator=generator)
    if kind == "outliers":  # one token, and one input, far larger than the rest
        x += 0.3 * torch.randn(tokens, 1, generator=generator)
        x[0] *= 300
        x[:, 3] *= 50
    if kind == "units":
        x *= torch.exp(1.5 * torch.randn(columns, generator=generator))
    if kind == "spectrum":
        turned = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
        x = x / torch.arange(1, columns + 1) @ turned
    if kind == "gated":  # most are zero
        x = torch.relu(x - 1.5)
    return x


@pytest.mark.parametrize("rounded", [False, True])  # as on a CPU where bfloat16 alone is fast
@pytest.mark.parametrize("kind", ["even", "mean", "outliers", "units", "spectrum", "gated"])
def test_admm_is_never_behind_sparsegpt_whatever_the_inputs(kind, rounded, monkeypatch):
    monkeypatch.setattr(precision, "_bfloat16_alone", lambda: rounded)
    monkeypatch.setattr(precision, "_set", nullcontext)  # oneDNN rounds nothing there
    patterns = [Unstructured(0.2), Unstructured(0.6), Unstructured(0.9), *PATTERNS[1:]]
    for rows, columns in ((96, 64), (16, 160)):
        generator = torch.Generator().manual_seed(rows)
        x = shaped(kind, 600, columns, generator)
        gram, w = x.T @ x, torch.randn(rows, columns, generator=generator)
        for pattern in patterns:
            errors = [
                share(w, solve([w], gram, [pattern]).weights[0], gram.double().numpy())
                for solve in (admm, SparseGPT().solve)
            ]
            assert errors[0] < errors[1], (columns, pattern)


def test_admm_is_monotone_at_the_end():
    weight, gram = problem(rows=48, columns=64, tokens=600)
    w, h = tensors(weight, gram, torch.bfloat16)
    for pattern in PATTERNS:
        made = [admm([w], h, [pattern], refit=steps) for steps in (0, 1, 2, 4, 8)]
        errors = [share(w, solved.weights[0], gram) for solved in made]
        assert all(b <= a * (1 + 1e-3) for a, b in pairwise(errors))
        assert errors[-1] < errors[0]
        masks = [solved.weights[0] == 0 for solved in made]
        assert all(torch.equal(masks[0], mask) for mask in masks)


def test_admm_takes_a_pattern_a_layer():
    first, gram = problem(rows=24)
    second, _ = problem(rows=10, seed=7)
    h = tensors(first, gram)[1]
    weights = [torch.tensor(w, dtype=torch.float32) for w in (first, second, first)]
    patterns = [Unstructured(0.3), SemiStructured(2, 4), Unstructured(0.7)]
    together = admm(weights, h, patterns)
    for weight, pattern, made in zip(weights, patterns, together.weights, strict=True):
        assert_pattern(made, pattern)
        assert torch.equal(admm([weight], h, [pattern]).weights[0], made)


def test_transposed_views_are_solved_as_matrices():
    """What GPT-2's layers hold."""
    weight, gram = problem(rows=16, columns=32, tokens=900)
    w, h = tensors(weight, gram)
    view = w.T.contiguous().T
    for pattern in PATTERNS:
        assert torch.equal(
            admm([view], h, [pattern]).weights[0] == 0, admm([w], h, [pattern]).weights[0] == 0
        )
        assert torch.equal(
            ria([view], h.diagonal(), [pattern])[0], ria([w], h.diagonal(), [pattern])[0]
        )
    with pytest.raises(InputError, match="2:5"):
        admm([w], h, [SemiStructured(2, 5)])


def test_columns_are_compared_by_what_they_put_out():
    """Inputs of other units, weights the other way round: the same mask."""
    weight, gram = problem(rows=16, columns=32, tokens=900)
    units = 2.0 ** np.random.default_rng(1).integers(-6, 6, 32)
    for pattern in PATTERNS:
        made = [
            admm([w], h, [pattern]).weights[0] == 0
            for w, h in (
                tensors(weight, gram),
                tensors(weight / units, gram * np.outer(units, units)),
            )
        ]
        assert (made[0] == made[1]).float().mean() > 0.98


def test_dead_inputs_go_first_and_kept_ones_keep_their_weight():
    weight, gram = problem(rows=8, columns=20)
    gram[5] = gram[:, 5] = 0
    w, h = tensors(weight, gram)
    solved = admm([w], h, [Unstructured(0.25)])
    assert solved.dead == 1
    assert (solved.weights[0][:, 5] == 0).all()
    gram[4:8] = gram[:, 4:8] = 0  # a whole group: some of it must be kept
    w, h = tensors(weight, gram)
    solved = admm([w], h, [SemiStructured(2, 4)])
    assert_pattern(solved.weights[0], SemiStructured(2, 4))
    kept = solved.weights[0][:, 4:8]
    assert torch.equal(kept[kept != 0], w[:, 4:8][kept != 0])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_degenerate_layers_are_solved(pattern):
    columns = 16
    one_token = np.outer(np.arange(1.0, 17), np.arange(1.0, 17))  # rank one
    for rows, gram in ((1, np.eye(columns)), (6, one_token), (1, one_token)):
        w, h = torch.ones(rows, columns), torch.tensor(gram, dtype=torch.float32)
        solved = admm([w], h, [pattern])
        assert_pattern(solved.weights[0], pattern)
        assert torch.isfinite(solved.weights[0]).all()
        assert share(w, solved.weights[0], gram) <= 1
    zero = admm([torch.zeros(4, columns)], torch.eye(columns), [pattern])
    assert not zero.weights[0].any()


def test_what_is_not_finite_is_refused():
    w, h = torch.ones(4, 8), torch.eye(8)
    broken, sick = h.clone(), w.clone()
    broken[2, 3] = broken[3, 2] = torch.nan
    sick[1, 1] = torch.nan
    infinite = h.clone()
    infinite[2, 2] = torch.inf
    for weight, gram in ((w, broken), (w, infinite), (sick, h), (w, 0 * h)):
        with pytest.raises(SolverError):
            admm([weight], gram, [Unstructured(0.5)])
        with pytest.raises(SolverError):
            refit([weight], [weight * 0.5], gram)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ria_is_relative_importance_within_a_layer(pattern):
    weight, gram = problem()
    w, h = tensors(weight, gram)
    size = np.abs(w.double().numpy())
    score = np.empty_like(size)
    for i in range(size.shape[0]):
        for j in range(size.shape[1]):
            relative = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
            score[i, j] = relative * np.sqrt(np.sqrt(gram[j, j]))
    np.testing.assert_allclose(Ria().score(w, h.diagonal()).numpy(), score, rtol=1e-5)
    pruned = ria([w], h.diagonal(), [pattern])[0]
    if isinstance(pattern, Unstructured):
        mask = first_k(score, pattern.count(size.size))
    else:
        groups = score.reshape(-1, pattern.m)
        mask = np.stack([first_k(g, pattern.m - pattern.n) for g in groups]).reshape(size.shape)
    np.testing.assert_array_equal(pruned.numpy() == 0, mask)
    assert torch.equal(pruned[pruned != 0], w[pruned != 0])


def test_ria_takes_inputs_without_weights():
    w = torch.ones(4, 8)
    w[:, 3] = 0
    w[2] = 0
    pruned = ria([w.bfloat16()], torch.ones(8), [SemiStructured(2, 4)])[0]
    assert torch.isfinite(pruned).all()
    assert pruned.dtype == torch.bfloat16
