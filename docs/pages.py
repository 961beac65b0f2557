"""Write the reference pages of the site into the folder named: `make docs` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

import calmix
from calmix.cli.root import VERBS, app


def helps(group: Any, ctx: Any) -> str:
    """Return the whole help of a group's commands, hidden options too."""
    found = []
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        own = typer.Context(command, info_name=name, parent=ctx)
        for one in command.params:
            one.hidden = False
        level = "##" if ctx.parent is None else "###"
        found.append(f"{level} {own.command_path}\n\n```text\n{command.get_help(own)}\n```\n")
        if hasattr(command, "commands"):
            found.append(helps(command, own))
    return "\n".join(found)


def main(folder: Path) -> None:
    """Write `cli.md` and `api.md`."""
    root = typer.main.get_command(app)
    ctx = typer.Context(root, info_name="calmix", max_content_width=100, terminal_width=100)
    listed = "\n".join(f"- [`{name}`](#calmix-{name}): {text}" for name, (_, text) in VERBS.items())
    page = f"# Command line\n\n{listed}\n\n{helps(root, ctx)}"
    (folder / "cli.md").write_text(page, encoding="utf-8")
    names = (f"::: {home}.{name}" for name, home in sorted(calmix._HOMES.items()))
    (folder / "api.md").write_text("\n\n".join(["# Python", *names]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
