"""The notebooks run from top to bottom, on a tiny model; their stored output is from a real run."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from calmix.files import cache_dir
from tests.tiny import longer, tiny_gguf

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


@pytest.mark.real
@pytest.mark.long  # a minute of processor time, and tests/compress has all it does
@pytest.mark.parametrize(
    ("name", "more", "made"),
    [
        ("compress", {"SUITE": "smoke"}, "no-corpus/card.html"),
        ("compare-sets", {"ROWS": 8, "LENGTH": 64, "LEAKAGE": "off"}, "own-set/manifest.json"),
    ],
)
def test_notebook_runs(name, more, made, tmp_path, tiny_folder, monkeypatch):
    """Each runs in its own folder."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "assets").symlink_to(cache_dir() / "assets")
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    model = longer(tiny_folder, tmp_path / "model")
    if name == "compress":  # it needs the layout of a GGUF file
        model = tiny_gguf(tmp_path / "model.gguf", context=4096)
    monkeypatch.setenv("CALMIX_NOTEBOOK_MODEL", str(model))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for key, value in more.items():
        monkeypatch.setenv(f"CALMIX_NOTEBOOK_{key}", str(value))
    book = nbformat.read(BOOKS / f"{name}.ipynb", 4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
    assert all(outputs(book)[1:])
    assert (tmp_path / "out" / made).is_file()


@pytest.mark.parametrize("path", sorted(BOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_output_has_no_local_paths(path):
    cells = outputs(nbformat.read(path, 4))
    assert all(cells[1:]), "executed once, with the builtin model"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 60_000
    for word in ("/tmp", "/root", "/home", "site-packages", "Traceback", "\\u001b"):
        assert word not in text
