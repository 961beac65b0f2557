"""What `pip install calmix` brings: all that the package imports, but for three extras."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import write_text_file

ROOT = Path(__file__).parents[1]
EXTRAS = {"nncf": "export", "ray": "ray", "reasoning_gym": "reasoning"}
BROUGHT = {"triton"}  # by PyTorch's wheels for GPUs; where it is missing there is another way


def imported(path: Path) -> set[str]:
    """Return the top-level names a file imports anywhere, relative imports left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"calmix"}


def test_all_that_is_imported_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {Requirement(line).name.lower() for line in project["dependencies"]}
    brought = [Requirement(line) for name in required for line in requires(name) or ()]
    required |= {one.name.lower() for one in brought if not one.marker or one.marker.evaluate()}
    homes = packages_distributions()
    names = {name for path in (ROOT / "calmix").rglob("*.py") for name in imported(path)}
    assert {"torch", "lm_eval", "datasets", "pyarrow", *EXTRAS} <= names
    for name in sorted(names - set(EXTRAS) - BROUGHT):
        known = {home.lower() for home in homes.get(name, [name])}
        assert known & required, f"{name} is imported, and no dependency brings it"
    assert set(project["optional-dependencies"]) >= set(EXTRAS.values())


SUITE = """
name: short
version: 1
description: short items, for a model of a small context
dimensions:
  general:
    lambada:
      {archive: lambada/bpb, form: answer, metric: bits_per_byte, shots: 0, limit: 4, quick: 4}
"""
SMOKE = """
import sys
from pathlib import Path
import calmix
from calmix.cli import app
assert calmix.__file__.startswith(sys.argv[2]), calmix.__file__
for arguments in (
    ["evaluate", "suite", "smoke"], ["calibrate", "sources"], ["doctor", "models"],
    ["compress", sys.argv[1], "-o", "all", "--effort", "quick", "--calibration", sys.argv[3],
     "--suite", sys.argv[4]],  # prune, recover, evaluate, answer and report
    ["doctor", "inspect", "all/model"],
):
    assert not app(arguments, standalone_mode=False), arguments
assert "<style>" in Path("all/card.html").read_text(encoding="utf-8")
"""


@pytest.mark.real
def test_a_wheel_holds_all_that_it_takes(tmp_path: Path, tiny_folder: Path) -> None:
    """Built from the files of the package, unpacked elsewhere, and used from there."""
    source, site = tmp_path / "source", tmp_path / "site"
    kept = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "calmix", source / "calmix", ignore=kept)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("calmix-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    text, suite = write_text_file(tmp_path / "text.txt"), tmp_path / "short.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", SMOKE, tiny_folder, str(site), text, suite],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
