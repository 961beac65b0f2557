"""Progress: one line whose share never falls, in a terminal, a notebook or a file."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from calmix import progress
from calmix.progress import Progress


@pytest.fixture
def drawn(monkeypatch):
    """What a terminal would draw: text, share and time left."""
    made = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress, "_terminal", lambda: (lambda *what: made.append(what), list))
    return made


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still."""
    made = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: made[0])
    return made


def test_a_share_is_unknown_at_0_of_0_and_never_falls_when_the_total_grows(drawn):
    with Progress() as bar:
        show = bar.of("scoring")
        show(0, 0)
        for done, total in ((0, 10), (10, 10), (10, 30), (20, 30), (30, 30)):
            show(done, total)
        each = bar.each("drawing")
        each("news")
    shares = [share for _, share, _ in drawn]
    assert shares[0] is None
    assert shares[-1] is None
    known = shares[1:-1]
    assert known == sorted(known)
    assert known[0] == 0
    assert drawn[-1][0] == "drawing news"


def test_the_time_left_of_a_resumed_run_is_from_its_own_pace(drawn, now):
    with Progress() as bar:
        show = bar.of("pruning blocks")
        show(20, 30)
        now[0] += 60
        show(21, 30)
    assert [told for *_, told in drawn] == ["", "9 min left"]


def test_stages_are_one_line_and_show_the_work_inside(drawn, now):
    with Progress(["draw", "prune", "evaluate"]) as bar:
        bar.show("estimating", None)
        bar.expect({"draw": 10.0, "prune": 60.0, "evaluate": 30.0})
        bar.begin("draw")
        now[0] += 20  # twice what was expected
        bar.begin("prune")
        with Progress() as inner:
            show = inner.of("pruning blocks")
            show(0, 4)
            now[0] += 60
            show(2, 4)
    texts = [text for text, _, _ in drawn]
    assert texts[0] == "estimating"
    assert set(texts[1:]) == {"1/3 draw", "2/3 prune", "2/3 prune: pruning blocks"}
    assert drawn[1][2] == "2 min left"
    assert drawn[-1][1] == pytest.approx(0.4)
    assert drawn[-1][2] == "2 min left"  # 30 s and 30 s, twice
    assert Progress._over is None


def test_skipped_stages_do_not_count_until_the_run_returns_to_them(drawn, now):
    names = ["score", "6 bits", "5 bits", "4 bits", "3 bits"]
    with Progress(names) as bar:
        bar.expect(dict.fromkeys(names, 1000.0))
        for name in ("score", "4 bits", "6 bits", "5 bits"):
            bar.begin(name)
            now[0] += 1000
    assert [text for text, _, _ in drawn] == [
        "1/5 score", "4/5 4 bits", "2/5 6 bits", "3/5 5 bits"
    ]  # fmt: skip
    assert [told for *_, told in drawn] == [
        "83 min left", "33 min left", "50 min left", "33 min left"
    ]  # fmt: skip
    shares = [share for _, share, _ in drawn]
    assert shares == sorted(shares)


def test_a_stage_that_takes_longer_than_expected_never_stands_still(drawn, now):
    with Progress(["prune", "evaluate"]) as bar:
        bar.begin("prune")
        assert drawn == [("1/2 prune", None, "")]  # without an estimate
        bar.expect({"prune": 10.0, "evaluate": 10.0})
        for _ in range(8):
            now[0] += 5
            bar.part("a text of the block that is now pruned, and more")
    shares = [share for _, share, _ in drawn[1:]]
    assert all(a < b < 0.5 for a, b in pairwise(shares))
    assert drawn[-1][0] == "1/2 prune: a text of the block that is..."


def test_the_bar_pulses_again_when_the_share_is_unknown(monkeypatch):
    monkeypatch.setattr(Progress, "console", Console(file=io.StringIO()))
    totals = []
    monkeypatch.setattr("rich.progress.Progress.update",
                        lambda bar, *_, **__: totals.append(bar.tasks[0].total))  # fmt: skip
    draw, end = progress._terminal()
    for share in (None, 0.5, None):
        draw("x", share, "")
    end()
    assert totals == [None, 1.0, None]


def test_without_a_terminal_a_line_is_printed_now_and_then(capsys, now):
    with Progress() as bar:
        show = bar.of("scoring m")
        for done in range(9):
            show(done, 10)
            now[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "scoring m, 30%, 70 s left", "scoring m, 60%, 40 s left",
    ]  # fmt: skip
    with Progress(shown=False) as bar:
        now[0] += 100
        bar.of("x")(1, 2)
    assert not capsys.readouterr().err


def test_a_notebook_shows_it_in_its_cell(monkeypatch):
    cells = []

    class ZMQInteractiveShell:
        pass

    class Cell:
        def update(self, data, raw):
            cells.append(data)

    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: Cell())
    with Progress() as bar:
        bar.of("scoring <m>")(1, 4)
    assert cells[0]["text/html"].startswith("scoring &lt;m&gt; <progress value='0.250'>")
    assert cells[-1] == {"text/plain": ""}
