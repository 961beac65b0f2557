"""The report's files: complete, self-contained, safe, small and reproducible."""

import re

from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.page import pages
from tests.synthetic import Plan, study, trial

QUICK = Settings(resamples=50)


def page_of(results, **settings):
    return pages(results, analyse(results, QUICK.model_copy(update=settings)))["report.html"]


def test_page_is_self_contained(whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert len(page) < 3_000_000
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp", page)
    opened = []
    shown = re.sub(r"(?s)(<style>).*?(</style>)|(<script>).*?(</script>)", r"\1\2\3\4", page)
    for end, tag, closed in re.findall(r"<(/?)(\w+)[^>]*?(/?)>", shown):
        if end:
            assert opened.pop() == tag
        elif not closed and tag not in ("meta", "link", "br"):
            opened.append(tag)
    assert not opened
    ids = re.findall(r'<[^>]* id="([^"]+)"', page)
    assert len({*ids}) == len(ids)
    used = re.findall(r'(?:href="#|url\(#|aria-controls=")([\w.-]+)', page)
    used += " ".join(re.findall(r'aria-labelledby="([^"]+)"', page)).split()
    assert {*used} <= {*ids}


def test_text_is_escaped():
    evil = "<script>alert('x')</script> $\\frac{1}{2}$ & \"quotes\" 漢字"
    shares = {"general": 0.5, evil: 0.4}
    trials = tuple(
        trial(f"{name}{evil}", "single", "sparsegpt", "60%", 0, shares, model=evil)
        for name in "abcde"
    )
    page = page_of(study(Plan(), trials=trials, name=evil, text=evil), default=f"a{evil}")
    assert page.count("<script>") == 1
    assert "<script>alert" not in page
    assert "<!--" not in page
    assert "&lt;script&gt;" in page
