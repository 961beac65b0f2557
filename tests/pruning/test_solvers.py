"""Refit and ADMM against naive implementations in float64, and what they promise."""

import numpy as np
import pytest
import torch

from calmix.pruning.methods.admm import _bound
from calmix.pruning.methods.base import sampled
from calmix.pruning.patterns import SemiStructured, Unstructured
from calmix.pruning.solvers.refit import refit, refit_layer, scale
from tests.pruning.test_methods import as_tensors, mask_of, output_error, problem, solved

PATTERNS = [Unstructured(0.6), SemiStructured(2, 4), SemiStructured(4, 8)]


def admm(weight, gram, pattern, **options):
    return solved("admm", [weight], gram, [pattern], **options).weights[0]


def least_squares(weight, kept, gram):
    """Every row's kept weights from its own normal equations: minimum of the output error."""
    best = np.zeros_like(weight)
    for row, mask in enumerate(kept):
        inner = gram[np.ix_(mask, mask)]
        best[row, mask] = np.linalg.solve(inner, gram[mask] @ weight[row])
    return best


def assert_pattern(pruned, pattern):
    if isinstance(pattern, Unstructured):
        assert int((pruned == 0).sum()) == pattern.count(pruned.numel())
    else:
        zeros = (pruned == 0).view(len(pruned), -1, pattern.m).sum(2)
        assert (zeros == pattern.m - pattern.n).all()


def test_refit_reaches_least_squares():
    weight, gram = problem(tokens=4000)
    kept = np.random.default_rng(0).random(weight.shape) < 0.5
    best = least_squares(weight, kept, gram)
    w, h = as_tensors(weight, gram)
    start = w * torch.tensor(kept)
    refitted = refit_layer(w, start, scale(h), steps=200, damping=0.0)
    assert ((refitted != 0).numpy() == kept).all()
    floor, before = output_error(weight, best, gram), output_error(weight, start.numpy(), gram)
    assert floor < 0.5 * before
    assert output_error(weight, refitted.numpy(), gram) == pytest.approx(floor, rel=1e-3)
    # What cannot be better is returned as it was: so much damping leads away.
    half = torch.tensor(best).bfloat16()
    assert torch.equal(refit_layer(w.bfloat16(), half, scale(h), steps=1, damping=10.0), half)
    assert torch.equal(refit([w], [start], h, steps=0)[0], start)


def textbook_admm(weight, gram, pattern, iterations, rho=1.0, damping=0.001):
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


def test_sampled_bound():
    state = torch.arange(1.0, 33.0).view(2, 16) * torch.tensor([1.0, -1.0]).repeat(8)
    assert [float(_bound(state, share)) for share in (0, 0.5, 1)] == [0, 16, 32]
    some = sampled(torch.arange(64.0).view(8, 8), 16)
    assert (len(some), len(set((some % 8).tolist()))) == (13, 8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_degenerate_layers(pattern):
    one_token = np.outer(np.arange(1.0, 17), np.arange(1.0, 17))  # rank one
    for rows, gram in ((1, np.eye(16)), (6, one_token), (1, one_token)):
        w, h = torch.ones(rows, 16), torch.tensor(gram, dtype=torch.float32)
        made = admm(w, h, pattern)
        assert_pattern(made, pattern)
        assert torch.isfinite(made).all()
        assert output_error(w, made, gram) <= output_error(w, 0 * w, gram)
    assert not admm(torch.zeros(4, 16), torch.eye(16), pattern).any()
