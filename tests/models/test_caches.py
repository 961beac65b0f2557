"""The reserved cache, compared with a forward pass over whole rows."""

import pytest
import torch

from calmix.models.caches import cache_argument, reserved_cache
from tests.tiny import ARCHITECTURES, quick, tiny_ids, tiny_model

FEW = "llama", "bloom", "gemma4_text", "gpt2", "falcon"


def decoded(model, ids, cache):
    """Logits of every position, one token at a time."""
    steps = [
        model(ids[:, at : at + 1], use_cache=True, **{cache_argument(model): cache}).logits
        for at in range(ids.shape[1])
    ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("kind", quick(FEW, ARCHITECTURES))
@torch.no_grad()
def test_reserved_cache_gives_the_logits_of_whole_rows(kind):
    """Sliding windows of 16 and shared key heads are among the architectures."""
    ids, model = tiny_ids(3, 24), tiny_model(kind)
    stepwise = decoded(model, ids, reserved_cache(model, 24))
    torch.testing.assert_close(stepwise, model(ids).logits, atol=1e-4, rtol=1e-4)
    if kind == "llama":  # nothing is copied
        decoded(model, ids[:, :12], cache := reserved_cache(model, 24))
        keys = cache.layers[0].keys
        decoded(model, ids[:, 12:], cache)
        both = keys, cache.layers[0].keys
        assert [len(one[0, 0]) for one in both] == [12, 24]
        assert both[0].data_ptr() == both[1].data_ptr()
