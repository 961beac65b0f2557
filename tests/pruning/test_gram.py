from contextlib import nullcontext

import pytest
import torch

from benchmarks.traced import tracing
from calmix.errors import InputError, SolverError
from calmix.pruning import Unstructured, prune
from calmix.pruning import gram as gram_module
from calmix.pruning.gram import Gram, Squares, inverse_factor, relative_error, squared
from calmix.pruning.methods import get_method
from calmix.pruning.methods.wanda import Wanda
from tests.pruning.toy import Elsewhere, Means
from tests.tiny import tiny_ids, tiny_model


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


def test_grams_of_sources_give_a_mix_and_the_error_on_another_text():
    torch.manual_seed(0)
    columns, shares = 24, (0.75, 0.25)
    sources = [torch.randn(tokens, columns) @ torch.randn(columns, columns) for tokens in (90, 30)]
    grams = []
    for x in sources:
        gram = Gram(columns, x.device)
        gram.add(x)
        grams.append(gram.matrix() / len(x))
    mix = sum(share * gram for share, gram in zip(shares, grams, strict=True))
    rows = torch.cat(sources).double()
    assert torch.allclose(mix.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    weight = torch.randn(7, columns)
    kept = get_method("sparsegpt").solve([weight], mix, [Unstructured(0.5)]).weights[0]
    for x, gram in (*zip(sources, grams, strict=True), (rows, mix)):
        lost = (x.double() @ (weight - kept).double().T).square().sum()
        whole = (x.double() @ weight.double().T).square().sum()
        assert relative_error(weight, kept, gram) == pytest.approx((lost / whole).item(), rel=1e-3)
    for half in (torch.bfloat16, torch.float16):  # what is stored is what counts
        small, rounded = weight.to(half), kept.to(half)
        assert relative_error(small, kept, mix) == relative_error(small, rounded, mix) > 0
    assert relative_error(weight, weight, mix) == 0
    assert relative_error(torch.zeros_like(weight), weight, mix) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_way_taken_on_an_accelerator_gives_the_same_sums(dtype, monkeypatch):
    monkeypatch.setattr(gram_module, "bfloat16_products", lambda allowed: nullcontext())  # no TF32
    x = 30 * torch.randn(2, 500, 40).to(dtype)
    gram, squares = Gram(40, torch.device("cpu")), Squares(40, torch.device("cpu"))
    for part in x:
        gram.add(part.as_subclass(Elsewhere))
        squares.add(part.as_subclass(Elsewhere))
    flat = x.double().reshape(-1, 40)
    exact = flat.T @ flat
    assert (gram.matrix().double() - exact).abs().max() / exact.max() < 1e-5
    assert torch.allclose(squares.matrix().double(), exact.diagonal(), rtol=1e-5)


def test_half_types_may_be_multiplied_as_bfloat16_where_that_is_exact(monkeypatch):
    seen = []

    def allowed(given):
        seen.append(given)
        return nullcontext()

    monkeypatch.setattr(gram_module, "bfloat16_products", allowed)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.ones(5, 4, dtype=dtype)
        Gram(4, torch.device("cpu")).add(x)
        Gram(4, torch.device("cpu")).add(x.as_subclass(Elsewhere))
    assert seen == [False, False, False, True, True, True]  # float16 in tf32, not in bfloat16


@pytest.mark.parametrize("kind", [Gram, Squares])
def test_statistics_of_several_processes_are_summed(kind):
    one, x = kind(300, torch.device("cpu")), torch.randn(20, 300)
    one.add(x)
    one.reduce(lambda held: held.mul_(3))
    exact = 3 * (x.T @ x)
    torch.testing.assert_close(one.matrix(), exact if kind is Gram else exact.diagonal())


def test_a_statistic_that_is_no_sum_is_not_shared():
    with pytest.raises(InputError, match=r"^Means cannot be gathered by several processes$"):
        Means(3, torch.device("cpu")).reduce(lambda held: held)


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


SETTINGS = [
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
]


def told():
    """What every way of asking for the precision of products says, or that it refuses to."""
    ways = (
        lambda: torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision,
        lambda: torch.backends.fp32_precision, lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    )  # fmt: skip
    found = []
    for way in ways:
        try:
            found.append(way())
        except RuntimeError:
            found.append("mixed")
    return found


@pytest.mark.filterwarnings("ignore:.*API.*:UserWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_precision_is_what_it_was_whatever_way_it_was_set(setting, monkeypatch):
    """And what a solver does not allow itself is float32, not what the user has set."""
    seen = []
    solve = Wanda.choose

    def choose(self, *given):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return solve(self, *given)

    monkeypatch.setattr(Wanda, "choose", choose)
    try:
        setting()
        before = told()
        prune(tiny_model("llama"), tiny_ids(2, 8), method="wanda", pattern=Unstructured(0.5))
        assert told() == before
        assert set(seen) == {"ieee"}
    finally:
        torch.backends.fp32_precision = "none"
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            backend.fp32_precision = "none"


def correlated(columns, tokens):
    x = torch.randn(tokens, columns, dtype=torch.float64) @ torch.randn(
        columns, columns, dtype=torch.float64
    )
    return (x.T @ x).float()


@pytest.mark.parametrize("columns", [40, 311])  # LAPACK's alone, and of blocks
def test_factor_is_that_of_the_damped_inverse(columns):
    torch.manual_seed(0)
    gram = correlated(columns, 12 * columns)
    factor = inverse_factor(gram, 0.01)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(columns)
    inverse = torch.linalg.inv(damped)
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4 * inverse.max())
    assert (factor.damping, factor.dtype, int(factor.dead.sum())) == (0.01, torch.float32, 0)
    assert factor.upper.dtype == torch.float32
    for scale in (2.0**-30, 2.0**30):  # of whatever units the inputs are
        scaled = inverse_factor(scale * gram)
        assert (scaled.damping, scaled.raised) == (0.01, 1)
        torch.testing.assert_close(scaled.upper * scale**0.5, factor.upper)


@pytest.mark.parametrize("columns", [1, 40, 311])
def test_square_of_a_triangle(columns):
    torch.manual_seed(0)
    upper = torch.randn(columns, columns).triu()
    expected = upper.double().T @ upper.double()
    found = squared(upper)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)


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
    with pytest.raises(SolverError, match="not positive definite even with damping 1: use more"):
        inverse_factor((basis * values @ basis.T).float(), 0.01)


