"""The kernel of SparseGPT: in Triton's interpreter beside the plain loop, and compiled."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from benchmarks.traced import tracing
from calmix.pruning import SemiStructured, Unstructured, get_method
from calmix.pruning.patterns import clear
from calmix.pruning.solvers import columns as fused
from calmix.pruning.solvers import surgeon
from tests.device import compiled

pytest.importorskip("triton")
CPU = torch.device("cpu")


def block(size, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=generator)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / size), upper=True)
    wide = torch.randn(size + 3, outputs, generator=generator)
    return wide[1:-2], factor, factor.diagonal().reciprocal()[:, None]


@pytest.mark.parametrize(
    ("pattern", "size", "outputs"),
    [(Unstructured(0.6), 64, 40), (Unstructured(0.5), 41, 8), (SemiStructured(2, 4), 64, 33),
     (SemiStructured(1, 3), 129, 5)],
    ids=str,
)  # fmt: skip
def test_the_kernel_does_what_the_plain_loop_does(pattern, size, outputs):
    given, upper, inverse = block(size, outputs)
    leverage = inverse.clone()
    leverage[[2, 3, 7]] = 0  # dead inputs: ties, which go in order
    mask = (torch.rand(size, outputs, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    semi = isinstance(pattern, SemiStructured)
    plain, expected = given.clone(), torch.empty_like(mask) if semi else mask.clone()
    wanted = surgeon.prune_block(plain, expected, upper, inverse, leverage, pattern, at_once=False)
    weights, found = given.clone(), torch.empty_like(mask) if semi else mask.clone()
    m, go = (pattern.m, pattern.m - pattern.n) if semi else (0, 0)
    with torch.inference_mode():
        made = fused.prune_columns(weights, found, upper, inverse, leverage, m, go)
    assert torch.equal(found, expected)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clear(weights, found), clear(plain, expected), rtol=1e-4, atol=1e-5)


def test_a_layer_is_solved_by_it(monkeypatch):
    """Layers of several heights, and a last block that is not whole; the kernel agrees at once."""
    monkeypatch.setattr(fused, "usable", lambda device, *at: at[-1](device, *at[:-1]))
    monkeypatch.setattr(surgeon, "prune_block", as_on_a_device(surgeon.prune_block))
    monkeypatch.setattr(surgeon, "BLOCK", 32)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(120, 40, generator=generator)
    weights = [torch.randn(rows, 40, generator=generator) for rows in (9, 4)]
    method = get_method("sparsegpt")
    for pattern in (Unstructured(0.5), SemiStructured(2, 4)):
        found = method.solve(weights, x.T @ x, [pattern] * 2)
        with monkeypatch.context() as patched:
            patched.setattr(fused, "usable", lambda *at: False)
            plain = method.solve(weights, x.T @ x, [pattern] * 2)
        assert found.pruned == plain.pruned
        for a, b in zip(found.weights, plain.weights, strict=True):
            assert torch.equal(a == 0, b == 0)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def as_on_a_device(block):
    def there(weights, mask, upper, inverse, leverage, pattern, rounding=None, at_once=False):
        m, go = (4, 2) if isinstance(pattern, SemiStructured) else (0, 0)
        if not at_once and fused.usable(weights.device, len(weights), m, go, surgeon.kernel_agrees):
            return fused.prune_columns(weights, mask, upper, inverse, leverage, m, go)
        return block(weights, mask, upper, inverse, leverage, pattern, at_once=True)

    return there


@pytest.mark.long  # in a process of its own, which does not interpret
def test_it_compiles_for_devices_that_are_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, compiled.__file__], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    told = [json.loads(line) for line in made.stdout.splitlines()]
    assert [(one["capability"], one["m"]) for one in told] == [
        (at, m) for at in compiled.CAPABILITIES for m, _ in compiled.CASES
    ]
    assert all(one["bytes"] for one in told)
    assert not any(one["spilt"] for one in told)


@pytest.mark.parametrize(
    ("pattern", "examples"),
    [(Unstructured(0.5), [(128, 0, 0), (64, 0, 0)]),
     (SemiStructured(2, 3), [(129, 3, 1), (63, 3, 1)]),
     (SemiStructured(1, 16), [])],  # as many are not compared in a kernel
    ids=str,
)  # fmt: skip
def test_it_is_tried_on_blocks_as_large_as_those_it_is_used_on(monkeypatch, pattern, examples):
    usable, asked = fused.usable, []
    monkeypatch.setattr(fused, "tried", lambda what, at, check, *given: asked.append(given) or True)
    with tracing(), mock.patch.object(fused, "usable", usable):
        get_method("sparsegpt").solve([torch.randn(24, 192)], torch.randn(192, 192), [pattern])
    assert asked == examples


def test_a_thread_holds_as_many_values_whatever_the_block():
    assert [fused.tile(size) for size in (32, 41, 128, 129)] == [
        (32, 1), (64, 2), (128, 4), (256, 8)
    ]  # fmt: skip


def test_where_it_does_not_run_the_plain_way_is_taken():
    answers = iter([False, True])

    def check(at, size, m, go):
        return next(answers)

    device = torch.device("cuda", 7)
    with pytest.warns(UserWarning, match="is not used on cuda:7: its results are wrong"):
        assert not fused.usable(device, 128, 0, 0, check)
    assert not fused.usable(device, 128, 0, 0, check)  # it is tried once
    assert fused.usable(device, 128, 4, 2, check)  # but another kernel on its own

    def broken(*at):
        raise RuntimeError("no ptxas\nin sight")

    with pytest.warns(UserWarning, match="not used on cuda:7: no ptxas$"):
        assert not fused.usable(device, 128, 0, 0, broken)
    assert not fused.usable(CPU, 128, 0, 0, lambda *at: True)
