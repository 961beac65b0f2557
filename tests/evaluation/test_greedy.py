"""Greedy answers: those of transformers one at a time, many at once that share and follow on."""

import random

import pytest
import torch

from calmix.evaluation import greedy
from calmix.evaluation.greedy import Prompt, answers, loops
from calmix.models import open_model
from calmix.models.opening import end_tokens
from tests.tiny import ARCHITECTURES, quick, save_tiny_model

QUICK = ("gemma3_text", "opt", "bloom", "mamba")


def prompts(count, shared, longest=24):
    rng = random.Random(count)
    head = [rng.randrange(5, 300) for _ in range(shared)]
    return [
        Prompt(head + [rng.randrange(5, 300) for _ in range(rng.randrange(1, longest))],
               rng.choice([4, 12, 20]))
        for _ in range(count)
    ]  # fmt: skip


def one_by_one(opened, asked):
    found = []
    for one in asked:
        ids = torch.tensor([one.ids])
        made = opened.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=one.tokens,
            eos_token_id=end_tokens(opened), pad_token_id=0,
        )  # fmt: skip
        found.append(opened.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("kind", quick(QUICK, (*ARCHITECTURES, "deepseek_v3")))
def test_answers_are_those_given_one_at_a_time(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(greedy, "ROWS", 4)  # so that most begin where another is over
    opened = open_model(str(save_tiny_model(tmp_path / kind, kind)), dtype="float32")
    asked = prompts(19, 10)
    assert [one.text for one in answers(opened, asked)] == one_by_one(opened, asked)


def test_an_answer_that_goes_round_in_a_loop_is_cut():
    assert loops([1, 2] + [7, 8, 9] * 22)
    assert not loops([7, 8, 9] * 20)  # too short to be sure
    assert not loops(list(range(64)))
    assert not loops([*range(20)] * 5)  # a list whose lines are alike is longer
