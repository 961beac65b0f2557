"""The scorer: the plain model's numbers on every architecture, whatever the batch size."""

import pytest

from calmix.errors import ModelError
from calmix.evaluation import scorer as module
from calmix.evaluation.scorer import Scorer, attention_window
from tests.evaluation.helpers import opened, quiz, reference
from tests.tiny import ARCHITECTURES, quick


@pytest.fixture(autouse=True)
def small_rows(monkeypatch):
    monkeypatch.setattr(module, "ROW_TOKENS", 48)


@pytest.mark.parametrize("kind", quick(["llama", "gemma2", "bloom", "opt"], ARCHITECTURES))
def test_scores_are_the_plain_models_on_every_architecture(kind):
    calls, model, requests = [], opened(kind), quiz()
    scorer = Scorer(model, batch_tokens=200, progress=lambda *of: calls.append(of))
    found = scorer.loglikelihood(requests)
    assert found == pytest.approx(reference(model, requests), rel=2e-4)
    assert scorer.loglikelihood(requests[::-1]) == found[::-1]
    assert calls[-1] == (2 * len(requests), 2 * len(requests))
    assert calls == sorted(calls)
    # Bloom's positions come from a mask of two dimensions.
    assert (kind, scorer.packed) in (("bloom", False), (kind, kind != "bloom"))
    assert (attention_window(model.model) == 16) == (kind in ("gemma2", "mistral"))


def test_long_contexts_are_cut_on_the_left_and_counted():
    model = opened()
    text = "abcdefghij" * 40  # 400 tokens, the context is 256
    scorer = Scorer(model)
    found, _ = scorer.loglikelihood([("long", text, "xyz"), ("short", "a", "b")])
    assert [found] == pytest.approx(reference(model, [(text[-254:], "xyz")]), rel=1e-4)
    assert scorer.truncated == {"long": 1}


def test_what_cannot_be_scored_is_one_line():
    model = opened()
    for answer, says in (
        ("b" * 300, r"task x has an answer of 300 tokens; tiny-llama takes 1 to 256"),
        ("", "task x has an answer of 0 tokens"),
    ):
        with pytest.raises(ModelError, match=says):
            Scorer(model).loglikelihood([("x", "a", answer)])
