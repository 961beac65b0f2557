"""The losses of a recovery against what they are in one piece."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from calmix.recovery import losses
from calmix.recovery.losses import divergence, relative_error


@pytest.mark.parametrize("cap", [None, 3.0])
def test_divergence_in_chunks_is_that_of_all_logits_at_once(monkeypatch, cap):
    torch.manual_seed(0)
    heads = [torch.randn(50, 8) for _ in range(2)]
    hidden, target = torch.randn(37, 8), torch.randn(37, 8)

    def logits(weight):
        def of(states):
            value = states @ weight.T
            return value if cap is None else torch.tanh(value / cap) * cap

        return of

    whole = hidden.double().requires_grad_()
    ours, theirs = (logits(head.double()) for head in heads)
    p, q = theirs(target.double()).softmax(-1), ours(whole).softmax(-1)
    expected = (p * (p / q).log()).sum()
    expected.backward()
    monkeypatch.setattr(losses, "CHUNK", 0)  # 16 tokens at a time, the least
    hidden.requires_grad_()
    found = divergence(hidden, target, logits(heads[0]), logits(heads[1]), 50)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, 3 * whole.grad.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = divergence(hidden, target, logits(heads[0]), logits(heads[1]), 50)
    assert again.item() == found.item()


def test_every_token_counts_the_same():
    target = torch.tensor([[3.0, 4.0], [3000.0, 4000.0], [0.0, 0.0]])
    output = target * 1.1
    assert relative_error(output, target).item() == pytest.approx(0.02, rel=1e-4)
    both = F.mse_loss(output, target)
    assert both > 1e4  # what a mean square makes of one large token
