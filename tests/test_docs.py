"""The docs: commands parse, links resolve, walkthroughs run."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import calmix
from calmix.pruning.methods import METHODS
from calmix.study.spec import StudyFile
from tests.cli.test_mistakes import COMMANDS
from tests.tiny import tiny_ids, tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs" / "walks").iterdir()),
]
SAID = [page for page in PAGES if "lab" not in page.parts and page.name != "CHANGELOG.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def lines_to_type(page):
    """Yield the commands of indented lines and of code in a line, continued ones whole."""
    text = re.sub(r" *\\\n *", " ", page.read_text(encoding="utf-8"))
    start = " {4}" if page.suffix == ".md" else ""
    yield from re.findall(rf"^{start}(?:\$ )?(calmix [a-z].*)$", text, re.MULTILINE)
    yield from re.findall(r"`(calmix [a-z][^`]* --?[a-z][^`]*)`", text)


@pytest.mark.parametrize("page", SAID, ids=lambda page: page.name)
def test_commands_in_docs_parse(page):
    for said in lines_to_type(page):
        if "..." in said:
            continue
        words = shlex.split(said.partition(" && ")[0], comments=True)[1:]
        words = [word for word in words if not word.startswith("${SUITE")]
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), "")
        inputs = words[len(name.split()) :]
        if not name:
            group = words.pop(0)
            assert group in ("calibrate", "evaluate", "doctor", "study"), said
            default = {"calibrate": "draw", "evaluate": "run", "doctor": "check"}[group]
            name, inputs = f"{group} {default}", words
        known = {flag for one in COMMANDS[name].params for flag in one.opts} | {"--help"}
        flags = {word.partition("=")[0] for word in inputs if re.match(r"--?[a-zA-Z]", word)}
        assert flags <= known, (said, flags - known)


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".md"], ids=lambda p: p.name)
def test_links_resolve(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link) or not path:
            continue
        target = page.parent / path
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            plain = (re.sub(r"[^\w -]", "", head).strip().lower() for head in heads)
            assert anchor in {head.replace(" ", "-") for head in plain}, link


def test_every_benchmark_is_in_the_index():
    index = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == set(re.findall(r"\b(\w+\.py)\b", index)) - {"page.py"}
    assert len(scripts) <= 25


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "studies"])
def test_scripts_import_names_that_exist(folder):
    for script in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calmix"):
                module = importlib.import_module(node.module)
                for one in node.names:
                    if not hasattr(module, one.name):
                        importlib.import_module(f"{node.module}.{one.name}")


def test_version_and_repository_are_stated_once():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"', project, re.MULTILINE)
    source = re.search(r'^Source = "(.*)"', project, re.MULTILINE)
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    others = [*PAGES, ROOT / "CITATION.cff", ROOT / "mkdocs.yml", *ROOT.glob("docs/**/*.ipynb")]
    assert [path for path in others if source[1] in path.read_text(encoding="utf-8")] == []


def test_method_of_the_docs_prunes(monkeypatch):
    monkeypatch.setattr("calmix.pruning.methods.METHODS", dict(METHODS))
    page = (ROOT / "docs" / "tasks" / "add-method.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    exec(compile(code, "my_method.py", "exec"), {"__name__": "my_method"})
    how = {"method": "rooted", "pattern": 0.5, "power": 0.7}
    report = calmix.prune(tiny_model("llama"), tiny_ids(4, 16), **how)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("page", ["studies.md", "tasks/compare-sets.md", "walks/two-sets.sh"])
def test_studies_in_docs_are_valid(page):
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    matches = re.findall(r"^name: .*?(?=^```|^END)", text, re.DOTALL | re.MULTILINE)
    assert matches
    for one in matches:
        StudyFile.model_validate(yaml.safe_load(one))


@pytest.mark.real
@pytest.mark.long  # minutes each: the builtin model
@pytest.mark.parametrize("name", ["first-card", "own-chats", "two-sets"])
def test_walkthrough_runs(name, tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "calmix"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m calmix "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    path = {"PYTHONPATH": str(ROOT), "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run(
        [ROOT / "docs" / "walks" / f"{name}.sh", tmp_path / "walk"],
        env=os.environ | path | ({"SUITE": "smoke"} if name == "two-sets" else {}),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    reached = "take " if name == "two-sets" else "small/model.gguf"
    assert reached in ended.stdout, ended.stdout
    assert "arrived after" in ended.stdout.splitlines()[-1]


def test_results_pages_match_their_script(monkeypatch):
    """No number of the pages, or of README's chart, is typed by hand; both are short."""
    for folder in ("docs", "studies"):
        monkeypatch.syspath_prepend(ROOT / folder)
    page, readme = map(importlib.import_module, ("page", "readme"))
    assert readme.CHART.read_text(encoding="utf-8") == readme.chart()
    pages = page.pages()
    assert {path: path.read_text(encoding="utf-8") for path in pages} == pages
    assert pages[ROOT / "docs" / "results.md"].count("\n") <= 90
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 110
