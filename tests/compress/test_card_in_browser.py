"""The card, and several side by side, in a real browser: readable, and the filter filters."""

from __future__ import annotations

from pathlib import Path

import pytest

from calmix.cli import app
from tests.browser import WIDTHS, Page, needs_chromium, readable

pytestmark = needs_chromium
SHOWN = "[...document.querySelectorAll('{}')].filter(e => e.checkVisibility()).length"


@pytest.fixture(scope="session")
def several(compressed: Path) -> Path:
    """The same model twice, on a page."""
    path = compressed.parent / "several.html"
    app(["report", str(compressed), str(compressed), "-o", str(path)], standalone_mode=False)
    return path


@pytest.mark.parametrize(("width", "dark"), [(WIDTHS[0], True), (WIDTHS[-1], False)])
def test_the_card_and_several_are_readable(
    page: Page, compressed: Path, several: Path, width: int, dark: bool
) -> None:
    for path, figures, texts in (compressed / "card.html", 3, 150), (several, 1, 60):
        page.open(path, width=width, dark=dark)
        page.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        readable(page, width, figures=figures, texts=texts)


def test_a_filter_leaves_what_differs(page: Page, compressed: Path, several: Path) -> None:
    for path, where, each in (
        (compressed / "card.html", "answers", "#answers article"),
        (several, "items", "#items tbody tr"),
    ):
        page.open(path, width=1280)
        page.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        total = page.run(SHOWN.format(each))
        alike = page.run(SHOWN.format(f"{each}[data-same]"))
        box = f"document.querySelector('[data-differ={where}]')"
        assert page.run(f"{box}.checkVisibility()")
        assert total > 5
        page.run(f"{box}.click()")
        assert page.run(SHOWN.format(each)) == total - alike
        page.run(f"{box}.click()")
        assert page.run(SHOWN.format(each)) == total
        assert page.complaints == []
    assert alike == total  # of one model beside itself nothing differs
