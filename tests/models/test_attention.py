"""Sliced attention and the reserved cache, compared with transformers' own."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import calmix.models.attention as own
from calmix.models import open_model
from calmix.models.attention import attention, reserved_cache, sliced_attention, use_own_attention
from tests.tiny import ARCHITECTURES, quick, tiny_ids, tiny_model

FEW = "llama", "bloom", "gemma4_text", "gpt2", "falcon"
OTHERS = "bloom", "falcon", "gemma2"  # do not use transformers' attention interface, or not sdpa
SHAPES = [  # rows, heads, key heads, positions, tokens, width, value width
    (3, 6, 2, 150, 150, 16, 16),
    (2, 4, 4, 64, 64, 8, 12),
    (5, 4, 1, 33, 90, 16, 16),
]


@pytest.fixture
def slices(monkeypatch):
    """The calls that use slices, with slices of few positions and rows."""
    seen = []

    def watch(query, *rest):
        seen.append(tuple(query.shape))
        return sliced_attention(query, *rest)

    monkeypatch.setattr(own, "sliced_attention", watch)
    monkeypatch.setattr(own, "SLICE", 16)
    monkeypatch.setattr(own, "values_at_once", lambda device: 16 * 6 * 150)
    return seen


def masks(rows, positions, tokens):
    """A sliding window of 20 for all rows, and different windows per row."""
    at, of = torch.arange(positions)[:, None] + tokens - positions, torch.arange(tokens)
    widths = 20 + 7 * torch.arange(rows)[:, None, None]
    same = ((of <= at) & (of > at - 20)).expand(rows, 1, positions, tokens)
    each = ((of <= at) & (of > at - widths))[:, None]
    low = torch.finfo(torch.float32).min
    return [same, each, torch.zeros(each.shape).masked_fill(~each, low), same[:1]]


def torchs(query, key, value, mask, scale=None):
    """PyTorch's attention, one query head at a time."""
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return result.transpose(1, 2)


def there_and_back(attend, given, *how, back=None):
    """The output, and the gradients of the inputs."""
    leaves = [one.clone().requires_grad_() for one in given]
    result = attend(*leaves, *how)
    result.backward(torch.ones_like(result) if back is None else back)
    return [result.detach(), *(one.grad for one in leaves)]


@pytest.mark.parametrize("shape", SHAPES)
def test_sliced_attention_matches_torch_forward_and_backward(shape, slices):
    rows, heads, shared, positions, tokens, width, wide = shape
    torch.manual_seed(0)
    inputs = [
        torch.randn(rows, n, many, size)
        for n, many, size in (
            (heads, positions, width),
            (shared, tokens, width),
            (shared, tokens, wide),
        )
    ]
    back = torch.randn(rows, positions, heads, wide)
    plain = [None] if positions == tokens else []
    for mask in plain + masks(rows, positions, tokens):
        actual, expected = (
            there_and_back(attend, inputs, mask, 0.3, back=back)
            for attend in (own.sliced_attention, torchs)
        )
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_bfloat16_error_is_at_most_torchs():
    torch.manual_seed(1)
    inputs = [torch.randn(2, n, 200, 32, dtype=torch.bfloat16) for n in (6, 2, 2)]
    exact = [one.double() for one in inputs]
    off = [
        there_and_back(torchs, exact, None),
        there_and_back(torchs, inputs, None),
        there_and_back(sliced_attention, inputs, None),
    ]
    for truth, theirs, ours in zip(*off, strict=True):
        assert (ours - truth).norm() < 1.4 * (theirs - truth).norm() < 0.02 * truth.norm()


