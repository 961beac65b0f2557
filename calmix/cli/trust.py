"""`doctor`, `inspect` and `rerun`: whether what is here can be relied on."""

from __future__ import annotations

import sys
from dataclasses import asdict

import typer

from calmix.cli.common import AsJson, out, print_json, print_rows, progress_bar


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("doctor")(doctor)


def doctor(as_json: AsJson = False) -> None:
    """Check this installation and machine, and say what to do about what is missing.

    Exit code 0 if pruning works.
    """
    from calmix.trust.doctor import examine, works

    with progress_bar() as bar:
        task = bar.add_task("looking", total=None)
        checks = examine(tick=lambda name: bar.update(task, description=f"looking at {name}"))
    fine = works(checks)
    if as_json:
        print_json({"works": fine, "checks": [asdict(check) for check in checks]})
    else:
        print_rows(
            [{"what": c.name, "state": c.state, "found": c.found} for c in checks], as_json=False
        )
        for check in checks:
            if check.advice is not None:
                out.print(f"{check.name}: {check.advice}", soft_wrap=True, highlight=False)
        out.print("pruning works" if fine else "pruning does not work", highlight=False)
    if not fine:
        sys.exit(2)
