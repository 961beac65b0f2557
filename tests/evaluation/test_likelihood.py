"""Logits in two steps, whatever a model does behind its head; a text's perplexity."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from calmix.errors import InputError, ModelError
from calmix.evaluation.likelihood import behind, decoder_and_head, perplexity, row_nll
from calmix.recovery.distill import Student
from calmix.recovery.training import trained_names
from tests.evaluation.helpers import opened
from tests.tiny import tiny_ids, tiny_model

KINDS = {
    "llama": {}, "gemma2": {"final_logit_softcapping": 2.0}, "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0}, "modernbert-decoder": {}, "mamba2": {},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
}  # fmt: skip


def divergence(before, after):
    p, q = (logits.double().log_softmax(-1) for logits in (before, after))
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_models_own_forward(kind):
    model = tiny_model(kind, **KINDS[kind])
    if kind == "mamba2":  # whose decoder returns float32 whatever its weights are
        model.bfloat16()
    ids = tiny_ids(3, 16)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits.float()
        target = decoder_and_head(model)[0](input_ids=ids, use_cache=False)[0]
    wanted = F.cross_entropy(before[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(row_nll(model, ids).flatten(), wanted, rtol=1e-4, atol=1e-5)
    parts = {"lm_head.dense.weight", "lm_head.norm.weight"} if kind.startswith("modern") else set()
    assert set(behind(model)) == parts
    student = Student(model, None, recompute=False)
    for name in trained_names(model):
        model.get_parameter(name).data.mul_(1.1)
    loss = student(ids, target)
    loss.backward()
    with torch.no_grad():
        after = model(input_ids=ids, use_cache=False).logits
    assert loss.item() == pytest.approx(divergence(before, after), rel=0.01)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_of_other_inputs_or_logits_is_refused_in_one_line():
    model = tiny_model("llama")
    run = model.forward
    model.forward = lambda **kwargs: run(**kwargs, attention_mask=object())
    with pytest.raises(ModelError, match="gives no logits for token ids in float32"):
        row_nll(model, tiny_ids())

    def adding(look):
        def forward(input_ids, **kwargs):
            result = run(input_ids=input_ids, **kwargs)
            result.logits = result.logits + look(input_ids)[..., None]
            return result

        return forward

    model.forward = adding(lambda ids: ids)
    with pytest.raises(ModelError, match="makes its logits of more than its decoder returns"):
        row_nll(model, tiny_ids())
    model.forward = adding(lambda ids: ids.flip(1))
    with pytest.raises(ModelError, match="LlamaForCausalLM looks at tokens that follow"):
        row_nll(model, tiny_ids())


def test_perplexity_is_of_whole_windows():
    model, calls = opened(), list[tuple[int, int]]()
    text = "the river runs " * 5
    found = perplexity(model, text, length=32, tick=lambda *of: calls.append(of))
    assert (found.length, found.windows, found.tokens, calls[-1]) == (32, 2, 62, (2, 2))
    windows = [model.tokenizer(text)["input_ids"][at : at + 32] for at in (0, 32)]
    nll = float(row_nll(model.model, torch.tensor(windows)).sum())
    assert found.perplexity == pytest.approx(math.exp(nll / 62))
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / 62)  # a byte is a token here
    for length, says in ((300, "beyond the model's context"), (80, "one window")):
        with pytest.raises(InputError, match=says):
            perplexity(model, text, length=length)
