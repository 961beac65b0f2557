"""The home page of the documentation as `make docs` has built it, in a real browser."""

from pathlib import Path

import pytest

from tests.browser import needs_chromium, readable, served

SITE = Path(__file__).parents[2] / "out/site"


@needs_chromium
@pytest.mark.long
@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="make docs has built no site")
def test_the_home_page_is_readable(page):
    backs = set()
    with served(SITE) as address:
        for width, dark in ((1280, True), (1280, False), (390, False), (390, True)):
            page.open(address, width=width, dark=dark)
            readable(page, width, figures=0, texts=60, home=address)
            backs.add(page.run("getComputedStyle(document.body).backgroundColor"))
            shown = page.run("[...document.images].map(e => e.complete && e.naturalWidth > 0)")
            assert shown
            assert all(shown)
    assert len(backs) == 2
