"""Progress: one line whose share never falls, in a terminal, a notebook or a file."""

from unittest.mock import Mock

import pytest

from calmix import progress
from calmix.progress import Progress


@pytest.fixture
def drawn(monkeypatch):
    """What a terminal would draw: text, share and time left."""
    created = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress, "_terminal", lambda: (lambda *what: created.append(what), list))
    return created


@pytest.fixture
def now(monkeypatch):
    """A stopped clock."""
    result = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: result[0])
    return result


def test_progress_share(drawn):
    with Progress() as bar:
        show = bar.of("scoring")
        for done, total in ((0, 0), (0, 10), (10, 10), (10, 30), (20, 30), (30, 30)):
            show(done, total)
        bar.each("drawing")("news")
    first, *shares = [share for text, share, _ in drawn if text == "scoring"]
    assert first is None
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert drawn[-1] == ("drawing news", None, "")


def test_stage_lines(drawn, now):
    """The time left is that of the work inside, from its own pace."""
    with Progress(3) as bar:
        bar.begin("draw")
        now[0] += 20
        bar.begin("prune")
        for _ in range(2):  # the second is work of its own
            with Progress() as inner:
                show = inner.of("pruning blocks")
                show(0, 4)
                now[0] += 60
                show(2, 4)
            bar.begin("recover")
    assert drawn[:7] == [
        ("1/3 draw", None, ""),
        ("2/3 prune", None, ""),
        ("2/3 prune: pruning blocks", 0.0, ""),
        ("2/3 prune: pruning blocks", 0.5, "60 s left"),
        ("3/3 recover", None, ""),
        ("3/3 recover: pruning blocks", 0.0, ""),
        ("3/3 recover: pruning blocks", 0.5, "60 s left"),
    ]
    assert Progress._over is None


def test_progress_without_a_terminal(capsys, now):
    with Progress() as bar:
        show = bar.of("scoring m")
        for done in range(9):
            show(done, 10)
            now[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "scoring m, 30%, 70 s left",
        "scoring m, 60%, 40 s left",
    ]
    with Progress(shown=False) as bar:
        now[0] += 100
        bar.of("x")(1, 2)
    assert not capsys.readouterr().err


def test_progress_in_a_notebook(monkeypatch):
    cell = Mock()
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr("builtins.get_ipython", shell, raising=False)
    monkeypatch.setattr("IPython.display.display", Mock(return_value=cell))
    with Progress() as bar:
        bar.of("scoring <m>")(1, 4)
    first, last = (call.args[0] for call in cell.update.call_args_list)
    assert first["text/html"].startswith("scoring &lt;m&gt; <progress value='0.250'>")
    assert last == {"text/plain": ""}
