"""Report and brief page in a real browser: readable in any width and theme, tables sort."""

from __future__ import annotations

from pathlib import Path

from tests.browser import Page, needs_chromium, readable

pytestmark = needs_chromium
OPEN = "document.querySelectorAll('details').forEach(e => e.open = true)"


def test_report_and_brief_are_readable(page: Page, whole: Path, tmp_path: Path) -> None:
    colours = []
    for width, dark in ((390, True), (1280, False)):
        page.open(whole / "report.html", width=width, dark=dark)
        readable(page, width, figures=7, texts=200)
        colours.append(page.run(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('.condition[open] svg text')).fill]"
        ))  # fmt: skip
        page.open(whole / "brief.html", width=width, dark=dark)
        readable(page, width, figures=3, texts=100)
    assert all(one != two for one, two in zip(*colours, strict=True))
    page.open(whole / "report.html", width=1280)
    page.run(OPEN)
    table = "document.querySelector('.condition[open] table')"
    click = f"{table}.tHead.rows[0].cells[AT].querySelector('button').click()"
    cells = f"[...{table}.tBodies[0].rows].map(r => r.cells[AT].textContent.trim())"
    page.run(click.replace("AT", "0"))
    names = page.run(cells.replace("AT", "0"))
    assert len(names) == 10
    assert names == sorted(names)
    for down in (True, False):
        page.run(click.replace("AT", "9"))
        worst = [float(text.split()[0]) for text in page.run(cells.replace("AT", "9"))]
        assert worst == sorted(worst, reverse=down)
        state = page.run(f"{table}.tHead.rows[0].cells[9].getAttribute('aria-sort')")
        assert state == ("descending" if down else "ascending")
    assert page.complaints == []


def test_a_mistake_in_the_page_would_be_noticed(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<p>x</p><script>console.error('y'); nothing()</script>", encoding="utf-8")
    page.open(broken, width=800)
    found = len(page.complaints)
    page.complaints.clear()
    assert found == 2
