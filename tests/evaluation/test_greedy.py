"""Greedy answers equal those of transformers; the panel, files of prompts, saved answers."""

import functools
import random

import pytest
import torch
from tokenizers import decoders

from calmix.errors import ModelError
from calmix.evaluation import greedy
from calmix.evaluation.greedy import Prompt, answers
from calmix.models.chat import end_tokens, in_chat
from calmix.models.opening import OpenModel, open_model
from tests.evaluation.helpers import opened, refuses
from tests.tiny import ARCHITECTURES, quick, save_tiny_model, tiny_tokenizer

QUICK = ("gemma3_text", "opt", "mamba")


@pytest.mark.parametrize("kind", quick(QUICK, (*ARCHITECTURES, "rwkv", "deepseek_v3")))
def test_batched_answers_match_single_ones(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(greedy, "ROWS", 3)  # so that most rows start in the place of a finished one
    opened = open_model(str(save_tiny_model(tmp_path / kind, kind)), dtype="float32")
    rng, asked, known = random.Random(19), [], range(5, 300)
    head = [rng.randrange(5, 300) for _ in range(10)]
    for _ in range(10):
        ids = head + rng.choices(known, k=rng.randrange(1, 20))
        asked.append(Prompt(ids, rng.choice([3, 8, 12])))
    how = {"do_sample": False, "eos_token_id": end_tokens(opened), "pad_token_id": 0}
    for one, (text, _) in zip(asked, answers(opened, asked), strict=True):
        ids = torch.tensor([one.ids])
        how |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": one.tokens}
        alone = opened.model.generate(ids, **how)
        assert text == opened.tokenizer.decode(alone[0, len(one.ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["opt", "mamba"])  # with padded batches, and without
def test_rearranged_batches(monkeypatch, kind):
    model, batches = opened(kind), []
    forward = model.model.forward

    @functools.wraps(forward)
    def noted(input_ids, **how):
        batches[-1].append(input_ids.tolist())
        return forward(input_ids, **how)

    monkeypatch.setattr(model.model, "forward", noted)
    asked, texts = [Prompt([10 + n, 40, 50], 3 + n // 4) for n in range(10)], []
    for rearranged in (False, True):
        batches.append([])
        texts.append(answers(model, asked, rearranged=rearranged))
    assert texts[0] == texts[1]  # in order; this tiny model's answers do not hang on rounding
    assert [max(map(len, one)) for one in batches] == [10, 6]
    assert batches[0][0][0][0] != batches[1][0][0][0]


def test_window_of_a_row_with_another_prefix(tmp_path):
    """All places are filled before the first leaves: in a window, positions are the longest's."""
    folder = save_tiny_model(tmp_path / "m", "mistral", sliding_window=16)
    opened, rng, asked = open_model(str(folder), dtype="float32"), random.Random(0), []
    for start, tokens in [(40, 24)] * 14 + [(40, 20)] * 3 + [(250, 20)]:
        asked.append(Prompt([start] * 10 + [rng.randrange(5, 300) for _ in range(20)], tokens))
    assert answers(opened, asked)[-1:] == answers(opened, asked[-1:])


def test_first_space_and_end_of_turn(monkeypatch):
    model, text = opened(), "    return x"
    tokenizer = model.tokenizer
    kept = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])  # as Llama 2's
    monkeypatch.setattr(tokenizer.backend_tokenizer, "decoder", kept)

    def write(_, rows):
        rows[0].written = tokenizer(text, add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(greedy._Writer, "answer", write)
    assert answers(model, [Prompt([7, 8], 9)]) == [(text, False)]
    tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    turn, own = tokenizer.convert_tokens_to_ids("<end_of_turn>"), tokenizer.eos_token_id
    for end, ids in (("<end_of_turn>", [own, turn]), ("</s>", [own]), ("\n", [own])):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
        assert end_tokens(model) == sorted(ids)


def test_chat_template_date_is_fixed():
    today = "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}"
    assert in_chat(tiny_tokenizer(today), "Hello") == "01 January 2025: Hello"


def test_no_end_token():
    model = opened()
    model.tokenizer.eos_token = model.model.generation_config.eos_token_id = None
    assert end_tokens(model) == []
    found = answers(model, [Prompt([7, 8, 9], 4), Prompt([9, 8], 6)])
    assert [ended for _, ended in found] == [False, False]


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_nan_logits_are_refused(kind):
    model = opened(kind)
    next(model.model.parameters()).data.fill_(torch.nan)
    says = "logits that are not finite in float32: check its"
    refuses(says, answers, model, [Prompt([7, 8, 9], 4)], error=ModelError)


def test_answer_length_limit(monkeypatch):
    rows, model = [], opened()
    monkeypatch.setattr(greedy._Writer, "answer", lambda _, some: rows.extend(some))
    monkeypatch.setattr(OpenModel, "context", 100)
    answers(model, [Prompt([7] * 20, 90), Prompt([8] * 300, 90), Prompt([9] * 60, 9)])
    sizes = {(row.ids[0], len(row.ids), row.tokens) for row in rows}
    assert sizes == {(7, 20, 80), (8, 50, 50), (9, 60, 9)}
