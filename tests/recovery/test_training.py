"""The parts of recovery: rows, steps, learning rates, masters, losses."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calmix.errors import InputError, SolverError
from calmix.recovery import distill
from calmix.recovery.blocks import relative_error
from calmix.recovery.training import (
    Masters,
    TrainingState,
    rate,
    size_of,
    split_rows,
    steps_of,
    train,
)


def test_split_of_rows():
    one = ["a"] * 64
    training, held_out = rows = split_rows(one, 4, seed=3)
    assert len(held_out) == 4
    assert sorted([*training, *held_out]) == list(range(64))
    assert rows == split_rows(one, 4, seed=3)
    assert rows != split_rows(one, 4, seed=4)
    assert len(split_rows(one[:6], 4, seed=0)[1]) == 2
    with pytest.raises(InputError, match=r"5 rows is too small .* at least 6 are needed"):
        split_rows(one[:5], 4, seed=0)
    # Each source decides by its weight when to stop.
    sources = [name for name in "aabcaabc" for _ in range(8)]  # 32, 16 and 16 rows
    for seed in range(20):
        _, stored = split_rows(sources, 4, seed)
        assert sorted(sources[row] for row in stored) == ["a", "a", "b", "c"]


def test_epochs_and_learning_rates():
    steps = steps_of(range(10), 4, 3, seed=0)
    assert [len(step) for step in steps] == [4] * 6
    for epoch in (steps[:2], steps[2:4], steps[4:]):
        assert len({item for step in epoch for item in step}) == 8
    assert steps[:2] != steps[2:4]
    rates = [rate(step, 100, 1.0) for step in range(100)]
    assert max(rates) == rates[4] == 1.0
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert rate(0, 1, 1.0) == 1.0


def curve(held_out, steps=20, **how):
    """Train without loss or steps, with these held-out losses."""
    readings, rates, progress = iter(held_out), [], TrainingState(steps)
    masters = SimpleNamespace(step=rates.append)

    def mean(items, learn):
        return torch.tensor(0.0 if learn else next(readings), dtype=torch.float64)

    for _ in train(progress, masters, [[0]] * steps, [1], mean, 1.0, every=2, **how):
        pass
    return progress, rates


def test_early_stopping():
    held_out = [1.0, 0.9, 0.95, 0.8, 0.8, 0.9, 0.85, 0.1]
    progress, _ = curve(held_out)
    assert (progress.best, progress.done, progress.stopped) == (6, 12, True)
    assert progress.held_out == [[2 * number, loss] for number, loss in enumerate(held_out[:7])]
    progress, _ = curve(held_out, steps=7)
    assert (progress.best, progress.done, progress.stopped) == (6, 7, False)
    with pytest.raises(SolverError, match="not finite on the held-out rows after step 2 of 20"):
        curve([1.0, float("nan")])
    # Similar models learn at a lower rate.
    full, quarter = (curve([0.5] * 9, wide=wide)[1] for wide in (1e-9, 2.0))
    assert max(full) == 1.0
    assert quarter == pytest.approx([rate / 4 for rate in full])


def layer(dtype=torch.bfloat16):
    torch.manual_seed(0)
    module = nn.Linear(16, 8).to(dtype)
    with torch.no_grad():
        module.weight[:, ::2] = 0
        module.bias[:4] = 0
    return module


def masters_of(module):
    own = dict(module.named_parameters())
    stored = copy.deepcopy(module.state_dict())
    return Masters(own, stored.__getitem__, {"weight"}, {}, stored.__getitem__, {})


def learn(module, step, after=lambda: None):
    """Add the gradients of two micro-batches."""
    for half in (0, 1):
        generator = torch.Generator().manual_seed(2 * step + half)
        inputs = torch.randn(5, 16, generator=generator).to(module.weight.dtype)
        module(inputs).square().sum().backward()
        after()


def fit(module, masters, steps):
    for step in steps:
        learn(module, step, masters.collect)
        masters.step(1e-2)


def test_masters_match_adam_and_keep_zeros():
    module, plain = layer(torch.float32), layer(torch.float32)
    masters = masters_of(module)
    sizes = [(one, one[one != 0].square().mean().sqrt().item()) for one in plain.parameters()]
    groups = [{"params": [one], "lr": 1e-2 * size} for one, size in sizes]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    fit(module, masters, range(5))
    for step in range(5):
        learn(plain, step)
        plain.weight.grad[:, ::2] = 0
        adam.step()
        adam.zero_grad()
    torch.testing.assert_close(module.weight, plain.weight)
    torch.testing.assert_close(module.bias, plain.bias)
    assert not module.weight[:, ::2].signbit().any()
    assert module.bias.all()  # only zeros of linear maps are held
    module = layer()  # smaller steps than bfloat16 shows are kept too
    masters = masters_of(module)
    before = masters.values["weight"].detach().clone()
    fit(module, masters, range(1))
    torch.testing.assert_close(module.weight.float(), masters.values["weight"], rtol=4e-3, atol=0)
    assert not torch.equal(module.weight.float(), masters.values["weight"])
    assert not torch.equal(before, masters.values["weight"])


def test_size_of_nonzero_weights():
    assert size_of(torch.tensor([0.0, 0.3, 0.0, -0.4])) == pytest.approx((0.25 / 2) ** 0.5)
    assert size_of(torch.tensor([0.5, -0.5], dtype=torch.float64)) == 0.5
    assert size_of(torch.zeros(4)) == size_of(torch.full((4,), 1e-5)) == 1e-3
    assert size_of(torch.tensor([300.0, 0.01], dtype=torch.bfloat16)) == 1.0


@pytest.mark.parametrize("cap", [None, 3.0])
def test_chunked_divergence(monkeypatch, cap):
    torch.manual_seed(0)
    heads = [torch.randn(50, 8) for _ in range(2)]
    hidden, target = torch.randn(37, 8), torch.randn(37, 8)

    def head(states, weight):
        value = nn.functional.linear(states, weight.to(states.dtype))
        return value if cap is None else torch.tanh(value / cap) * cap

    whole = hidden.double().requires_grad_()
    p, q = head(target.double(), heads[1]).softmax(-1), head(whole, heads[0]).softmax(-1)
    expected = (p * (p / q).log()).sum()
    expected.backward()
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(distill, "LOGIT_POSITIONS", 16)
    monkeypatch.setattr("calmix.machine.CACHED_VALUES", 150)  # three rows
    hidden.requires_grad_()
    ours, theirs = (partial(head, weight=weight) for weight in heads)
    actual = distill.divergence(hidden, target, ours, theirs, 50)
    (3 * actual).backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, 3 * whole.grad.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = distill.divergence(hidden, target, ours, theirs, 50)
    assert again.item() == actual.item()


def test_block_loss_weights_tokens_equally():
    target = torch.tensor([[3.0, 4.0], [3000.0, 4000.0], [0.0, 0.0]])
    output = target * 1.1
    assert relative_error(output, target).item() == pytest.approx(0.02, rel=1e-4)
