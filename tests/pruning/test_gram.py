"""Statistics of inputs and the factor of a damped Gram matrix, beside float64."""

from contextlib import nullcontext
from unittest.mock import Mock, call

import pytest
import torch

from calmix import prune
from calmix.errors import SolverError
from calmix.pruning import gram as gram_module
from calmix.pruning.gram import Gram, Squares, inverse_factor, relative_error, squared
from calmix.pruning.methods.wanda import Wanda
from tests.device.traced import tracing
from tests.pruning.toy import Elsewhere, refused
from tests.tiny import tiny_ids, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "as on an accelerator"])
@pytest.mark.parametrize("columns", [1, 33, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_matches_float64(columns, dtype, elsewhere, monkeypatch):
    used = Mock(wraps=gram_module.bfloat16_products)
    if elsewhere:
        used = Mock(return_value=nullcontext())
    monkeypatch.setattr(gram_module, "bfloat16_products", used)
    x = torch.randn(3, 900, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    gram, squares = Gram(columns, CPU), Squares(columns, CPU)
    for batch in x:
        for statistic in (gram, squares):
            statistic.add(batch.as_subclass(Elsewhere) if elsewhere else batch)
    # On an accelerator float16 is multiplied in tf32, not in bfloat16.
    halves = (torch.bfloat16, torch.float16) if elsewhere else (torch.bfloat16,)
    assert used.call_args_list == [call(dtype in halves)] * 3
    flat = x.double().reshape(-1, columns)
    exact = flat.T @ flat
    # Half-precision inputs must not cost precision: a bfloat16 result would be off by 4e-3.
    assert (gram.matrix().double() - exact).abs().max() / exact.diagonal().max() < 2e-5
    assert torch.allclose(squares.matrix().double(), exact.diagonal(), rtol=1e-5)
    assert torch.equal(gram.matrix(), gram.matrix().T)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_precision_settings_are_restored(setting, monkeypatch):
    """What a solver does not allow itself is float32, not what the user has set."""
    seen, backends = [], (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    solve = Wanda.choose

    def choose(self, *given):
        seen.extend(backend.fp32_precision for backend in backends)
        return solve(self, *given)

    monkeypatch.setattr(Wanda, "choose", choose)
    try:
        torch.set_float32_matmul_precision(setting)
        prune(tiny_model("llama"), tiny_ids(2, 8), method="wanda", pattern=0.5)
        assert torch.get_float32_matmul_precision() == setting
        assert set(seen) == {"ieee"}
    finally:
        for backend in (torch.backends, *backends):
            backend.fp32_precision = "none"


def check_factor(factor, gram, damping):
    damped = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram))
    inverse, upper = torch.linalg.inv(damped), factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4 * inverse.max())
    assert factor.upper.dtype == torch.float32


@pytest.mark.parametrize("columns", [40, 311])  # LAPACK's alone, and of blocks
def test_inverse_factor(columns):
    torch.manual_seed(0)
    x, mixing = (torch.randn(n, columns, dtype=torch.float64) for n in (12 * columns, columns))
    x = x @ mixing
    gram = (x.T @ x).float()
    factor = inverse_factor(gram, 0.01)
    check_factor(factor, gram, 0.01)
    assert (factor.damping, factor.dtype, int(factor.dead.sum())) == (0.01, torch.float32, 0)
    for scale in (2.0**-30, 2.0**30):  # of whatever units the inputs are
        scaled = inverse_factor(scale * gram)
        assert (scaled.damping, scaled.raised) == (0.01, 1)
        torch.testing.assert_close(scaled.upper * scale**0.5, factor.upper)
    gram[3] = gram[:, 3] = 0
    assert inverse_factor(gram).dead.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("columns", [1, 40, 311])
def test_square_of_a_triangle(columns):
    upper = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0)).triu()
    found, exact = squared(upper), upper.double().T @ upper.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)


def test_zero_error_cases_and_a_raised_diagonal_that_is_put_back():
    weight, gram = torch.ones(2, 3), torch.eye(3)
    assert relative_error(0 * weight, 0 * weight, gram) == relative_error(weight, weight, gram) == 0
    assert relative_error(weight, 0 * weight, gram) == 1
    gram = torch.tensor([1.0, 0.0, 3.0]).diag()
    with gram_module.raised_diagonal(gram, 0.3):
        assert torch.allclose(gram.diagonal(), torch.tensor([1.4, 0.0, 3.4]))
    assert gram.diagonal().tolist() == [1, 0, 3]


def test_damping_is_raised_and_recorded():
    """Not positive definite at 1 % damping: one eigenvalue is so much of the mean diagonal."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    values = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)

    def factor_with(least):
        values[0] = least
        return inverse_factor((basis * values @ basis.T).float(), 0.01)

    assert factor_with(-0.05).damping == pytest.approx(0.1)
    factor = factor_with(-0.5)
    assert (factor.dtype, factor.damping) == (torch.float64, pytest.approx(1.0))
    says = "not positive definite even with damping 1: use more"
    refused(says, factor_with, -5, error=SolverError)
    # Whole numbers of rank 20 in 40, damped by less than float32 can add to them.
    x = torch.randint(-3, 4, (20, 40), generator=torch.Generator().manual_seed(0)).float()
    factor = inverse_factor(x.T @ x, 1e-9)
    assert (factor.dtype, factor.damping) == (torch.float64, pytest.approx(1e-8))
    check_factor(factor, x.T @ x, 1e-8)
    refused("zero on every", inverse_factor, torch.zeros(3, 3), error=SolverError)


def test_factor_falls_back_to_the_cpu():
    with tracing() as traced:
        gram = torch.randn(24, 24, device="mps")
        traced.copies.clear()
        factor = inverse_factor(gram)
        assert factor.upper.device == factor.dead.device == gram.device
    assert traced.copies[("mps", "cpu")] == 2  # the matrix, and its mean
    assert traced.reads == {"_local_scalar_dense": 2}


def test_shrinkage_is_near_the_best_one():
    """Of Gram matrices from few rows, whose tokens resemble each other."""
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=rng) * torch.linspace(0.2, 2, 48)
    exact = 0.7 * mixing @ mixing.T + 0.3 * torch.eye(48)
    for rows in (16, 64, 256):
        means = torch.randn(rows, 1, 48, generator=rng) @ mixing.T
        inputs = 0.7**0.5 * means + 0.3**0.5 * torch.randn(rows, 40, 48, generator=rng)
        gram = Gram(48, CPU)
        for part in inputs.split(3):
            gram.add(part)
        mixed = gram.matrix() / (rows * 40)
        level = mixed.diagonal().mean() * torch.eye(48)
        shares = [gram.shrinkage(), *torch.logspace(-3, 0.5, 60).tolist()]
        made, *others = (((mixed + s * level) / (1 + s) - exact).norm() for s in shares)
        assert made < 1.1 * min(others)
        assert gram.rows == rows
    gram = Gram(8, CPU)  # one row says nothing of others
    gram.add(torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(1)))
    gram.matrix()
    assert gram.shrinkage() == gram_module.MOST_SHRINKAGE
