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
from tests.evaluation.helpers import opened
from tests.tiny import ARCHITECTURES, quick, save_tiny_model, tiny_tokenizer

QUICK = ("gemma3_text", "opt", "mamba")


@pytest.mark.parametrize("kind", quick(QUICK, (*ARCHITECTURES, "rwkv", "deepseek_v3")))
def test_batched_answers_match_single_ones(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(greedy, "ROWS", 3)  # so that most rows start in the place of a finished one
    opened = open_model(str(save_tiny_model(tmp_path / kind, kind)), dtype="float32")
    rng = random.Random(19)
    head = [rng.randrange(5, 300) for _ in range(10)]
    asked = [
        Prompt(head + rng.choices(range(5, 300), k=rng.randrange(1, 20)), rng.choice([3, 8, 12]))
        for _ in range(10)
    ]
    for one, (text, _) in zip(asked, answers(opened, asked), strict=True):
        ids = torch.tensor([one.ids])
        alone = opened.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=one.tokens,
            eos_token_id=end_tokens(opened),
            pad_token_id=0,
        )
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
    asked = [Prompt([10 + n, 40, 50], 3 + n // 4) for n in range(10)]
    texts = []
    for rearranged in (False, True):
        batches.append([])
        texts.append(answers(model, asked, rearranged=rearranged))
    assert texts[0] == texts[1]  # in order; this tiny model's answers do not hang on rounding
    once, again = ([len(ids) for ids in one] for one in batches)
    assert (max(once), max(again)) == (10, 6)
    first, last = (one[0][0][0] for one in batches)
    assert first != last


def test_window_of_a_row_with_another_prefix(tmp_path):
    """All places are filled before the first row leaves: positions in a window are those of the
    longest row."""
    folder = save_tiny_model(tmp_path / "m", "mistral", sliding_window=16)
    opened, rng = open_model(str(folder), dtype="float32"), random.Random(0)
    head, other = ([n] * 10 for n in (40, 250))
    asked = [
        Prompt(start + [rng.randrange(5, 300) for _ in range(20)], tokens)
        for start, tokens in [(head, 24)] * 14 + [(head, 20)] * 3 + [(other, 20)]
    ]
    (alone,) = answers(opened, asked[-1:])
    assert answers(opened, asked)[-1] == alone


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
    with pytest.raises(ModelError, match="logits that are not finite in float32: check its"):
        answers(model, [Prompt([7, 8, 9], 4)])


def test_answer_length_limit(monkeypatch):
    rows, model = [], opened()
    monkeypatch.setattr(greedy._Writer, "answer", lambda _, some: rows.extend(some))
    monkeypatch.setattr(OpenModel, "context", 100)
    answers(model, [Prompt([7] * 20, 90), Prompt([8] * 300, 90), Prompt([9] * 60, 9)])
    sizes = {(row.ids[0], len(row.ids), row.tokens) for row in rows}
    assert sizes == {(7, 20, 80), (8, 50, 50), (9, 60, 9)}
