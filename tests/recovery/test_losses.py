"""The losses of a recovery against what they are in one piece."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from calmix.recovery import distill
from calmix.recovery.blocks import relative_error
from calmix.recovery.distill import divergence


@pytest.mark.parametrize("cap", [None, 3.0])
def test_divergence_in_chunks_is_that_of_all_logits_at_once(monkeypatch, cap):
    torch.manual_seed(0)
    heads = [torch.randn(50, 8) for _ in range(2)]
    hidden, target = torch.randn(37, 8), torch.randn(37, 8)

    def softmax(weight, states):
        value = states @ weight.double().T
        return (value if cap is None else torch.tanh(value / cap) * cap).softmax(-1)

    whole = hidden.double().requires_grad_()
    p, q = softmax(heads[1], target.double()), softmax(heads[0], whole)
    expected = (p * (p / q).log()).sum()
    expected.backward()
    monkeypatch.setattr(distill, "CHUNK", 0)
    monkeypatch.setattr(distill, "LEAST", 16)
    monkeypatch.setattr("calmix.machine.CACHED_VALUES", 150)  # three rows
    hidden.requires_grad_()

    def head(states, weight):
        value = F.linear(states, weight)
        return value if cap is None else torch.tanh(value / cap) * cap

    ours, theirs = (partial(head, weight=weight) for weight in heads)
    found = divergence(hidden, target, ours, theirs, 50)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, 3 * whole.grad.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = divergence(hidden, target, ours, theirs, 50)
    assert again.item() == found.item()


def test_every_token_counts_the_same():
    target = torch.tensor([[3.0, 4.0], [3000.0, 4000.0], [0.0, 0.0]])
    output = target * 1.1
    assert relative_error(output, target).item() == pytest.approx(0.02, rel=1e-4)
