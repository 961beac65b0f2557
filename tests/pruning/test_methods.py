"""Methods against independent implementations in float64, and what all of them promise."""

import itertools

import numpy as np
import pytest
import torch

from calmix import SemiStructured, Unstructured
from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from tests.pruning.test_patterns import stable_mask
from tests.pruning.toy import SPARSE, cases, refused

HALF = Unstructured(0.5)
PATTERNS = [HALF, Unstructured(0.63), SemiStructured(2, 4), SemiStructured(1, 4)]


def problem(rows=24, columns=40, tokens=400, seed=0):
    """Random weights and correlated, unevenly scaled inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * rng.uniform(0.2, 3, columns)
    x = rng.normal(size=(tokens, columns)) @ mixing
    return rng.normal(size=(rows, columns)), x.T @ x


def as_tensors(weight, gram):
    return torch.tensor(weight).float(), torch.tensor(gram, dtype=torch.float32)


def solved(name, weights, gram, patterns, **options):
    method = get_method(name, **options)
    statistic = {None: None, Gram: gram}.get(method.needs, gram.diagonal())
    return method.solve(weights, statistic, patterns)


def output_error(weight, pruned, gram):
    delta = np.asarray(weight, dtype=np.float64) - np.asarray(pruned, dtype=np.float64)
    return float(np.sum((delta @ np.asarray(gram, dtype=np.float64)) * delta))


def mask_of(score, pattern, by_row=False):
    """The mask of a matrix of scores, by the definition of a pattern."""
    shape = (-1, pattern.m) if isinstance(pattern, SemiStructured) else (1, -1)
    parts = score if by_row and shape == (1, -1) else score.reshape(shape)
    count = round(pattern.sparsity * parts.shape[1])
    return stable_mask(parts, count, 1).reshape(score.shape)


def textbook_obs(weight, gram, pattern=None, mask=None, nearest=lambda j, rest: rest[:, 0]):
    """Optimal brain surgeon, column by column, with the explicit inverse of what remains; `nearest`
    gets a column and all behind it, corrected by those before, and returns its values."""
    w = weight.astype(np.float64).copy()
    h = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    remaining = [np.linalg.inv(h[j:, j:]) for j in range(len(gram))]
    leverage = np.array([inverse[0, 0] for inverse in remaining])
    mask = np.zeros(w.shape, dtype=bool) if mask is None else mask
    for j in range(len(gram)):
        if isinstance(pattern, Unstructured) and j % 128 == 0:
            here = slice(j, min(j + 128, len(gram)))  # ties in order of column, row
            mask[:, here] = mask_of((w[:, here] ** 2 / leverage[here]).T, pattern).T
        if isinstance(pattern, SemiStructured) and j % pattern.m == 0:
            here = slice(j, j + pattern.m)
            mask[:, here] = mask_of(w[:, here] ** 2 / leverage[here], pattern)
        made = np.where(mask[:, j], 0, nearest(j, w[:, j:]))
        w[:, j:] -= np.outer((w[:, j] - made) / leverage[j], remaining[j][0])
        w[:, j] = made
    return w, mask


@cases("pattern columns", *itertools.product(PATTERNS, [40, 152]), (SemiStructured(5, 12), 156))
def test_sparsegpt_matches_textbook_obs(pattern, columns):
    """Also where groups end at no multiple of 16, 32 or 128."""
    weight, gram = problem(columns=columns, tokens=4 * columns)
    expected, mask = textbook_obs(weight, gram, pattern)
    w, h = as_tensors(weight, gram)
    ours = solved("sparsegpt", [w], h, [pattern]).weights[0].numpy()
    assert ((ours == 0) == mask).mean() >= 0.999
    agree = ((ours == 0) == mask).all(axis=1)
    assert agree.mean() > 0.9
    np.testing.assert_allclose(ours[agree], expected[agree], rtol=2e-3, atol=2e-3)


SCORES = {
    "magnitude": lambda size, norm: size,
    "wanda": lambda size, norm: size * norm,
    "ria": lambda size, norm: size * (1 / size.sum(0) + 1 / size.sum(1)[:, None]) * norm**0.5,
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_lowest_scores_are_pruned(name, pattern):
    """Also of weights that are zero in a whole row and column."""
    weight, gram = problem()
    w, h = as_tensors(weight, gram)
    score = SCORES[name](np.abs(weight), np.sqrt(np.diag(gram)))
    mask = mask_of(score, pattern, by_row=name == "wanda")
    pruned = solved(name, [w], h, [pattern]).weights[0]
    np.testing.assert_array_equal(pruned.numpy() == 0, mask)
    assert torch.equal(pruned[pruned != 0], w[pruned != 0])
    w = torch.ones(4, 8, dtype=torch.bfloat16)
    w[:, 3] = w[2] = 0
    pruned = solved(name, [w], torch.eye(8), [pattern]).weights[0]
    assert torch.isfinite(pruned).all()
    assert pruned.dtype == torch.bfloat16
    if name != "wanda" and isinstance(pattern, Unstructured):  # the zeros are the first to go
        assert int((pruned == 0).sum()) == pattern.count(32)


@pytest.mark.parametrize("name", SPARSE)
def test_pattern_per_layer(name):
    """Shares and N:M side by side: each layer as if it were alone. Nothing given is changed."""
    h = as_tensors(*problem(columns=160))[1]
    weights = [torch.tensor(problem(rows, 160, seed=rows)[0]).float() for rows in (8, 12, 6, 9)]
    patterns = [Unstructured(0.3), SemiStructured(2, 4), Unstructured(0.7), SemiStructured(3, 8)]
    before = [value.clone() for value in (h, *weights)]
    together = solved(name, weights, h, patterns)
    for number, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
        alone = solved(name, [weight], h, [pattern])
        assert together.pruned[number] == alone.pruned[0]
        assert torch.equal(together.weights[number] == 0, alone.weights[0] == 0)
        torch.testing.assert_close(together.weights[number], alone.weights[0])
    assert all(map(torch.equal, before, (h, *weights)))
    refused("shorter", get_method(name).counts, weights, patterns[:1], error=ValueError)


@pytest.mark.parametrize("name", [*SPARSE, "sparsegpt,refit=2", "wanda,refit=2"])
def test_dead_inputs_are_counted(name):
    weight, gram = problem(columns=48)
    gram[[3, 7]] = gram[:, [3, 7]] = 0
    for scale in (1, 1e-8):  # whatever the units of the others are
        w, h = as_tensors(weight, scale * gram)
        made = solved(name, [w] * 2, h, [HALF] * 2)
        assert int(made.dead) == (0 if name == "magnitude" else 2)
        # They are the first to go.
        assert name == "magnitude" or not made.weights[0][:, [3, 7]].any()


def test_options_reach_the_solver():
    w, h = as_tensors(*problem())
    options = {"iterations": 3, "rho": 2, "damping": 0.1, "refit": 1}
    made = solved("admm", [w], h, [HALF], **options)
    assert (made.damping, made.dtype) == (0.1, torch.float32)
    for other in ({"iterations": 2}, {"rho": 1}, {"damping": 0.5}, {"refit": 0}):
        less = solved("admm", [w], h, [HALF], **options | other)
        assert not torch.equal(made.weights[0], less.weights[0]), other
    for pair in (("ria,power=1", "ria"), ("wanda,refit=1", "wanda,refit=30")):
        one, other = (solved(name, [w], h, [HALF]).weights[0] for name in pair)
        assert not torch.equal(one, other), pair
    damped = solved("sparsegpt,damping=0.3", [w], h, [HALF])
    assert (damped.damping, damped.dtype) == (0.3, torch.float32)
