"""What `pip install calmix` brings: all that the package imports, but for four extras."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

from tests.test_rooms import imports

ROOT = Path(__file__).parents[1]
EXTRAS = {"llama_cpp": "llama", "nncf": "export", "ray": "ray", "reasoning_gym": "reasoning"}


def test_all_that_is_imported_is_required():
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


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    source, ignored = tmp_path / "source", shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "calmix", source / "calmix", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps"]
    built = subprocess.run(
        [*pip, "--no-build-isolation", "-w", tmp_path, source], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("calmix-*.whl")
    held = {path.relative_to(source).as_posix() for path in (source / "calmix").rglob("*.*")}
    with zipfile.ZipFile(wheel) as archive:
        assert held <= set(archive.namelist())
