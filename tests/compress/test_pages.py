"""Every page in a real browser: readable at any width and in both themes, tables sort."""

from pathlib import Path

import pytest

from tests.browser import needs_chromium, readable, served
from tests.report.conftest import whole

__all__ = ["whole"]
OPEN = "document.querySelectorAll('details').forEach(e => e.open = true)"
SITE = Path(__file__).parents[2] / "out/site"


@needs_chromium
def test_pages_in_a_browser(page, whole, compressed, tmp_path):
    place = compressed / "card.html"
    readable(page, place, figures=1, texts=60, then=lambda: page.run(OPEN))
    readable(page, whole / "report.html", figures=1, texts=100)
    page.open(whole / "report.html", width=1280)
    page.run(OPEN)
    table = "document.querySelector('.condition[open] table')"
    for at, numbers in ((0, False), (9, True)):
        for again in (False, True):
            page.run(f"{table}.tHead.rows[0].cells[{at}].querySelector('button').click()")
            rows = f"[...{table}.tBodies[0].rows]"
            cells = page.run(f"{rows}.map(r => r.cells[{at}].textContent.trim())")
            values = [float(text.split()[0]) if numbers else text for text in cells]
            assert len(values) == 10
            assert values == sorted(values, reverse=numbers != again)
    assert page.complaints == []
    broken = tmp_path / "broken.html"  # errors are noticed
    broken.write_text("<p>x</p><script>console.error('y'); nothing()</script>", encoding="utf-8")
    page.open(broken, width=800)
    assert len(page.complaints) == 2
    page.complaints.clear()


@needs_chromium
@pytest.mark.long
@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="make docs has built no site")
def test_site_is_readable_and_can_be_searched_when_opened_from_the_disk(page):
    def shown():
        assert page.run("document.images.length")
        assert page.run("[...document.images].every(e => e.complete && e.naturalWidth > 0)")

    with served(SITE) as address:
        readable(page, address, figures=0, texts=60, home=address, then=shown)
    page.open(SITE / "index.html", width=1280)
    page.run("document.querySelector('#__search').click()")
    page.run("document.querySelector('[data-md-component=search-query]').focus()")
    hits = "document.querySelectorAll('.md-search-result__item').length"
    for word in ("lea", "kage"):
        page.send("Input.insertText", text=word)
    till = f"setInterval(() => {hits} && r(clearInterval(t)), 50)"
    page.run(f"new Promise(r => {{const t = {till}}})")
    assert all(url.startswith(("file:", "data:")) for url in page.requests)
