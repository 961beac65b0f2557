"""IGSP's selection against exhaustive search and the definition of J."""

import itertools

import numpy as np
import pytest

from calmix.calibration.selfgen.selection import objective, select_rows
from calmix.calibration.text_metrics import aggregation


def defined(ids, rows, groups, nll, tokens):
    """J as it is defined."""
    logs = []
    for name in dict.fromkeys(groups[row] for row in rows):
        own = [row for row in rows if groups[row] == name]
        logs.append(sum(nll[r] for r in own) / sum(tokens[r] for r in own))
    return aggregation(ids[list(rows)], 4) + float(np.var(logs))


def pool(seed, symbols=4, size=(12, 30)):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, symbols, size)
    tokens = rng.integers(8, 13, size[0])
    return ids, np.array(["a"] * 6 + ["b"] * 6), rng.uniform(1.8, 2.6, size[0]) * tokens, tokens


def test_against_exhaustive_search():
    quota = {"a": 3, "b": 2}
    equal, gaps = 0, []
    for seed in range(20):
        ids, groups, nll, tokens = pool(seed)
        found = select_rows(ids, groups, nll, tokens, quota)
        assert found == select_rows(ids, groups, nll, tokens, quota)
        assert sorted(groups[row] for row in found) == ["a"] * 3 + ["b"] * 2
        assert len(set(found)) == 5
        exact = defined(ids, found, groups, nll, tokens)
        assert objective(*(part[found] for part in (ids, groups, nll, tokens))) == (
            pytest.approx(exact)
        )
        pairs = itertools.product(
            itertools.combinations(range(6), 3), itertools.combinations(range(6, 12), 2)
        )
        best = min(defined(ids, [*a, *b], groups, nll, tokens) for a, b in pairs)
        gaps.append(exact - best)
        equal += gaps[-1] < 1e-9
    assert equal >= 8
    assert max(gaps) < 0.04
    assert np.mean(gaps) < 0.01
