"""The scorer: the plain model's numbers on every architecture, whatever the batch size."""

from __future__ import annotations

import pytest
import torch

from calmix.errors import InputError, ModelError
from calmix.evaluation import scorer as module
from calmix.evaluation.scorer import Request, Scorer, attention_window
from calmix.models import OpenModel
from tests.evaluation.helpers import opened, quiz, reference, request
from tests.tiny import ARCHITECTURES


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_TOKENS", 48)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_are_the_plain_models_on_every_architecture(kind: str) -> None:
    model, requests = opened(kind), quiz()
    found = Scorer(model, batch_tokens=200).loglikelihood(requests)
    wanted = reference(model, requests)
    assert [best for _, best in found] == [best for _, best in wanted]
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], rel=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_most_models_run_packed(kind: str) -> None:
    assert Scorer(opened(kind)).packed


def test_a_model_without_masks_runs_plain() -> None:
    assert not Scorer(opened("bloom")).packed  # its positions come from a mask of two dimensions


def test_rows_beyond_a_sliding_window_run_plain() -> None:
    model = opened("mistral")
    assert attention_window(model.model) == 16
    assert attention_window(opened("llama").model) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_the_batch_size(dtype: torch.dtype) -> None:
    model, requests = opened(), quiz(questions=12)
    model.model.to(dtype)
    runs = [Scorer(model, batch_tokens=n).loglikelihood(requests) for n in (1, 64, 500, 10_000)]
    wanted = [value for value, _ in runs[0]]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for run in runs[1:]:
        assert [value for value, _ in run] == pytest.approx(wanted, rel=tolerance)


def test_scores_do_not_depend_on_the_order_of_requests() -> None:
    model, requests = opened(), quiz()
    forth = Scorer(model).loglikelihood(requests)
    back = Scorer(model).loglikelihood(requests[::-1])
    assert forth == back[::-1]


def test_single_token_choices_share_one_position() -> None:
    model = opened()
    requests = [request("Pick:", letter) for letter in "abcd"]
    found = Scorer(model).loglikelihood(requests)
    assert [v for v, _ in found] == pytest.approx([v for v, _ in reference(model, requests)])


def test_long_contexts_are_cut_on_the_left_and_counted() -> None:
    model = opened()
    text = "abcdefghij" * 40  # 400 tokens, the context is 256
    scorer = Scorer(model)
    found = scorer.loglikelihood([request(text, "xyz", "long"), request("a", "b", "short")])
    wanted = reference(model, [request(text[-254:], "xyz")])
    assert found[0][0] == pytest.approx(wanted[0][0], rel=1e-4)
    assert scorer.truncated == {"long": 1}


def test_an_answer_longer_than_the_context_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"task big .* 300 tokens, .* is 256"):
        Scorer(opened()).loglikelihood([request("a", "b" * 300, "big")])


def test_a_continuation_without_tokens_is_one_line() -> None:
    with pytest.raises(ModelError, match="no tokens for a text of task empty"):
        Scorer(opened()).loglikelihood([request("a", "", "empty")])


def test_a_tokenizer_without_begin_and_end_cannot_start_from_nothing() -> None:
    model = opened()
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a begin nor an end token"):
        Scorer(model).loglikelihood([request("", "text")])


@pytest.mark.parametrize("tokens", [0, -5])
def test_batch_tokens_must_be_positive(tokens: int) -> None:
    with pytest.raises(InputError, match="must be positive"):
        Scorer(opened(), batch_tokens=tokens)


def test_progress_ends_at_all_requests() -> None:
    calls: list[tuple[int, int]] = []
    requests = quiz()
    Scorer(opened(), progress=lambda done, total: calls.append((done, total))).loglikelihood(
        requests
    )
    assert calls[-1] == (len(requests), len(requests))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.real
def test_the_builtin_model_scores_alike_in_any_batch(builtin_float32: OpenModel) -> None:
    requests = quiz(questions=2, shots=3)
    few = Scorer(builtin_float32, batch_tokens=64).loglikelihood(requests)
    many = Scorer(builtin_float32, batch_tokens=4096).loglikelihood(requests)
    assert [v for v, _ in few] == pytest.approx([v for v, _ in many], rel=1e-4)
    wanted = reference_of(builtin_float32, requests)
    assert [v for v, _ in many] == pytest.approx(wanted, rel=1e-3)


def reference_of(model: OpenModel, requests: list[Request]) -> list[float]:
    pairs = Scorer(model).pairs([(r.context, r.answer) for r in requests])
    values = []
    for head, rest in pairs:
        ids = torch.tensor([head + rest])
        with torch.inference_mode():
            logs = model.model(input_ids=ids).logits[0].float().log_softmax(-1)
        places = range(len(head), len(head) + len(rest))
        values.append(sum(float(logs[at - 1, ids[0, at]]) for at in places))
    return values


@pytest.fixture(scope="module")
def builtin_float32() -> OpenModel:
    from calmix.models import open_model

    return open_model("builtin:smollm2-135m", dtype="float32")
