"""The report's files: complete, self-contained, safe, small and reproducible."""

import re

import pytest

from calmix.options import Settings
from calmix.study.analyse import analyse
from calmix.study.page import pages
from tests.synthetic import Plan, study, trial

QUICK = Settings(resamples=50)


@pytest.fixture
def page(whole):
    return (whole / "report.html").read_text(encoding="utf-8")


def page_of(results, **settings):
    return pages(results, analyse(results, QUICK.model_copy(update=settings)))["report.html"]


def test_page_is_self_contained(page):
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


ODD = {
    "of one set": Plan(sources=("a",), seeds=(0,), dimensions=("math",)),
    "of few sets": Plan(sources=("a", "b", "c"), seeds=(0,), dimensions=("general", "math")),
    "without values": (
        *(
            trial(f"s{n}", "single", "sparsegpt", "60%", seed, {"general": 0.5, "math": None})
            for n in range(5)
            for seed in (0, 1)
        ),
        trial("none", "none", "magnitude", "2:4", 0, {"general": 0.1, "math": None}),
    ),
    "below nothing": tuple(
        trial(f"s{n}", "single", "wanda", "2:4", 0, {"general": 0.1, "code": -0.2 - n / 10})
        for n in range(2)
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_unusual_studies(odd):
    result = ODD[odd]
    page = page_of(study(result) if isinstance(result, Plan) else study(Plan(), trials=result))
    assert "nothing" in page or "tied" in page or "keeps the most" in page
    assert "Ranking by total, " in page
    assert "nan" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL).lower().split()
    assert (odd == "without values") == ("Magnitude 2:4" in page)
    assert (odd == "below nothing") == bool(re.findall(r">−20\.0[ <]", page))  # with a minus
    assert re.findall(r">-\d", page) == []
