"""What must hold for any input: mixes, packing, metrics, solvers, statistics."""

import itertools
import math
from dataclasses import make_dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from calmix.calibration.build import pack_concat, pack_window, rows_per_source
from calmix.calibration.selfgen.ngrams import aggregation, ngram_keys, row_aggregation
from calmix.evaluation.measures import Parts
from calmix.evaluation.retention import interval, item_weights, nan_mean, resampled
from calmix.pruning.gram import Gram, relative_error
from calmix.pruning.methods import METHODS, get_method
from calmix.pruning.patterns import SemiStructured, Unstructured
from calmix.sources.documents import Document
from calmix.sources.mixes import parse_mix
from calmix.study.bootstrap import corrected, holm, two_sided_p

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)
SEEDS = st.integers(0, 10_000)


@st.composite
def mixes(draw):
    names = draw(NAMES)
    weights = [draw(st.sampled_from([0.1, 0.2, 0.3, 0.5, 1, 1 / 3, 7])) for _ in names]
    parts = [f"{name}:{weight}" for name, weight in zip(names, weights, strict=True)]
    return parse_mix(",".join(parts))


@given(mix=mixes(), rows=st.integers(0, 500))
def test_largest_remainders(mix, rows):
    counts = rows_per_source(mix, rows)
    assert list(counts) == list(mix)
    assert sum(counts.values()) == rows
    over = {name: counts[name] - mix[name] * rows for name in counts}
    assert all(-1 < value < 1 for value in over.values())
    # Nobody got a row that was due to a larger remainder.
    up = [value for value in over.values() if value > 1e-9]
    down = [value for value in over.values() if value < -1e-9]
    assert not up or not down or max(up) - 1 <= min(down) + 1e-9


@given(names=NAMES, parts=st.lists(st.integers(1, 99), min_size=6, max_size=6))
def test_mix_parsing(names, parts):
    weights = dict(zip(names, parts, strict=False))
    whole = sum(weights.values())
    read = parse_mix(" , ".join(f"{name}:{part}" for name, part in weights.items()))
    assert read == pytest.approx({n: Fraction(p, whole) for n, p in weights.items()})
    equal = parse_mix(f"uniform:{','.join(names)}")
    assert equal == pytest.approx(dict.fromkeys(names, 1 / len(names)))
    assert list(equal) == list(read) == names


@st.composite
def documents(draw):
    """Documents without repeated tokens, so that each token identifies its place."""
    sizes = draw(st.lists(st.integers(0, 30), max_size=8))
    ends = itertools.accumulate(sizes, initial=0)
    return [
        (Document(id=str(number), text="x"), list(range(first, first + size)))
        for number, (first, size) in enumerate(zip(ends, sizes, strict=False))
    ]


@given(texts=documents(), rows=st.integers(1, 6), length=st.integers(1, 12), joined=st.booleans())
def test_concat_packing(texts, rows, length, joined):
    cut, used = pack_concat(iter(texts), rows, length, -1 if joined else None)
    stream = [token for _, ids in texts for token in [*ids, *([-1] if joined else [])]]
    whole = min(rows, len(stream) // length)
    assert cut == [stream[i * length : (i + 1) * length] for i in range(whole)]
    assert used == texts[: len(used)]
    assert len(used) == len(texts) or len(cut) == rows


@given(texts=documents(), rows=st.integers(1, 6), length=st.integers(1, 12), seed=SEEDS)
def test_window_packing(texts, rows, length, seed):
    cut, used = pack_window(iter(texts), rows, length, np.random.default_rng(seed))
    enough = [pair for pair in texts if len(pair[1]) >= length]
    assert used == enough[:rows]
    for row, (_, ids) in zip(cut, used, strict=True):
        start = ids.index(row[0])
        assert row == ids[start : start + length]
        assert len(row) == length


def test_all_windows_are_drawn():
    text = [(Document(id="a", text="x"), list(range(6)))]
    drawn = [pack_window(iter(text), 1, 4, np.random.default_rng(seed)) for seed in range(60)]
    assert {rows[0][0] for rows, _ in drawn} == {0, 1, 2}


@st.composite
def token_rows(draw):
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(SEEDS))
    return rng.integers(0, draw(st.integers(1, 12)), shape)


def grams(ids, n):
    return [tuple(row[i : i + n]) for row in ids.tolist() for i in range(len(row) - n + 1)]


@given(ids=token_rows(), n=st.integers(1, 4))
def test_aggregation_matches_plain_counts(ids, n):
    total, distinct = grams(ids, n), set(grams(ids, n))
    assert aggregation(ids, n) == (1 - len(distinct) / len(total) if total else 0.0)
    alone = [aggregation(row[None], n) for row in ids]
    assert row_aggregation(ids, n) == pytest.approx(alone, abs=1e-12)


