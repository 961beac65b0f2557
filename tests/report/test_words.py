"""How numbers are written."""

import pytest

from calmix.report import words


@pytest.mark.parametrize(("written", "text"), [
    (words.percent(0.5004), "50.0"), (words.percent(None), "–"), (words.percent(-0.001), "−0.1"),
    (words.percent(-0.0001), "0.0"), (words.percent(-0.046, 0), "−5"),
    (words.percent(0.012, sign=True), "+1.2"), (words.percent(0.0, sign=True), "0.0"),
    (words.rho(-0.5), "−0.50"), (words.rho(-0.001), "0.00"), (words.p_value(0.0004), "<0.001"),
    (words.p_value(0.04), "0.040"), (words.p_value(None), "–"), (words.sure(0.9999), "99 %"),
    (words.sure(0.0), "1 %"), (words.listed("abc"), "a, b and c"),
    (words.short("x" * 40), "x" * 25 + "…"), (words.counted(1, "seed"), "1 seed"),
    (words.counted(2, "seed"), "2 seeds"),
])  # fmt: skip
def test_a_number_or_name_is_written(written, text):
    assert written == text
