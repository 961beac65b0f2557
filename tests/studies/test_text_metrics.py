"""Metrics of text against plain counts, and planted correlations."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import text_metrics as metrics
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from text_metrics import least_p, orders, permutation_p, unit_ranks

from calmix.evaluation.likelihood import row_nll
from tests.evaluation.helpers import opened
from tests.test_properties import SEEDS, grams, token_rows

pytestmark = pytest.mark.long


@given(ids=token_rows(), other=token_rows(), n=st.integers(1, 4))
def test_metrics_match_plain_counts(ids, other, n):
    distinct = set(grams(ids, n))
    pooled = distinct | set(grams(other, n))
    assert metrics.coverage([ids, other], n, [ids, other]) == [
        len(set(grams(part, n))) / len(pooled) if pooled else 0.0 for part in (ids, other)
    ]
    target = set(grams(other, n))
    assert metrics.coverage([ids], n, [other]) == [
        len(distinct & target) / len(target) if target else 0.0
    ]
    share = [count / ids.size for count in Counter(ids.ravel().tolist()).values()]
    values = metrics.of_ids(ids)
    assert values[f"variety_{n}"] == len(distinct) / ids.size
    assert values["entropy"] == pytest.approx(-sum(p * math.log2(p) for p in share), abs=1e-12)
    assert (values["tokens"], values["volume"]) == (ids.size, ids.size * values["entropy"])


def test_perplexity_is_per_token_and_bits_per_byte():
    model = opened()
    ids = torch.tensor(model.tokenizer("the river runs " * 5)["input_ids"])[:64].view(2, 32)
    nll = float(row_nll(model.model, ids).sum())
    wanted = {"perplexity": math.exp(nll / 62), "bits_per_byte": nll / math.log(2) / 62}
    assert metrics.perplexity_of_rows(model, ids) == pytest.approx(wanted)  # a byte is a token


@given(left=token_rows(), right=token_rows())
def test_mismatch_is_bounded_and_symmetric(left, right):
    result = metrics.mismatch(left, [right])
    assert result == pytest.approx(metrics.mismatch(right, [left]), abs=1e-12)
    p, q = (np.bincount(part.ravel(), minlength=12) / part.size for part in (left, right))
    apart = sum(stats.entropy(one, (p + q) / 2, base=2) for one in (p, q)) / 2
    assert result == pytest.approx(apart, abs=1e-9)
    assert metrics.mismatch(left, [left, left]) == pytest.approx(0, abs=1e-12)
    assert metrics.mismatch(left, [right + 100]) == pytest.approx(1)


def spearman(x, y):
    return stats.spearmanr(x, y).statistic


NUMBERS = st.lists(st.integers(0, 5), min_size=4, max_size=5)


@given(x=NUMBERS, seed=SEEDS)
def test_rank_correlation_matches_scipy(x, seed):
    a = np.array(x, float)
    b = np.random.default_rng(seed).integers(0, 5, len(x)).astype(float)
    assume(len(set(x)) > 1 and len(set(b)) > 1)
    rho = spearman(a, b)
    assert unit_ranks(a) @ unit_ranks(b) == pytest.approx(rho)
    p = permutation_p(a, b)
    every = [abs(spearman(a, b[list(order)])) for order in itertools.permutations(range(len(a)))]
    assert p == pytest.approx(np.mean([value >= abs(rho) - 1e-9 for value in every]))
    assert float(permutation_p(a, -b)) == pytest.approx(float(p))
    assert math.isnan(permutation_p(np.ones(6), np.arange(6.0)))


def test_sampled_permutations():
    rng = np.random.default_rng(0)
    result = orders(9, 500, 3)
    assert (np.sort(result, 1) == range(9)).all()
    assert len(set(map(tuple, result.tolist()))) > 490
    x, y = rng.random(9), rng.random(9)
    p = permutation_p(x, y, permutations=499, seed=5)
    every = [abs(spearman(x[order], y)) for order in orders(9, 499, 5)]
    reached = sum(one >= abs(spearman(x, y)) - 1e-9 for one in every)
    assert float(p) == pytest.approx((reached + 1) / 500)
    alone = permutation_p(x, x, permutations=499, seed=5)
    assert float(alone) == least_p(9, 499) == 1 / 500
