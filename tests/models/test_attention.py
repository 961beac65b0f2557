"""Grouped attention and the reserved cache against transformers' own."""

import pytest
import torch

from calmix.models.attention import (
    NAME,
    cache_argument,
    grouped_attention,
    grouped_decoding,
    reserved_cache,
)
from tests.tiny import ARCHITECTURES, tiny_ids, tiny_model


def decoded(model, ids, cache):
    """Logits of every position, one token at a time."""
    steps = [
        model(ids[:, at : at + 1], use_cache=True, **{cache_argument(model): cache}).logits
        for at in range(ids.shape[1])
    ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_decoding_equals_a_whole_pass(kind):
    """Sliding windows of 16 and shared key heads are among the architectures."""
    model, ids = tiny_model(kind), tiny_ids(3, 24)
    with grouped_decoding(model):
        stepwise = decoded(model, ids, reserved_cache(model, 24))
    torch.testing.assert_close(stepwise, model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_single_positions_are_folded_and_nothing_else(monkeypatch):
    """Shapes that reach PyTorch: three key heads for nine query heads, one position."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, **kwargs):
        seen.append((tuple(query.shape), tuple(key.shape)))
        return attend(query, key, value, **kwargs)

    module = torch.nn.Module()
    module.num_key_value_groups = 3
    key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    one, several = torch.randn(2, 9, 1, 8), torch.randn(2, 9, 7, 8)
    wide = [part.repeat_interleave(3, 1) for part in (key, value)]
    expected = attend(one, *wide, scale=0.5).transpose(1, 2)
    causal = attend(several, *wide, is_causal=True, scale=0.5).transpose(1, 2)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watch)
    made, _ = grouped_attention(module, one, key, value, None, scaling=0.5)
    torch.testing.assert_close(made, expected)
    assert seen == [((2, 3, 3, 8), (2, 3, 7, 8))]
    made, _ = grouped_attention(module, several, key, value, None, scaling=0.5)
    torch.testing.assert_close(made, causal)


def test_the_models_own_attention_is_put_back():
    model = tiny_model("llama")
    with grouped_decoding(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"


def test_a_reserved_cache_copies_nothing():
    model = tiny_model("llama")
    cache = reserved_cache(model, 8)
    with torch.no_grad():
        decoded(model, tiny_ids(2, 4), cache)
        first = cache.layers[0].keys.data_ptr()
        decoded(model, tiny_ids(2, 4), cache)
    assert cache.layers[0].keys.shape[-2] == 8
    assert cache.layers[0].keys.data_ptr() == first
