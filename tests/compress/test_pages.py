"""Every page in a real browser: readable at any width and in both themes, tables sort."""

from tests.browser import needs_chromium, readable
from tests.report.conftest import whole

__all__ = ["whole"]
OPEN = "document.querySelectorAll('details').forEach(e => e.open = true)"


@needs_chromium
def test_pages_are_readable_and_sort(page, whole, calmix, compressed, tmp_path):
    several = tmp_path / "several.html"
    assert calmix("report", compressed, compressed, "-o", several).code == 0
    for path, every, figures, texts in (
        (compressed / "card.html", True, 1, 60), (several, True, 1, 40),
        (whole / "report.html", False, 6, 200),
    ):  # fmt: skip
        backs = set()
        for width, dark in ((1280, True), (1280, False), (390, False), (390, True)):
            page.open(path, width=width, dark=dark)
            if every:
                page.run(OPEN)
            readable(page, width, figures=figures, texts=texts)
            backs.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(backs) == 2
    page.open(whole / "report.html", width=1280)
    page.run(OPEN)
    table = "document.querySelector('.condition[open] table')"
    for at, numbers in ((0, False), (9, True)):
        for again in (False, True):
            page.run(f"{table}.tHead.rows[0].cells[{at}].querySelector('button').click()")
            cells = page.run(
                f"[...{table}.tBodies[0].rows].map(r => r.cells[{at}].textContent.trim())"
            )
            values = [float(text.split()[0]) if numbers else text for text in cells]
            assert len(values) == 10
            assert values == sorted(values, reverse=numbers != again)
    assert page.complaints == []
    broken = tmp_path / "broken.html"  # a mistake would be noticed
    broken.write_text("<p>x</p><script>console.error('y'); nothing()</script>", encoding="utf-8")
    page.open(broken, width=800)
    assert len(page.complaints) == 2
    page.complaints.clear()
