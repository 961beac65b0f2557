"""Which products may be rounded, and that settings are restored."""

from types import SimpleNamespace

import pytest
import torch

from calmix import precision
from calmix.precision import bfloat16_products, large_product, large_products, rounded, widest
from calmix.precision import rounded_product as product


def test_float64_support(monkeypatch):
    for has in (True, False):
        told = SimpleNamespace(has_fp64=has)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, told=told: told)
        actual = [widest(torch.device(kind)) for kind in ("cpu", "cuda", "mps", "xpu")]
        last = torch.float64 if has else torch.float32
        assert actual == [torch.float64, torch.float64, torch.float32, last]


def alone(monkeypatch, yes):
    """Let products be chosen as on a CPU where only those of bfloat16 are fast, or is not."""
    monkeypatch.setattr(precision, "_bfloat16_alone", lambda: yes)


def test_large_products_are_exact():
    torch.manual_seed(0)
    left, right, out = torch.randn(256, 300), torch.randn(300, 200), torch.empty(256, 200)
    exact = left.double() @ right.double()
    assert large_product(left, right, out=out) is out
    assert torch.equal(large_product(left, right), out)
    assert (out - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("yes", [False, True])
def test_rounded_factors(yes, monkeypatch):
    torch.manual_seed(0)
    alone(monkeypatch, yes)
    left, right = torch.randn(70, 90), torch.randn(90, 90)
    factor = rounded(right)
    assert factor.dtype == (torch.bfloat16 if yes else torch.float32)
    actual, exact = product(left, factor), left.double() @ right.double()
    assert (actual - exact).norm() < 0.005 * exact.norm()


def test_large_product_settings_are_temporary(monkeypatch):
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [cpu.fp32_precision, cuda.fp32_precision]
    alone(monkeypatch, True)
    with bfloat16_products(allowed=False):
        with large_products():
            assert (cpu.fp32_precision, cuda.fp32_precision) == ("bf16", "ieee")
        assert (cpu.fp32_precision, cuda.fp32_precision) == ("ieee", "ieee")
        alone(monkeypatch, False)
        with large_products():
            assert cpu.fp32_precision == "ieee"
    with pytest.raises(ZeroDivisionError), bfloat16_products():
        raise ZeroDivisionError
    assert [cpu.fp32_precision, cuda.fp32_precision] == before
