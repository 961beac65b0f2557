"""The notebooks run from top to bottom, on a tiny model; what is kept in them is a real run's."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from calmix.files import cache_dir
from calmix.report.card import read_card
from tests.tiny import longer

ROOT = Path(__file__).parents[1]
BOOKS = ROOT / "docs" / "notebooks"


def outputs(book):
    """Return the text that each code cell leaves."""
    return [
        "".join(
            part.get("text", "") or part.get("data", {}).get("text/markdown", "")
            for part in cell.outputs
        )
        for cell in book.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture
def ran(tmp_path, tiny_folder, monkeypatch):
    """Run a notebook in a folder of its own and return what its code cells leave."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "assets").symlink_to(cache_dir() / "assets")
    settings = {
        "CALMIX_CACHE": tmp_path / "cache",
        "CALMIX_NOTEBOOK_MODEL": longer(tiny_folder, tmp_path / "model"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": ROOT,
    }

    def run(name, **more):
        for key, value in {**settings, **more}.items():
            monkeypatch.setenv(key, str(value))
        book = nbformat.read(BOOKS / name, 4)
        where = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
        return outputs(book)

    return run


@pytest.mark.real
@pytest.mark.long  # a minute of processor time, and tests/compress has all it does
def test_a_model_compressed_on_its_own_text(ran, tmp_path):
    told = ran("compress.ipynb", CALMIX_NOTEBOOK_SUITE="smoke")
    card = read_card(tmp_path / "out" / "no-corpus")
    assert {source.licence for source in card.sources} == {"written by the model"}
    assert sum(source.rows for source in card.sources) == 32
    assert card.pruned / card.weights == pytest.approx(0.6, abs=0.001)
    assert "$ calmix calibrate self-written" in told[1]
    assert "| commonsense |" in told[2]
    assert "pruned:" in told[3]


@pytest.mark.real
@pytest.mark.long  # a quarter of a minute, most of it a kernel's imports
def test_two_sets_compared_and_a_mix_built(ran, tmp_path):
    told = ran(
        "compare-sets.ipynb",
        CALMIX_NOTEBOOK_ROWS=8,
        CALMIX_NOTEBOOK_LENGTH=64,
        CALMIX_NOTEBOOK_LEAKAGE="off",
    )
    table = {line[:12].strip(): line[12:].split() for line in told[2].splitlines()}
    assert table[""][-1] == "total"
    for name in ("code alone", "mix"):
        assert len(table[name]) == 5
        assert all(0 < float(value) < 5 for value in table[name])
    assert (tmp_path / "out" / "own-set" / "manifest.json").is_file()
    assert "'out/mine.txt': 2" in told[3]


@pytest.mark.parametrize("path", sorted(BOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_is_kept_is_a_run_elsewhere_than_here(path):
    told = outputs(nbformat.read(path, 4))
    assert all(told[1:]), "executed once, with the builtin model"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 60_000
    for word in ("/tmp", "/root", "/home", "site-packages", "Traceback", "\\u001b"):
        assert word not in text