def decoded(model, ids, cache):
    """Logits of every position, one token at a time."""
    steps = [
        model(ids[:, at : at + 1], use_cache=True, **{own.cache_argument(model): cache}).logits
        for at in range(ids.shape[1])
    ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("kind", quick(FEW, ARCHITECTURES))
def test_models_with_sliced_attention_match(kind, slices):
    """Sliding windows of 16 and shared key heads are among the architectures."""
    ids = tiny_ids(3, 24)
    results = []
    for use in (False, True):
        model = tiny_model(kind).requires_grad_(True)
        if use:
            use_own_attention(model)
        logits = model(ids).logits
        logits.square().mean().backward()
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        results.append([logits.detach(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert bool(slices) == (kind not in OTHERS)
    with torch.no_grad():
        stepwise = decoded(model, ids, reserved_cache(model, 24))
    torch.testing.assert_close(stepwise, results[1][0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_single_positions_and_unknown_calls(monkeypatch, slices):
    """The same as transformers, with three key heads for nine query heads."""
    module, encoder = torch.nn.Module(), torch.nn.Module()
    module.num_key_value_groups = encoder.num_key_value_groups = 3
    encoder.is_causal = False
    key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    one, several = torch.randn(2, 9, 1, 8), torch.randn(2, 9, 7, 8)
    seen, both = [], torch.ones(1, 1, 7, 7, dtype=torch.bool)
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda query, *more, **how: seen.append(tuple(query.shape)) or attend(query, *more, **how),
    )
    for number, (who, query, mask, how, folded, sliced) in enumerate(
        (
            (module, one, None, {}, True, False),
            (module, several, None, {}, False, True),
            (encoder, several, None, {}, False, False),
            (module, several, both, {}, False, False),  # with only a mask it is not causal
            (
                module,
                several[:, :, :5],
                None,
                {},
                False,
                False,
            ),  # positions of the queries are unknown
            (module, several, None, {"is_causal": False}, False, False),
            (module, several, torch.zeros(2, 9, 7, 7), {}, False, False),  # one mask per head
        )
    ):
        wanted, _ = sdpa_attention_forward(who, query, key, value, mask, scaling=0.5, **how)
        seen.clear()
        slices.clear()
        result, _ = attention(who, query, key, value, mask, scaling=0.5, **how)
        torch.testing.assert_close(result, wanted, msg=str(number))
        assert ((2, 3, 3, 8) in seen, bool(slices)) == (folded, sliced), number
    half = [x.bfloat16() for x in (several, key, value)]
    for able, sliced in (({"amx_bf16": True}, 0), ({}, 1)):
        monkeypatch.setattr(own, "capabilities", lambda able=able: able)
        slices.clear()
        attention(module, *half, None)
        assert len(slices) == sliced


def test_only_opened_models_use_slices(tmp_path, tiny_folder, slices):
    """Other models of the process, and those with eager attention, keep transformers' own."""
    opened = open_model(str(tiny_folder))
    assert opened.model.config._attn_implementation == "sdpa"
    ids = tiny_ids(2, 24)
    tiny_model("llama")(ids)
    eager = tiny_model("llama")
    use_own_attention(eager)
    eager.set_attn_implementation("eager")
    eager(ids)
    assert not slices
    # DeepSeek V3.2 attends to `index_topk` tokens if it knows the attention.
    knowing = tiny_model("deepseek_v32", index_topk=4)
    wanted = knowing(ids).logits
    use_own_attention(knowing)
    torch.testing.assert_close(knowing(ids).logits, wanted, atol=1e-4, rtol=1e-3)
    assert slices
    slices.clear()
    opened.model(ids)
    assert slices
    opened.model.save_pretrained(tmp_path / "saved")
    assert own.MARK not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")


@torch.no_grad()
def test_reserved_cache_does_not_copy():
    model = tiny_model("llama")
    cache = reserved_cache(model, 8)
    decoded(model, tiny_ids(2, 4), cache)
    first = cache.layers[0].keys.data_ptr()
    decoded(model, tiny_ids(2, 4), cache)
    assert (cache.layers[0].keys.shape[-2], cache.layers[0].keys.data_ptr()) == (8, first)
