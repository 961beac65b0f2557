"""`python -m tests.lowest`: print the lower end of every dependency's range, as pip constraints."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

# What checks the code and the tests need not be old.
NEW = ("hypothesis", "mutmut", "mypy", "pytest", "ruff", "types")


def constraints(text: str) -> list[str]:
    """Return `name==lowest` for every range in a pyproject.toml.

    Raises:
        ValueError: a dependency without a lower end.
    """
    project = tomllib.loads(text)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lowest = {}
    for entry in (entry for group in groups for entry in group):
        name, _, rest = re.match(r"([\w.-]+)(\[[\w,]+\])?(.*)", entry).groups()  # type: ignore[union-attr]
        if name == "calmix" or name.split("-")[0] in NEW:
            continue
        bound = re.search(r">=([\d.]+)", rest)
        if bound is None:
            raise ValueError(f"{entry} has no lower end")
        lowest[name] = bound[1]
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


if __name__ == "__main__":
    print("\n".join(constraints(Path("pyproject.toml").read_text(encoding="utf-8"))))
