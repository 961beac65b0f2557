import pytest
import torch

from calmix.errors import SolverError
from calmix.pruning import gram as gram_module
from calmix.pruning.gram import Gram, Squares, inverse_factor


@pytest.mark.parametrize("columns", [1, 7, 33, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_matches_float64(columns, dtype):
    torch.manual_seed(columns)
    x = torch.randn(3, 900, columns).to(dtype)
    gram, squares = Gram(columns, x.device), Squares(columns, x.device)
    for batch in x:
        gram.add(batch)
        squares.add(batch)
    flat = x.double().reshape(-1, columns)
    exact = flat.T @ flat
    scale = exact.diagonal().max()
    assert gram.tokens == squares.tokens == 2700
    # Half-precision inputs must not cost precision: a bfloat16 result would be off by 4e-3.
    assert (gram.matrix().double() - exact).abs().max() / scale < 1e-5
    assert torch.allclose(squares.matrix().double(), exact.diagonal(), rtol=1e-5)
    assert torch.equal(gram.matrix(), gram.matrix().T)


@pytest.mark.parametrize("precision", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_precision_setting_is_restored(precision, dtype):
    """Of the backends: torch refuses to tell one for all of them where they differ."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    at_first = [backend.fp32_precision for backend in backends]
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        before = [backend.fp32_precision for backend in backends]
        gram = Gram(4, torch.device("cpu"))
        gram.add(torch.randn(5, 4, dtype=dtype))
        assert [backend.fp32_precision for backend in backends] == before
    finally:
        for backend, value in zip(backends, at_first, strict=True):
            backend.fp32_precision = value


def correlated(columns: int, tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, columns, dtype=torch.float64) @ torch.randn(
        columns, columns, dtype=torch.float64
    )
    return (x.T @ x).float()


def test_factor_is_that_of_the_damped_inverse():
    torch.manual_seed(0)
    gram = correlated(40, 500)
    factor = inverse_factor(gram, 0.01)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(40)
    inverse = torch.linalg.inv(damped)
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4 * inverse.max())
    assert (factor.damping, factor.dtype, int(factor.dead.sum())) == (0.01, torch.float32, 0)


def test_damping_is_raised_and_recorded_never_skipped():
    torch.manual_seed(0)
    # Not positive definite at 1 % damping: one eigenvalue is -5 % of the mean diagonal.
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    values = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)
    values[0] = -0.05
    gram = (basis * values @ basis.T).float()
    factor = inverse_factor(gram, 0.01)
    assert factor.damping == pytest.approx(0.1)
    values[0] = -0.5
    factor = inverse_factor((basis * values @ basis.T).float(), 0.01)
    assert factor.dtype == torch.float64
    assert factor.damping == pytest.approx(1.0)
    values[0] = -5
    with pytest.raises(SolverError, match="not positive definite"):
        inverse_factor((basis * values @ basis.T).float(), 0.01)


def test_attempts_at_a_factor_in_order(monkeypatch):
    """The damping asked for, tenfold, tenfold in float64, a hundredfold in float64."""
    invert, failures = gram_module._invert_factor, []

    def failing(h):
        return [torch.tensor(failures.pop())] if failures else invert(h)

    monkeypatch.setattr(gram_module, "_invert_factor", failing)
    found = []
    for count in range(4):
        failures.extend([1] * count)
        factor = inverse_factor(torch.eye(4), 0.01)
        found.append((factor.damping, factor.dtype))
    single, double = torch.float32, torch.float64
    assert found == [(0.01, single), (0.1, single), (0.1, double), (1.0, double)]


def test_unusable_inputs():
    with pytest.raises(SolverError, match="zero on every"):
        inverse_factor(torch.zeros(3, 3))
    with pytest.raises(SolverError, match="not finite"):
        inverse_factor(torch.full((3, 3), float("nan")))


def test_dead_inputs_are_reported():
    torch.manual_seed(0)
    gram = correlated(10, 100)
    gram[3] = gram[:, 3] = 0
    assert inverse_factor(gram).dead.nonzero().flatten().tolist() == [3]