def test_ngrams_of_a_large_vocabulary():
    ids = np.random.default_rng(0).permutation(200_000)[:100_000].reshape(100, 1000)
    ids[50:] = ids[:50]  # every n-gram twice
    for n in (3, 4, 5):
        (keys,) = ngram_keys([ids], n)
        assert (len(np.unique(keys)), len(keys)) == (50 * (1001 - n), 100 * (1001 - n))


PATTERNS = (Unstructured(0.3), Unstructured(0.5), SemiStructured(2, 4), SemiStructured(1, 4))


@st.composite
def layers(draw):
    """Weights and inputs, some of which are zero on every token."""
    rows, columns = draw(st.integers(1, 9)), 4 * draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(60, columns, generator=generator) * torch.rand(columns, generator=generator)
    if draw(st.booleans()):
        x[:, draw(st.integers(0, columns - 1))] = 0
        assume(bool(x.any()))
    return weight, x


QUANTISERS = {"ecq", "ggml", "gptq", "llama"}


@pytest.mark.parametrize("name", sorted({*METHODS} - QUANTISERS))
@given(layer=layers(), pattern=st.sampled_from(PATTERNS))
def test_methods_prune_exactly(name, layer, pattern):
    weight, x = layer
    method = get_method(name)
    statistic = None
    if method.needs is not None:
        gram = method.needs(x.shape[1], x.device)
        gram.add(x)
        statistic = gram.matrix()
    before = weight.clone()
    solution = method.solve([weight], statistic, [pattern])
    assert torch.equal(weight, before)
    pruned = solution.weights[0]
    count = pattern.count(weight.numel())
    if isinstance(pattern, Unstructured):
        count = sum(many * pattern.count(size) for many, size in method.groups(*weight.shape))
    zeros = pruned == 0
    assert solution.pruned == [count]
    assert int(zeros.sum()) == count
    if isinstance(pattern, SemiStructured):
        groups = zeros.view(len(weight), -1, pattern.m).sum(2)
        assert (groups == pattern.m - pattern.n).all()
    if method.needs is not Gram:  # no Gram matrix: the kept weights are what they were
        assert torch.equal(pruned[~zeros], weight[~zeros])
        return
    lost = float(((weight - pruned).double() @ x.double().T).square().sum())
    whole = float((weight.double() @ x.double().T).square().sum())
    error = relative_error(weight, pruned, statistic) * whole
    assert error == pytest.approx(lost, rel=1e-2, abs=1e-3)


def test_false_discoveries_are_corrected_over_all_lists():
    row = make_dataclass("Row", ["p", ("p_corrected", float, None)])
    rows = corrected([row(None), row(0.03), row(0.01)], [row(0.04), row(None)])
    assert [[one.p_corrected for one in some] for some in rows] == [
        [None, pytest.approx(0.04), pytest.approx(0.03)],
        [pytest.approx(0.04), None],
    ]
    assert corrected([row(None)], []) == [[row(None)], []]


def test_holm_counts_pending_tests():
    # 3 * 0.02 is less than 4 * 0.016, and corrected values keep the order.
    actual = holm([0.02, 0.4, None, 0.016])
    assert actual == [pytest.approx(0.064), pytest.approx(0.8), None, pytest.approx(0.064)]
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(value=st.floats(-5, 5), error=st.floats(0.01, 3), freedom=st.sampled_from([1, 4, math.inf]))
def test_two_sided_p(value, error, freedom):
    t = stats.norm if math.isinf(freedom) else stats.t(freedom)
    expected = 2 * t.cdf(-abs(value / error))
    assert two_sided_p(value, error, freedom) == pytest.approx(expected, rel=1e-9)
    assert two_sided_p(value, 0, freedom) == float(value == 0)


@given(count=st.integers(1, 12), seed=SEEDS, name=st.text(max_size=5))
def test_resample_weights(count, seed, name):
    times = item_weights(name, count, resamples=20, seed=seed)
    rng = np.random.default_rng(seed)
    result = Parts("accuracy", rng.random(count), rng.integers(-1, 2, count).astype(float))
    actual = resampled(name, result, resamples=20, seed=seed)
    kept, whole = times @ result.kept, times @ result.whole
    expected = np.where(whole > 0, kept / np.where(whole > 0, whole, 1), math.nan)
    assert actual[1:] == pytest.approx(expected, nan_ok=True)


def test_nan_means():
    values = np.array([[1.0, math.nan, math.nan], [3.0, 5.0, math.nan]])
    assert nan_mean(values, 0) == pytest.approx([2.0, 5.0, math.nan], nan_ok=True)
    weights = np.array([[1.0], [3.0]])
    assert nan_mean(values, 0, weights) == pytest.approx([2.5, 5.0, math.nan], nan_ok=True)


@given(draws=st.lists(st.floats(-3, 3), max_size=40), lost=st.integers(0, 3))
def test_estimate_interval(draws, lost):
    actual = interval(np.array([0.7, *draws, *[math.nan] * lost]))
    assert actual.value == 0.7
    if draws:
        assert [actual.low, actual.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    else:
        assert (actual.low, actual.high) == (None, None)
    assert interval(np.array([math.nan, *draws])).value is None
