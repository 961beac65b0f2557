"""Imports point down the floors of docs/architecture.md, those inside functions too."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def floors():
    """Return the floor of every room and root module by name, as the page's table has them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    rows = [re.findall(r"`([\w.]+)/?`", row) for row in reversed(table)]
    return {name.removesuffix(".py"): floor for floor, row in enumerate(rows) for name in row}


def imports(path):
    """Yield line and name of what of calmix a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            here = node.module == "calmix"
            yield from (
                (node.lineno, f"calmix.{one.name}" if here else str(node.module))
                for one in node.names
            )


def test_imports_point_down():
    known, climbing = floors(), []
    for path in (ROOT / "calmix").rglob("*.py"):
        own = path.relative_to(ROOT / "calmix").with_suffix("").parts[0]
        if own in ("__init__", "__main__"):  # the public API and the command line, looked up late
            continue
        for line, name in imports(path):
            package, _, rest = name.partition(".")
            if package == "calmix" and rest and known[rest.split(".")[0]] > known[own]:
                climbing.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not climbing
