"""How numbers are written."""

import pytest

from calmix.report import words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5004, "50.0"), (None, "–"), (-0.001, "−0.1"), (-0.0001, "0.0"), (1.234, "123.4")],
)
def test_percent(value, text):
    assert words.percent(value) == text


def test_signs_and_small_p():
    assert [words.points(value) for value in (0.012, -0.012, 0.0)] == ["+1.2", "−1.2", "0.0"]
    assert [words.percent(value, 0) for value in (-0.046, -0.001, 0.5)] == ["−5", "0", "50"]
    assert [words.rho(value) for value in (0.5, -0.5, -0.001)] == ["+0.50", "−0.50", "0.00"]
    assert [words.p_value(value) for value in (0.0004, 0.04, None)] == ["<0.001", "0.040", "–"]
    assert [words.sure(value) for value in (0.9999, 0.5, 0.0)] == ["99 %", "50 %", "1 %"]


def test_a_line_break_parts_no_number_from_its_unit_or_interval():
    for length in range(50, 90):
        lines = words.wrapped(
            f"{'x' * length} 48.6 [47.7, 49.4] % and ρ −0.9, p <0.001", "- ", "  "
        )
        assert all(len(line) <= max(80, length + 2) for line in lines.splitlines())
        assert [line[:2] for line in lines.splitlines()][1:] == ["  "] * lines.count("\n")
        whole = [part for part in ("48.6 [47.7, 49.4] %", "ρ −0.9", "p <0.001") if part in lines]
        assert len(whole) == 3, lines


def test_names():
    assert words.metric_name("aggregation_4") == "4-gram aggregation"
    assert words.metric_name("own_metric") == "own metric"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.short("x" * 40) == "x" * 25 + "…"
    assert words.counted(1, "seed") == "1 seed"
    assert words.counted(2, "seed") == "2 seeds"
