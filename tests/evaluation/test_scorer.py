"""The scorer gives the plain model's values on every architecture and batch size, scores each
token once, computes no shared token twice, and keeps rows within their size."""

import math
import random

import pytest
from tokenizers.processors import TemplateProcessing

from calmix.errors import ModelError
from calmix.evaluation import scorer as module
from calmix.evaluation.scorer import Scorer, attention_window, packed_runs
from calmix.models.loading import to_continue
from tests.evaluation.helpers import opened, quiz, reference, refuses
from tests.tiny import ARCHITECTURES, quick

WINDOWED = "gemma2", "gemma3_text", "gemma4_text", "mistral", "phi3", "starcoder2"


@pytest.fixture(autouse=True)
def small_rows(monkeypatch):
    monkeypatch.setattr(module, "ROW_TOKENS", 48)


@pytest.mark.parametrize("kind", quick(["gemma2", "bloom", "opt"], ARCHITECTURES))
def test_scores_match_the_plain_model_on_architectures(kind):
    calls, model, requests = [], opened(kind), quiz()
    scorer = Scorer(model, progress=lambda *of: calls.append(of))
    scorer.batch_tokens = 200
    found = scorer.loglikelihood(requests)
    assert found == pytest.approx(reference(model, requests), rel=2e-4)
    assert scorer.loglikelihood(requests[::-1]) == found[::-1]
    assert calls[-1] == (2 * len(requests), 2 * len(requests))
    assert calls == sorted(calls)
    # Bloom derives positions from a two-dimensional mask.
    assert (kind, scorer.window > 0) in (("bloom", False), (kind, kind != "bloom"))
    assert (attention_window(model.model) == 16) == (kind in WINDOWED)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_batches_shrink_when_memory_is_short(kind, monkeypatch):
    model, requests, sizes = opened(kind), quiz(), []
    run = Scorer._run

    def small_only(self, rows, **more):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("CUDA out of memory")
        return run(self, rows, **more)

    monkeypatch.setattr(Scorer, "_run", small_only)
    values = Scorer(model).loglikelihood(requests)
    assert max(sizes) > 2
    assert values == pytest.approx(reference(model, requests), rel=2e-4)


def test_long_contexts_and_answers():
    model = opened()
    text = "abcdefghij" * 40  # 400 tokens, the context is 256
    scorer = Scorer(model)
    found, _ = scorer.loglikelihood([("long", text, "xyz"), ("short", "a", "b")])
    assert [found] == pytest.approx(reference(model, [(text[-254:], "xyz")]), rel=1e-4)
    assert scorer.truncated == {"long": 1}
    says = "task x has an answer of 300 tokens; tiny-llama takes 1 to 256"
    refuses(says, scorer.loglikelihood, [("x", "a", "b" * 300)], error=ModelError)
    says = "task x has an answer of 0 tokens"
    refuses(says, scorer.loglikelihood, [("x", "a", "")], error=ModelError)


@pytest.mark.parametrize("form", ["$A </s>", "<s> $A </s>", "</s> $A", "<s> $A"])
def test_appended_end_token_is_not_scored(form):
    """Else an answer would be its last token, after a context that has ended."""
    model, requests = opened(), [("x", "one two", " three"), ("x", "", "four")]
    ends, backend = [("<s>", 1), ("</s>", 2)], model.tokenizer.backend_tokenizer
    before = {"<s>": [1], "</s>": [2]}.get(form.split()[0], [])
    backend.post_processor = TemplateProcessing(form, None, ends)
    own = model.tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert to_continue(model.tokenizer, ["ab", ""]) == [[*before, *own], before]
    found = Scorer(model).loglikelihood(requests[: 1 + bool(before)])
    backend.post_processor = TemplateProcessing(form.replace("$A </s>", "$A"), None, ends)
    assert found == pytest.approx(Scorer(model).loglikelihood(requests[: len(found)]))


def test_non_finite_scores_are_refused():
    """The likeliest of choices that are all nan would be the first."""
    model = opened()
    model.model.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    asked, says = [("x", "a", "b"), ("x", "a", "c")], "tiny-llama gives .* not finite in float32"
    refuses(says, Scorer(model).loglikelihood, asked, error=ModelError)


def test_shared_tokens_run_once():
    rng = random.Random(0)
    preambles = [[token + rng.randrange(100) for _ in range(200)] for token in (0, 100)]
    sequences = []
    for number in range(60):
        question = preambles[number % 2] + [rng.randrange(100) for _ in range(20)]
        sequences += [([*question, 200 + choice, 7], len(question), 0) for choice in range(4)]
    runs = packed_runs(sequences, row_tokens=128)
    assert sorted(prefix for prefix, _ in runs) == sorted(preambles)  # one for each task
    for _, rows in runs:
        assert max(map(len, rows)) <= 128
        # The last token is only predicted: one node per choice besides the question.
        assert sum(map(len, rows)) == 30 * (20 + 4)
