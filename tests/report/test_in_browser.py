"""The report in a real browser: it renders, without errors, in light and dark, at any width."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import WIDTHS, Page, needs_chromium, readable

pytestmark = needs_chromium


@pytest.fixture
def report(whole: Path) -> Path:
    return whole / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_renders_without_errors_and_is_readable(
    page: Page, report: Path, width: int, dark: bool
) -> None:
    page.open(report, width=width, dark=dark)
    readable(page, width, figures=8, texts=200)


def test_light_and_dark_differ_in_the_drawings_too(page: Page, report: Path) -> None:
    seen = []
    for dark in (False, True):
        page.open(report, width=1280, dark=dark)
        seen.append(page.run(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('figure svg text')).fill]"
        ))  # fmt: skip
    assert all(one != two for one, two in zip(*seen, strict=True))


def test_tabs_show_one_condition_at_a_time(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    shown = "[...document.querySelectorAll('.condition:not([hidden])')].map(e => e.id)"
    assert page.run(shown) == ["sparsegpt-60pct"]
    page.run("document.getElementById('tab-wanda-50pct').click()")
    assert page.run(shown) == ["wanda-50pct"]
    page.run(
        "document.getElementById('tab-wanda-50pct').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    )
    assert page.run(shown) == ["sparsegpt-50pct"]
    assert page.run("document.activeElement.id") == "tab-sparsegpt-50pct"
    assert page.complaints == []


def test_tables_sort_on_a_click(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    page.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    table = "document.querySelector('#sparsegpt-60pct table')"
    column = (
        f"[...{table}.tBodies[0].rows].map(r => r.cells[AT].dataset.v)"
        ".map(v => isNaN(v) ? v : Number(v))"
    )
    totals = page.run(column.replace("AT", "3"))
    assert totals == sorted(totals, reverse=True)
    click = f"{table}.tHead.rows[0].cells[AT].querySelector('button').click()"
    page.run(click.replace("AT", "0"))
    names = page.run(column.replace("AT", "0"))
    assert len(names) == 22
    assert names == sorted(names)
    for down in (True, False):
        page.run(click.replace("AT", "9"))
        worst = page.run(column.replace("AT", "9"))
        assert worst == sorted(worst, reverse=down)
        state = page.run(f"{table}.tHead.rows[0].cells[9].getAttribute('aria-sort')")
        assert state == ("descending" if down else "ascending")
    assert page.complaints == []


def test_what_goes_on_to_the_right_fades_until_scrolled_to(page: Page, report: Path) -> None:
    box = "document.querySelector('.condition:not([hidden]) figure .scroll')"
    drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    seen = []
    for width, left in ((390, 0), (390, 9999), (1600, 0)):
        page.open(report, width=width)
        page.run(f"{box}.scrollLeft = {left}")
        page.run(f"{drawn}.then(() => 0)")
        seen.append(page.run(f"getComputedStyle({box}).maskImage"))
    assert "linear-gradient" in seen[0]
    assert seen[1:] == ["none", "none"]


def test_without_script_everything_is_shown(page: Page, report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    plain = tmp_path / "plain.html"
    plain.write_text(text[: text.index("<script>")] + "</body></html>", encoding="utf-8")
    page.open(plain, width=1280)
    assert page.run("[...document.querySelectorAll('.condition')].every(e => e.checkVisibility())")
    assert not page.run("document.querySelector('[role=tablist]').checkVisibility()")


def test_a_mistake_in_the_page_would_be_noticed(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<p>x</p><script>console.error('y'); nothing()</script>", encoding="utf-8")
    page.open(broken, width=800)
    found = len(page.complaints)
    page.complaints.clear()
    assert found == 2
