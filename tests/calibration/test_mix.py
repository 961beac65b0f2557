"""Mixes: parsing, and rows by largest remainder."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calmix.calibration import parse_mix, rows_per_source
from calmix.calibration.mix import Mix, make_mix
from calmix.errors import InputError

weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12)


@given(weights, st.integers(1, 2000))
def test_counts_add_up_and_keep_the_quota(values, rows):
    mix = make_mix({str(i): value for i, value in enumerate(values)}, "spec")
    counts = rows_per_source(mix, rows)
    assert sum(counts.values()) == rows
    for name, weight in mix.weights.items():
        assert math.floor(weight * rows - 1e-6) <= counts[name] <= math.ceil(weight * rows + 1e-6)


@given(weights, st.integers(1, 500))
def test_the_rows_left_over_go_to_the_largest_remainders(values, rows):
    mix = make_mix({str(i): value for i, value in enumerate(values)}, "spec")
    counts = rows_per_source(mix, rows)
    floors = {name: math.floor(weight * rows + 1e-9) for name, weight in mix.weights.items()}
    remainder = {name: mix.weights[name] * rows - floors[name] for name in floors}
    got = [remainder[name] for name in counts if counts[name] > floors[name]]
    not_got = [remainder[name] for name in counts if counts[name] == floors[name]]
    assert not got or not not_got or min(got) >= max(not_got) - 1e-8


@given(st.integers(1, 12), st.integers(1, 100))
def test_equal_weights_differ_by_one_row_at_most(names, rows):
    counts = rows_per_source(parse_mix("uniform:" + ",".join(map(str, range(names)))), rows)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_decimal_weights_are_exact():
    assert rows_per_source(parse_mix("a:0.1,b:0.2,c:0.7"), 10) == {"a": 1, "b": 2, "c": 7}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", {"a": 1.0}),
        ("a:1,b:3", {"a": 0.25, "b": 0.75}),
        ("uniform:a,b", {"a": 0.5, "b": 0.5}),
        ("a:1,b:0", {"a": 1.0}),
        ("owner/name@part:1,./x.txt:1", {"owner/name@part": 0.5, "./x.txt": 0.5}),
    ],
)
def test_parsing(text, expected):
    assert parse_mix(text).weights == expected
    assert isinstance(parse_mix(text), Mix)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1,a:2", "names 'a' twice"),
        ("uniform:a,b,a", "names 'a' twice"),
        ("a:1,b", "'b' has no weight"),
        ("a:-1,b:2", "weight of 'a' is -1.0"),
        ("a:nan,b:2", "weight of 'a' is nan"),
        ("a:inf,b:2", "weight of 'a' is inf"),
        ("a:0,b:0", "all weights are zero"),
        ("", "names no source"),
        ("a:1,,b:1", "names no source"),
        ("uniform:", "names no source"),
    ],
)
def test_bad_specifications(text, message):
    with pytest.raises(InputError, match=message):
        parse_mix(text)
