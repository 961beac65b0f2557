"""Sampling against plain definitions, transformers' own warpers, and known distributions."""

import math

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from calmix.calibration.selfgen.sampling import Sampling, draw, penalised
from calmix.errors import InputError

LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0, 1.5]])


def frequencies(count=20_000, temperature=1.0, **cut):
    """How often each token of LOGITS is drawn, over an even grid of uniform numbers."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(LOGITS.expand(count, -1), torch.full((count,), temperature), uniform, **cut)
    return torch.bincount(tokens, minlength=LOGITS.shape[1]) / count


def expected(temperature=1.0, top_k=None, top_p=None):
    """What transformers' warpers leave, in their order: temperature, top-k, top-p."""
    scores = LOGITS / temperature
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.7},
        {"top_p": 0.35},
        {"temperature": 0.6, "top_k": 4, "top_p": 0.8},
    ],
)
def test_draws_follow_the_distribution_transformers_would_sample_from(settings):
    torch.testing.assert_close(frequencies(**settings), expected(**settings), atol=3e-4, rtol=0)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, torch.ones(4), uniform).tolist() == [1, 1, 3, 3]


def test_rows_have_temperatures_of_their_own():
    uniform = torch.full((2,), 0.999, dtype=torch.float64)
    tokens = draw(LOGITS.expand(2, -1), torch.tensor([0.01, 100.0]), uniform)
    assert tokens.tolist() == [0, 5]


def test_penalty_equals_transformers():
    ids = torch.tensor([[0, 3, 3, 5]])
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, LOGITS.clone())
    torch.testing.assert_close(penalised(LOGITS, ids, 1.3), theirs)
    assert penalised(LOGITS, ids, 1.0) is LOGITS


def test_schedule_is_linear_and_then_stays():
    sampling = Sampling(temperature=1.0, start_temperature=3.0, ramp=4)
    position = torch.tensor([0, 1, 2, 4, 9])
    assert sampling.temperatures(position, torch.ones(5)).tolist() == [3.0, 2.5, 2.0, 1.0, 1.0]
    assert Sampling().temperatures(position, torch.ones(5)).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0.0 is not a positive number"),
        ({"temperature": math.nan}, "--temperature nan is not a positive number"),
        ({"top_k": 0}, "--top-k 0 leaves no token"),
        ({"top_p": 0.0}, r"--top-p 0.0 is not in \(0, 1\]"),
        ({"repetition_penalty": -1.0}, "--repetition-penalty -1.0 is not a positive number"),
        ({"start_temperature": 2.0}, "only have an effect together"),
        ({"ramp": 3}, "only have an effect together"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)
