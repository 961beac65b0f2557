"""Refit and ADMM against naive implementations in float64, and what they promise."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from calmix import SemiStructured, Unstructured, precision
from calmix.pruning.methods.admm import _bound
from calmix.pruning.methods.base import sampled
from calmix.pruning.solvers.refit import refit, refit_layer, scale
from tests.pruning.test_methods import as_tensors, mask_of, output_error, problem, solved

PATTERNS = [Unstructured(0.6), SemiStructured(2, 4), SemiStructured(4, 8)]


def admm(weight, gram, pattern, **options):
    return solved("admm", [weight], gram, [pattern], **options).weights[0]


def share(weight, pruned, gram):
    """The error the solvers report, in float64 from the definition."""
    return output_error(weight, pruned, gram) / output_error(weight, 0 * weight, gram)


def assert_pattern(pruned, pattern):
    if isinstance(pattern, Unstructured):
        assert int((pruned == 0).sum()) == pattern.count(pruned.numel())
    else:
        zeros = (pruned == 0).view(len(pruned), -1, pattern.m).sum(2)
        assert (zeros == pattern.m - pattern.n).all()


def test_refit_reaches_least_squares():
    """The minimum of the output error: every row's kept weights from its own normal equations."""
    weight, gram = problem(tokens=4000)
    kept = np.random.default_rng(0).random(weight.shape) < 0.5
    best = np.zeros_like(weight)
    for row, mask in enumerate(kept):
        best[row, mask] = np.linalg.solve(gram[np.ix_(mask, mask)], gram[mask] @ weight[row])
    w, h = as_tensors(weight, gram)
    start = w * torch.tensor(kept)
    refitted = refit_layer(w, start, scale(h), steps=200, damping=0.0)
    assert ((refitted != 0).numpy() == kept).all()
    floor = output_error(weight, best, gram)
    assert floor < 0.5 * output_error(weight, start, gram)
    assert output_error(weight, refitted, gram) == pytest.approx(floor, rel=1e-3)
    # What cannot be better is returned as it was: so much damping leads away.
    half = torch.tensor(best).bfloat16()
    assert torch.equal(refit_layer(w.bfloat16(), half, scale(h), steps=1, damping=10.0), half)
    assert torch.equal(refit([w], [start], h, steps=0)[0], start)


