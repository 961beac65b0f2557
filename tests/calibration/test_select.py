"""Selectors against plain definitions."""

from hypothesis import given
from hypothesis import strategies as st

from calmix.calibration.select import select_random, select_zipcal

rows = st.lists(st.lists(st.integers(0, 15), min_size=4, max_size=4), min_size=1, max_size=14)


def greedy(candidates, groups, quota):
    """Plain greedy: always the first of those that add most."""
    left, covered, chosen = dict(quota), set(), []
    while True:
        open_ones = [i for i in range(len(candidates)) if i not in chosen and left.get(groups[i])]
        if not open_ones:
            return chosen
        best = max(open_ones, key=lambda i: (len(set(candidates[i]) - covered), -i))
        chosen.append(best)
        covered |= set(candidates[best])
        left[groups[best]] -= 1


@given(rows, st.data())
def test_lazy_greedy_equals_plain_greedy(candidates, data):
    groups = data.draw(st.lists(st.sampled_from("ab"), min_size=len(candidates),
                                max_size=len(candidates)))  # fmt: skip
    quota = {g: data.draw(st.integers(0, groups.count(g))) for g in "ab"}
    chosen = select_zipcal(candidates, groups, quota, 0)
    assert chosen == greedy(candidates, groups, quota)
    assert {g: [groups[i] for i in chosen].count(g) for g in "ab"} == quota


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 99))
def test_random_fills_quotas_repeatably(first, second, seed):
    groups = ["a"] * 6 + ["b"] * 6
    quota = {"a": first, "b": second}
    chosen = select_random([[0]] * 12, groups, quota, seed)
    assert chosen == select_random([[0]] * 12, groups, quota, seed)
    assert len(set(chosen)) == first + second
    assert [groups[i] for i in chosen] == ["a"] * first + ["b"] * second
