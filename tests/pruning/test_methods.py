"""The solvers against independent implementations: textbook formulas and published semantics."""

import itertools

import numpy as np
import pytest
import torch

from calmix.pruning.gram import Gram, inverse_factor
from calmix.pruning.methods import get_method
from calmix.pruning.methods.magnitude import Magnitude
from calmix.pruning.methods.sparsegpt import SparseGPT
from calmix.pruning.methods.wanda import Wanda
from calmix.pruning.patterns import SemiStructured, Unstructured, smallest
from calmix.pruning.solvers import surgeon
from tests.pruning.toy import SPARSE, Elsewhere


def problem(rows=24, columns=40, tokens=400, seed=0):
    """Random weights and correlated, unevenly scaled inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * rng.uniform(0.2, 3, columns)
    x = rng.normal(size=(tokens, columns)) @ mixing
    return rng.normal(size=(rows, columns)), x.T @ x


def first_k(score, k):
    """Mask of the k smallest of a flat array, ties to the lower index."""
    mask = np.zeros(score.size, dtype=bool)
    mask[np.argsort(score.ravel(), kind="stable")[:k]] = True
    return mask.reshape(score.shape)


def textbook_obs(weight, gram, pattern, damping=0.01, block=128):
    """Optimal brain surgeon, column by column, with the explicit inverse of what remains."""
    w = weight.astype(np.float64).copy()
    rows, columns = w.shape
    h = gram.astype(np.float64) + damping * np.mean(np.diag(gram)) * np.eye(columns)
    remaining = [np.linalg.inv(h[j:, j:]) for j in range(columns)]
    leverage = np.array([inverse[0, 0] for inverse in remaining])
    mask = np.zeros(w.shape, dtype=bool)
    for j in range(columns):
        if isinstance(pattern, Unstructured) and j % block == 0:
            stop = min(j + block, columns)
            score = (w[:, j:stop] ** 2 / leverage[j:stop]).T  # ties in order of column, row
            mask[:, j:stop] = first_k(score, round(pattern.sparsity * score.size)).T
        if isinstance(pattern, SemiStructured) and j % pattern.m == 0:
            score = w[:, j : j + pattern.m] ** 2 / leverage[j : j + pattern.m]
            for row in range(rows):
                mask[row, j : j + pattern.m] = first_k(score[row], pattern.m - pattern.n)
        error = np.where(mask[:, j], w[:, j], 0) / remaining[j][0, 0]
        w[:, j:] -= np.outer(error, remaining[j][0])
        w[mask[:, j], j] = 0
    return w, mask


def published_sparsegpt(weight, gram, sparsity, prune_n=0, prune_m=0, damping=0.01, block=128):
    """The published code's order of operations, in float32: three Cholesky calls, sorted bound."""
    w = torch.tensor(weight, dtype=torch.float32)
    h = torch.tensor(gram, dtype=torch.float32)
    h = h + damping * h.diagonal().mean() * torch.eye(len(h))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        w1, u1 = w[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(w1)
        m1 = torch.zeros_like(w1, dtype=torch.bool)
        if not prune_n:
            score = w1**2 / u1.diagonal() ** 2
            bound = score.flatten().sort().values[int(score.numel() * sparsity)]
            m1 = score <= bound
        for i in range(stop - start):
            if prune_n and i % prune_m == 0:
                score = w1[:, i : i + prune_m] ** 2 / u1.diagonal()[i : i + prune_m] ** 2
                m1.scatter_(1, i + score.topk(prune_n, dim=1, largest=False).indices, True)
            kept = w1[:, i].masked_fill(m1[:, i], 0)
            error = (w1[:, i] - kept) / u1[i, i]
            w1[:, i:] -= error[:, None] * u1[i, i:]
            w1[:, i] = kept
            errors[:, i] = error
        w[:, start:stop] = w1
        mask[:, start:stop] = m1
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w, mask


def as_tensors(weight, gram):
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(gram, dtype=torch.float32)


def output_error(weight, pruned, gram):
    delta = np.asarray(weight, dtype=np.float64) - np.asarray(pruned, dtype=np.float64)
    return float(np.sum((delta @ gram) * delta))


PATTERNS = [Unstructured(0.5), Unstructured(0.63), SemiStructured(2, 4), SemiStructured(1, 4)]


UNEVEN = SemiStructured(5, 12)  # groups that end at no multiple of 16, 32 or 128


@pytest.mark.parametrize(
    ("pattern", "columns"), [*itertools.product(PATTERNS, [40, 152]), (UNEVEN, 156)], ids=str
)
def test_sparsegpt_equals_textbook_obs(pattern, columns):
    weight, gram = problem(columns=columns, tokens=4 * columns)
    expected, mask = textbook_obs(weight, gram, pattern)
    w, h = as_tensors(weight, gram)
    solved = SparseGPT().solve([w], h, [pattern])
    ours = solved.weights[0].numpy()
    assert ((ours == 0) == mask).mean() >= 0.999
    agree = ((ours == 0) == mask).all(axis=1)
    assert agree.mean() > 0.9
    np.testing.assert_allclose(ours[agree], expected[agree], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("n", "m", "sparsity"), [(0, 0, 0.5), (0, 0, 0.6), (2, 4, 0.5), (4, 8, 0.5)]
)
def test_sparsegpt_keeps_the_published_semantics(n, m, sparsity):
    weight, gram = problem(rows=96, columns=320, tokens=2000, seed=3)
    pattern = SemiStructured(n, m) if m else Unstructured(sparsity)
    expected, mask = published_sparsegpt(weight, gram, sparsity, m - n if m else 0, m)
    w, h = as_tensors(weight, gram)
    ours = SparseGPT().solve([w], h, [pattern]).weights[0]
    assert ((ours == 0) == mask).float().mean() >= 0.999
    ratio = output_error(weight, ours, gram) / output_error(weight, expected, gram)
    assert 0.99 < ratio < 1.01


@pytest.mark.parametrize(
    ("pattern", "columns"), [*itertools.product(PATTERNS, [128, 44]), (UNEVEN, 132)], ids=str
)
def test_sparsegpt_groups_solved_at_once_equal_columns_one_by_one(pattern, columns):
    """What an accelerator does: the same masks and errors, but for rounding."""
    weight, gram = problem(rows=48, columns=columns, tokens=1000, seed=5)
    w, h = as_tensors(weight, gram)
    upper = inverse_factor(h).upper
    inverse = upper.diagonal().reciprocal()[:, None]
    made = []
    for at_once in (False, True):
        weights, mask = w.T.contiguous(), torch.zeros(columns, 48)
        if isinstance(pattern, Unstructured):
            score = (weights * inverse).abs().view(1, -1)
            mask.copy_(smallest(score, pattern.count(score.numel())).view(mask.shape))
        errors = surgeon.prune_block(
            weights, mask, upper, inverse, inverse, pattern, at_once=at_once
        )
        made.append((mask, errors, weights))
    (mask, errors, weights), (same, close, corrected) = made
    assert torch.equal(mask, same)
    assert mask.mean() == pytest.approx(pattern.sparsity, abs=1e-3)
    torch.testing.assert_close(close, errors, rtol=1e-3, atol=1e-4 * float(errors.abs().max()))
    scale = float(weights.abs().max())
    torch.testing.assert_close(
        corrected[mask == 0], weights[mask == 0], rtol=1e-3, atol=1e-5 * scale
    )


def test_sparsegpt_kernel_is_given_the_block_on_an_accelerator(monkeypatch):
    asked, most = [], surgeon.fused.LARGEST
    monkeypatch.setattr(surgeon.fused, "usable", lambda _, *at: asked.append(at) or True)
    monkeypatch.setattr(surgeon.fused, "prune_columns", lambda *given: given)
    monkeypatch.setattr(surgeon, "prune_at_once", lambda *given: "at once")
    upper = torch.eye(8)
    given = [torch.rand(8, 3), torch.zeros(8, 3), upper, torch.ones(8, 1), torch.ones(8, 1)]
    there = [given[0].as_subclass(Elsewhere), *given[1:]]
    all_numbers = [(0, 0), (4, 3), (most, most - 1)]
    patterns = [Unstructured(0.5), SemiStructured(1, 4), SemiStructured(1, most)]
    for pattern, numbers in zip(patterns, all_numbers, strict=True):
        told = surgeon.prune_block(*there, pattern)
        assert all(one is other for one, other in zip(told, there, strict=False))
        assert told[5:] == numbers
    assert asked == [(8, *numbers, surgeon.kernel_agrees) for numbers in all_numbers]
    assert surgeon.prune_block(*there, SemiStructured(1, 2 * most)) == "at once"
    assert isinstance(surgeon.prune_block(*given, Unstructured(0.5)), torch.Tensor)


def test_sparsegpt_counts_are_exact_in_every_block():
    weight, gram = problem(rows=7, columns=300, tokens=1000)
    w, h = as_tensors(weight, gram)
    pruned = SparseGPT().solve([w], h, [Unstructured(0.55)]).weights[0]
    for start, stop in ((0, 128), (128, 256), (256, 300)):
        zeros = int((pruned[:, start:stop] == 0).sum())
        assert zeros == round(0.55 * 7 * (stop - start))


def test_sparsegpt_corrects_what_its_mask_loses():
    weight, gram = problem(rows=32, columns=160, tokens=3000)
    w, h = as_tensors(weight, gram)
    made = SparseGPT().solve([w], h, [Unstructured(0.5)]).weights[0]
    masked = w.masked_fill(made == 0, 0)
    assert output_error(weight, made, gram) < 0.8 * output_error(weight, masked, gram)


@pytest.mark.parametrize("name", SPARSE)
def test_methods_take_parameters_and_patterns_as_users_write_them(name):
    weight, gram = problem()
    w, h = as_tensors(weight, gram)
    method = get_method(name)
    statistic = {None: None, Gram: h}.get(method.needs, h.diagonal())
    plain = method.solve([w] * 2, statistic, [Unstructured(0.5), SemiStructured(2, 4)]).weights
    made = method.solve([torch.nn.Parameter(w.clone())] * 2, statistic, [0.5, "2:4"]).weights
    for one, other in zip(made, plain, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_sparsegpt_dead_inputs_go_first_and_kept_weights_stay():
    weight, gram = problem(rows=8, columns=20)
    gram[5] = gram[:, 5] = 0
    w, h = as_tensors(weight, gram)
    for scale in (1, 1e-8):  # whatever the units of the others are
        solved = SparseGPT().solve([w], scale * h, [Unstructured(0.25)])
        assert solved.dead == 1
        assert (solved.weights[0][:, 5] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda_is_weight_times_norm_within_a_row(pattern):
    weight, gram = problem()
    w, h = as_tensors(weight, gram)
    saliency = np.abs(weight) * np.sqrt(np.diag(gram))
    pruned = Wanda().solve([w], h.diagonal(), [pattern]).weights[0].numpy()
    for row in range(len(weight)):
        if isinstance(pattern, SemiStructured):
            groups = saliency[row].reshape(-1, pattern.m)
            mask = np.stack([first_k(g, pattern.m - pattern.n) for g in groups]).ravel()
        else:
            mask = first_k(saliency[row], round(pattern.sparsity * weight.shape[1]))
        np.testing.assert_array_equal(pruned[row] == 0, mask)
    kept = pruned != 0
    np.testing.assert_array_equal(pruned[kept], w.numpy()[kept])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_compares_within_a_layer(pattern):
    weight, _ = problem()
    w = torch.tensor(weight, dtype=torch.float32)
    pruned = Magnitude().solve([w], None, [pattern]).weights[0].numpy()
    if isinstance(pattern, SemiStructured):
        groups = np.abs(w.numpy()).reshape(-1, pattern.m)
        mask = np.stack([first_k(g, pattern.m - pattern.n) for g in groups]).reshape(weight.shape)
    else:
        mask = first_k(np.abs(w.numpy()), round(pattern.sparsity * weight.size))
    np.testing.assert_array_equal(pruned == 0, mask)


@pytest.mark.parametrize("kind", [Magnitude, Wanda, SparseGPT])
def test_equal_weights_are_pruned_exactly(kind):
    w, h = torch.ones(6, 16), torch.eye(16)
    for pattern in (Unstructured(0.3), SemiStructured(2, 4)):
        statistic = {SparseGPT: h, Wanda: h.diagonal(), Magnitude: None}[kind]
        solved = kind().solve([w], statistic, [pattern])
        per_row = round(0.3 * 16) * 6 if kind is Wanda else round(0.3 * 96)
        expected = per_row if isinstance(pattern, Unstructured) else 48
        assert solved.pruned == [expected]
        assert int((solved.weights[0] == 0).sum()) == expected


@pytest.mark.parametrize("kind", [Magnitude, Wanda, SparseGPT])
def test_every_layer_has_its_own_pattern(kind):
    """Shares and N:M side by side: each layer as if it were alone."""
    gram = problem(columns=160)[1]
    weights = [torch.tensor(problem(rows, 160, seed=rows)[0]).float() for rows in (8, 12, 6, 9)]
    h = torch.tensor(gram, dtype=torch.float32)
    patterns = [Unstructured(0.3), SemiStructured(2, 4), Unstructured(0.7), SemiStructured(3, 8)]
    statistic = {SparseGPT: h, Wanda: h.diagonal(), Magnitude: None}[kind]
    together = kind().solve(weights, statistic, patterns)
    for number, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
        alone = kind().solve([weight], statistic, [pattern])
        assert together.pruned[number] == alone.pruned[0]
        assert torch.equal(together.weights[number] == 0, alone.weights[0] == 0)
        torch.testing.assert_close(together.weights[number], alone.weights[0])