def shaped(kind, rows, columns, seed):
    """Random weights, and the Gram matrix of inputs of shapes that layers of real models have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, columns, generator=generator)
    if kind == "mean":  # little varies around a mean that all tokens share
        x = 0.2 * x + torch.randn(columns, generator=generator)
    if kind == "outliers":  # one token, and one input, far larger than the rest
        x += 0.3 * torch.randn(600, 1, generator=generator)
        x[0] *= 300
        x[:, 3] *= 50
    if kind == "units":
        x *= torch.exp(1.5 * torch.randn(columns, generator=generator))
    if kind == "spectrum":
        turned = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
        x = x / torch.arange(1, columns + 1) @ turned
    if kind == "gated":  # most are zero
        x = torch.relu(x - 1.5)
    return torch.randn(rows, columns, generator=generator), x.T @ x


@pytest.fixture(params=[False, True], ids=["exact", "rounded"])
def rounded(request, monkeypatch):
    """As on a CPU where bfloat16 alone is fast; oneDNN itself rounds nothing."""
    monkeypatch.setattr(precision, "_bfloat16_alone", lambda: request.param)
    monkeypatch.setattr(precision, "_set", nullcontext)


@pytest.mark.parametrize("near", [False, True])  # a Gram matrix that came rounded, and is none
@pytest.mark.parametrize("kind", ["even", "mean", "outliers", "spectrum"])
def test_refit_improves_monotonically(kind, near, rounded):
    w, gram = shaped(kind, 48, 96, seed=2)
    start = solved("wanda", [w], gram, [Unstructured(0.6)]).weights[0]
    errors = [share(w, start, gram)]
    for steps in (1, 4, 8, 12, 20, 40, 80):
        (made,) = refit([w], [start], gram.bfloat16().float() if near else gram, steps=steps)
        assert torch.equal(made == 0, start == 0)
        errors.append(share(w, made, gram))
    # What is lost is measured on the exact one, of which a rounded one does not tell all.
    assert all(b <= a * (1.01 if near else 1 + 1e-4) for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.6 * errors[0] or kind == "even"


def textbook_admm(weight, gram, pattern, iterations, rho=1.0, damping=0.001):
    """Boza's three updates with an explicit inverse, and a projection sorted in full; inputs are
    scaled by what a ridge regression on the others leaves of each."""
    n, left = np.sqrt(np.diag(gram)), []
    unit = gram / np.outer(n, n)
    for j in range(len(n)):
        others = np.delete(np.arange(len(n)), j)
        inner = unit[np.ix_(others, others)] + 0.6 * np.eye(len(others))
        left.append(1 - unit[j, others] @ np.linalg.solve(inner, unit[others, j]))
    n = n * np.sqrt(left)
    h, w0 = gram / np.outer(n, n) + damping * np.eye(len(n)), weight * n
    inverse = np.linalg.inv(h + rho * np.eye(len(n)))
    x, u = w0.copy(), np.zeros_like(w0)

    def project(values, progress):
        now = pattern
        if isinstance(pattern, Unstructured):
            now = Unstructured(pattern.sparsity * (1 - (1 - progress) ** 4))
        return np.where(mask_of(np.abs(values), now), 0, values)

    for number in range(iterations):
        z = project(x + u, (number + 1) / (iterations + 1))
        u = u + x - z
        x = (w0 @ h + rho * (z - u)) @ inverse
    return project(x + u, 1) / n


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_matches_textbook_updates(pattern):
    weight, gram = problem(rows=24, columns=40, tokens=800)
    w, h = as_tensors(weight, gram)
    expected = textbook_admm(weight, gram, pattern, 12)
    ours = admm(w, h, pattern, iterations=12, refit=0).numpy()
    assert ((ours == 0) == (expected == 0)).mean() > 0.97
    ratio = output_error(weight, ours, gram) / output_error(weight, expected, gram)
    assert 0.95 < ratio < 1.05


@pytest.mark.parametrize("kind", ["even", "mean", "outliers", "units", "spectrum", "gated"])
def test_admm_is_at_least_as_good_as_sparsegpt(kind, rounded):
    sparsities = (Unstructured(0.2), Unstructured(0.9), SemiStructured(2, 4))
    for rows, columns, patterns in ((96, 64, sparsities), (16, 160, PATTERNS[::2])):
        w, gram = shaped(kind, rows, columns, seed=rows)
        for pattern in patterns:
            ours, other = admm(w, gram, pattern), solved("sparsegpt", [w], gram, [pattern])
            assert_pattern(ours, pattern)
            assert share(w, ours, gram) < share(w, other.weights[0], gram), (columns, pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scale_and_memory_layout_invariance(pattern):
    """Inputs of other units with weights the other way round, and what GPT-2's layers hold."""
    weight, gram = problem(rows=16, columns=32, tokens=900)
    units = 2.0 ** np.random.default_rng(1).integers(-6, 6, 32)
    w, h = as_tensors(weight, gram)
    other = as_tensors(weight / units, gram * np.outer(units, units))
    mask = admm(w, h, pattern) == 0
    assert ((admm(*other, pattern) == 0) == mask).float().mean() > 0.98
    view = w.T.contiguous().T
    assert torch.equal(admm(view, h, pattern) == 0, mask)
    first, second = (solved("ria", [one], h, [pattern]).weights[0] for one in (view, w))
    assert torch.equal(first, second)


def test_sampled_bound():
    state = torch.arange(1.0, 33.0).view(2, 16) * torch.tensor([1.0, -1.0]).repeat(8)
    assert [float(_bound(state, share)) for share in (0, 0.5, 1)] == [0, 16, 32]
    some = sampled(torch.arange(64.0).view(8, 8), 16)
    assert (len(some), len(set((some % 8).tolist()))) == (13, 8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_degenerate_layers(pattern):
    """Dead inputs keep the weights that a group must keep; and few tokens, outputs or none."""
    weight, gram = problem(rows=8, columns=24)
    gram[8:16] = gram[:, 8:16] = 0
    w, h = as_tensors(weight, gram)
    made = admm(w, h, pattern)
    assert_pattern(made, pattern)
    kept = made[:, 8:16] != 0
    assert torch.equal(made[:, 8:16][kept], w[:, 8:16][kept])
    one_token = np.outer(np.arange(1.0, 17), np.arange(1.0, 17))  # rank one
    for rows, gram in ((1, np.eye(16)), (6, one_token), (1, one_token)):
        w, h = torch.ones(rows, 16), torch.tensor(gram, dtype=torch.float32)
        made = admm(w, h, pattern)
        assert_pattern(made, pattern)
        assert torch.isfinite(made).all()
        assert share(w, made, gram) <= 1
    assert not admm(torch.zeros(4, 16), torch.eye(16), pattern).any()
