"""Logits in two steps, and distance against whole logits, through the disk."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from calmix.errors import ModelError
from calmix.evaluation import distance as module
from calmix.evaluation.distance import distance, head_hash, reference
from calmix.evaluation.likelihood import behind, decoder_and_head, row_nll
from calmix.models.opening import open_model
from calmix.recovery.distill import student_loss
from calmix.recovery.training import trained_parameters
from tests.evaluation.helpers import opened, refuses
from tests.tiny import save_tiny_model, tiny_ids, tiny_model

KINDS = {
    **{"llama": {}, "modernbert-decoder": {}, "mamba2": {}},
    **{kind: {"logits_scaling": 4.0} for kind in ("granite", "hyperclovax")},
    **{"gemma2": {"final_logit_softcapping": 2.0}, "recurrent_gemma": {"logits_soft_cap": 2.0}},
}
TEXTS = {"code": tiny_ids(6, 24), "math": tiny_ids(5, 40, seed=2)}


def divergence(before, after):
    """KL by row and position, of whole logits in float64."""
    p, q = (logits.double().log_softmax(-1) for logits in (before, after))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_match_the_models_forward(kind):
    model = tiny_model(kind, **KINDS[kind])
    if kind == "mamba2":  # its decoder returns float32 whatever the dtype
        model.bfloat16()
    ids = tiny_ids(3, 16)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits.float()
        target = decoder_and_head(model)[0](input_ids=ids, use_cache=False)[0]
    wanted = F.cross_entropy(before[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(row_nll(model, ids).flatten(), wanted, rtol=1e-4, atol=1e-5)
    parts = {"lm_head.dense.weight", "lm_head.norm.weight"} if kind.startswith("modern") else set()
    assert set(behind(model)) == parts
    loss_of = student_loss(model, None, recompute=False)
    for parameter in trained_parameters(model).values():
        parameter.data.mul_(1.1)
    loss = loss_of(ids, target)
    loss.backward()
    with torch.no_grad():
        after = model(input_ids=ids, use_cache=False).logits
    assert loss.item() == pytest.approx(float(divergence(before, after).sum()), rel=0.01)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_unusual_inputs_or_logits_are_refused():
    model = tiny_model("llama")
    run = model.forward

    def with_seen(seen, input_ids, **kwargs):
        result = run(input_ids=input_ids, **kwargs)
        result.logits = result.logits + seen(input_ids)[..., None]
        return result

    for forward, says in (
        (partial(run, attention_mask=object()), "gives no logits for token ids in float32"),
        (partial(with_seen, abs), "computes logits from more than its decoder's output"),
        (partial(with_seen, lambda ids: ids.flip(1)), "LlamaForCausalLM is not causal"),
    ):
        model.forward = lambda forward=forward, **kwargs: forward(**kwargs)
        refuses(says, row_nll, model, tiny_ids(), error=ModelError)


def pair(kind="llama"):
    """A dense model, and one with half of its block weights set to zero."""
    dense, pruned = opened(kind), opened(kind)
    dense.model, pruned.model = (tiny_model(kind, **KINDS.get(kind, {})) for _ in "dp")
    dense.fingerprint, pruned.name = "dense", "pruned"
    generator = torch.Generator().manual_seed(3)
    for name, weight in pruned.model.named_parameters():
        if weight.ndim == 2 and "layers" in name:
            weight.mul_(torch.rand(weight.shape, generator=generator) > 0.5)
    return dense, pruned


def whole(dense, pruned, ids):
    """KL by row and position, and agreement, from complete logits."""
    with torch.inference_mode():
        before, after = (m.model(input_ids=ids).logits[:, :-1] for m in (dense, pruned))
    same = before.argmax(-1) == after.argmax(-1)
    return divergence(before, after).numpy(), float(same.double().mean())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "modernbert-decoder"])
def test_distance_matches_full_logits(kind, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_POSITIONS", 7)
    monkeypatch.setattr("calmix.machine.MICRO_TOKENS", 100)
    monkeypatch.setattr("calmix.machine.CACHED_VALUES", 300)  # room for a few positions
    dense, pruned = pair(kind)
    found = distance(pruned, reference(dense, TEXTS))
    for name, ids in TEXTS.items():
        (kl, same), one = whole(dense, pruned, ids), found["dimensions"][name]
        assert (one["kl_mean"] > 1e-3, one["tokens"]) == (True, kl.size)
        wanted = {"kl_mean": kl.mean(), "kl_median": np.median(kl), "kl_p99": np.quantile(kl, 0.99)}
        assert {key: one[key] for key in wanted} == pytest.approx(wanted, rel=1e-3)
        assert 0 < same < 1
        assert one["top1"] == pytest.approx(same)
        half = 1.96 * kl.mean(1).std() / math.sqrt(len(ids))
        assert (one["kl_high"] - one["kl_low"]) / 2 == pytest.approx(half, rel=0.25)
    total, parts = found["total"], found["dimensions"].values()
    assert total["tokens"] == sum(one["tokens"] for one in parts)
    for key in ("kl_mean", "kl_median", "kl_p99", "top1"):
        assert total[key] == pytest.approx(np.mean([one[key] for one in parts]))
    assert total["kl_low"] < total["kl_mean"] < total["kl_high"]


def test_distance_to_itself_is_zero():
    dense, _ = pair()
    dense.model.to(torch.bfloat16)
    found = distance(dense, reference(dense, TEXTS | {"code": TEXTS["code"][:1]}))
    single, several, total = (*found["dimensions"].values(), found["total"])
    assert [*single.values()][1:] == [*total.values()][1:] == [0, 0, 0, 1, None, None]
    assert [*several.values()][1:] == [0, 0, 0, 1, 0, 0]


def test_cached_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    dense = open_model(str(save_tiny_model(tmp_path / "m")))
    made = reference(dense, TEXTS, cache=True)
    (kept,) = (tmp_path / "cache" / "reference").iterdir()
    monkeypatch.setattr(dense.model.model, "forward", None)  # it cannot run
    again = reference(dense, TEXTS, cache=True)
    assert all(torch.equal(again.hidden[name], made.hidden[name]) for name in TEXTS)
    other = {"code": TEXTS["code"]}
    refuses(None, reference, dense, other, cache=True, error=TypeError)
    kept.write_bytes(b"damaged")
    refuses(None, reference, dense, TEXTS, cache=True, error=TypeError)
    monkeypatch.undo()
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "m" / "config.json" / "cache"))
    assert reference(dense, TEXTS, cache=True).hidden.keys() == TEXTS.keys()  # not kept


def test_different_head_needs_the_dense_model():
    dense, pruned = pair("gpt_neox")  # its head is not tied
    made = reference(dense, TEXTS)
    pruned.model.get_output_embeddings().weight.mul_(1.5)
    refuses("pruned has another output head", distance, pruned, made)
    found = distance(pruned, made, dense=lambda: dense)["dimensions"]
    for name, ids in TEXTS.items():
        wanted = whole(dense, pruned, ids)[0].mean()
        assert found[name]["kl_mean"] == pytest.approx(wanted, rel=1e-3)
    # Changes to the logits are part of the head.
    capped = (head_hash(tiny_model("gemma2", final_logit_softcapping=cap)) for cap in (2.0, 3.0))
    assert len({*capped}) == 2


def test_incomparable_models_are_refused():
    dense, pruned = pair()
    made = reference(dense, TEXTS)
    other = replace(made, tokenizer="other")
    refuses(r"pruned has another tokenizer .* \(--no-dist", distance, pruned, other)
    pruned.model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    says = "distance of pruned on the text code is not finite"
    refuses(says, distance, pruned, made, error=ModelError)
    pruned.model.to(torch.bfloat16)
    refuses("open in bfloat16, but the dense model was open in", distance, pruned, made)
