"""Metrics of text against plain counts, and planted correlations."""

import itertools
import math
import sys
from collections import Counter

import numpy as np
import pytest
import text_metrics as metrics
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from text_metrics import correlate, least_p, orders, permutation_p, unit_ranks

from calmix.analysis.cells import tables
from calmix.calibration import resolve
from calmix.models import open_model
from calmix.study.store import open_store
from tests.calibration.conftest import write_rows
from tests.synthetic import SOURCES, Plan, full_plan, informed, save
from tests.test_properties import SEEDS, grams, token_rows

pytestmark = pytest.mark.long


def of(plan, **how):
    results, known = informed(plan)
    return correlate(tables(results, "primary"), results.trials, known, **how)


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


def test_rho_uses_seed_means_of_single_sources():
    results, known = informed(full_plan(conditions=[("wanda", "50%")]))
    (cells,) = tables(results, "primary")
    singles = cells.of("single")
    assert (len(singles), len(cells.sets)) == (16, 22)
    own = [[t for t in results.trials if t.calibration == cells.sets[at]] for at in singles]
    x = [np.mean([known[t.id]["perplexity"] for t in each]) for each in own]
    y = [np.mean([t.dimensions["code"].value for t in each]) for each in own]
    rows = correlate([cells], results.trials, known, permutations=99)
    (one,) = [c for c in rows if (c.metric, c.quantity) == ("perplexity", "code")]
    assert (one.n, one.rho, one.least_p) == (16, pytest.approx(spearman(x, y)), 0.01)
    p = permutation_p(np.array(x), np.array(y), permutations=99)
    assert one.p == pytest.approx(float(p))
    assert [c.p_corrected for c in rows] == pytest.approx(
        stats.false_discovery_control([c.p for c in rows])
    )


def test_correlation_needs_four_sources():
    for count in (3, 4):
        rows = of(full_plan(sources=SOURCES[:count], conditions=[("wanda", "50%")]))
        own = [one for one in rows if one.metric != "kl"]
        assert bool(own) == (count == 4)
    assert (own[0].n, own[0].least_p) == (4, 2 / 24)


def test_equivalent_metrics_are_one_test():
    results, known = informed(Plan(seeds=(0,)))
    twins = {
        name: {"bits_per_byte": math.log(one["perplexity"]), "volume": -one["perplexity"], **one}
        for name, one in known.items()
    }
    cells = tables(results, "primary")
    before, after = (
        correlate(cells, results.trials, each, permutations=99) for each in (known, twins)
    )
    assert len(after) == len(before)
    aliases = {one.metric: one.aliases for one in after}
    assert aliases["perplexity"] == ("bits_per_byte", "-volume")


def test_kl_agrees_with_retention():
    rows = [one for one in of(Plan(seeds=(0, 1))) if one.metric == "kl"]
    assert [one.quantity for one in rows] == ["total", "general", "commonsense", "code", "math"]
    assert (rows[0].n, rows[0].rho) == (16, pytest.approx(-1))
    assert rows[0].p <= 0.05


def test_script_reads_sets_and_recorded_metrics(tmp_path, tiny_folder, monkeypatch, capsys):
    results, _ = informed(Plan(sources=("a", "b", "c", "d"), seeds=(0,)))
    store = save(results, tmp_path / "store")
    index = store / "store.json"
    opened, text = open_model(tiny_folder), index.read_text()
    rng, ids = np.random.default_rng(0), {}
    for at, trial in enumerate(results.trials):
        letters = list("abcdefghijklmnop"[: 2 + 4 * at])
        file = tmp_path / f"{trial.calibration}.jsonl"
        write_rows(file, ("".join(rng.choice(letters, 90)) for _ in range(40)))
        drawn = resolve(str(file), opened, rows=4, length=32, leakage="off")
        drawn.save(store / "calibration" / trial.calibration)
        ids[trial.id] = drawn.ids.numpy()
        text = text.replace('"set": null', f'"set": "{trial.calibration}"', 1)
    index.write_text(text)
    known = metrics.information_of(open_store(store))
    first = known[results.trials[0].id]
    own = ids[results.trials[0].id]
    assert first["entropy"] == metrics.of_ids(own)["entropy"]
    assert first["mismatch"] == metrics.mismatch(own, [*ids.values()][1:])
    record = store / "trials" / results.trials[0].id / "result.json"
    record.write_text(
        record.read_text().replace('"worst"', '"information": {"old": 7}, "worst"', 1)
    )
    assert metrics.information_of(open_store(store))[results.trials[0].id]["old"] == 7
    monkeypatch.setattr(sys, "argv", ["text_metrics.py", str(store)])
    metrics.main()
    assert "SparseGPT 60%: entropy" in capsys.readouterr().out
