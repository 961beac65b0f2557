"""Imports follow the layers of docs/architecture.md, inside functions too, and every imported
package is a declared dependency."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = {"libggml": "ggml", "ray": "ray", "reasoning_gym": "reasoning"}


def floors():
    """Return the floor of every room and root module by name, as the page's table has them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    rows = [re.findall(r"`([\w.]+)/?`", row) for row in reversed(table)]
    return {name.removesuffix(".py"): floor for floor, row in enumerate(rows) for name in row}


@functools.cache
def imports(path):
    """Return line and name of what a file imports anywhere."""
    results = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            results += [(node.lineno, one.name) for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [str(node.module)]
            if node.module == "calmix":
                names = [f"calmix.{one.name}" for one in node.names]
            results += [(node.lineno, name) for name in names]
    return results


def test_imports_follow_the_layers():
    """Down, and not across, but for helpers."""
    known, climbing = floors(), []
    for path in (ROOT / "calmix").rglob("*.py"):
        own = path.relative_to(ROOT / "calmix").with_suffix("").parts[0]
        if own in ("__init__", "__main__"):  # the public API and the command line, looked up late
            continue
        for line, name in imports(path):
            package, _, rest = name.partition(".")
            room = rest.split(".")[0]
            if package != "calmix" or room in ("", own) or known[own] == known[room] == 0:
                continue
            if known[room] >= known[own]:
                climbing.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not climbing


def test_constants_have_one_name_and_one_meaning():
    homes = {}
    for path in (ROOT / "calmix").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            targets = [part for one in targets for part in getattr(one, "elts", [one])]
            names = [one.id for one in targets if isinstance(one, ast.Name) and len(one.id) > 1]
            for name in filter(str.isupper, names):
                homes.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_architecture_page_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = ROOT / "calmix", ROOT / "tests"
    files = [f"/{path.relative_to(ROOT)}" for room in rooms for path in room.rglob("*.py")]
    names = set(re.findall(r"`([\w/]+\.py)", page))
    assert not {name for name in names if not any(one.endswith(f"/{name}") for one in files)}


def test_imports_are_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {Requirement(line).name.lower() for line in project["dependencies"]}
    brought = [Requirement(line) for name in required for line in requires(name) or ()]
    required |= {one.name.lower() for one in brought if not one.marker or one.marker.evaluate()}
    homes = packages_distributions()
    files = (ROOT / "calmix").rglob("*.py")
    names = {name.partition(".")[0] for path in files for _, name in imports(path)}
    names -= {*sys.stdlib_module_names, "calmix"}
    assert {"torch", "datasets", "pyarrow", *EXTRAS} <= names
    for name in sorted(names - set(EXTRAS)):
        known = {home.lower() for home in homes.get(name, [name])}
        assert known & required, f"{name} is imported, and no dependency brings it"
    assert set(project["optional-dependencies"]) >= set(EXTRAS.values())


def test_wheel_contains_all_files(tmp_path):
    source, ignored = tmp_path / "source", shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "calmix", source / "calmix", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"  # as pip asks
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("calmix-*.whl")
    stored = {path.relative_to(source).as_posix() for path in (source / "calmix").rglob("*.*")}
    with zipfile.ZipFile(wheel) as archive:
        assert stored <= set(archive.namelist())