def test_a_factor_beyond_single_precision_is_made_in_double():
    """Whole numbers of rank 20 in 40, damped by less than float32 can add to them."""
    x = torch.randint(-3, 4, (20, 40), generator=torch.Generator().manual_seed(0)).float()
    gram = x.T @ x
    factor = inverse_factor(gram, 1e-9)
    assert (factor.dtype, factor.damping) == (torch.float64, pytest.approx(1e-8))
    assert factor.upper.dtype == torch.float32
    damped = gram.double() + 1e-8 * gram.diagonal().double().mean() * torch.eye(40)
    inverse = torch.linalg.inv(damped)
    upper = factor.upper.double()
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4 * inverse.max())


def test_attempts_at_a_factor_in_order(monkeypatch):
    """The damping asked for, tenfold, tenfold in float64, a hundredfold in float64."""
    invert, failures = gram_module._invert_factor, []

    def failing(h):
        how = failures.pop() if failures else None
        if how in ("nan", "zero"):  # LAPACK finds nothing wrong
            list(invert(h))
            h[0, 1] = h[0, 1] if how == "zero" else torch.nan
            h[2, 2] = 0 if how == "zero" else h[2, 2]
            return [torch.tensor(0)]
        return [torch.tensor(1)] if how else invert(h)

    monkeypatch.setattr(gram_module, "_invert_factor", failing)
    found = []
    for hows in ([], ["failed"], ["nan", "zero"], ["failed"] * 3):
        failures.extend(hows)
        factor = inverse_factor(torch.eye(4), 0.01)
        found.append((factor.damping, factor.dtype, factor.raised))
    single, double = torch.float32, torch.float64
    assert found == [
        (0.01, single, 1), (0.1, single, 10), (0.1, double, 10), (1.0, double, 100),
    ]  # fmt: skip


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


def test_where_float64_is_not_known_the_factor_is_made_on_the_cpu():
    with tracing() as traced:
        gram = torch.randn(24, 24, device="mps")
        traced.copies.clear()
        factor = inverse_factor(gram)
        assert factor.upper.device == factor.dead.device == gram.device
    assert traced.copies[("mps", "cpu")] == 2  # the matrix, and its mean
    assert traced.reads == {"_local_scalar_dense": 3}
