"""`doctor`: whether an installation works, a result is what it was, and what comes with calmix."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from calmix import assets
from calmix.cli.common import line, note, print_json, progress_bar, writing_on
from calmix.cli.tables import print_rows
from calmix.cli.verbs import group, verb
from calmix.errors import AssetError, InputError
from calmix.files import cache_dir
from calmix.options import Json, option, path_option

if TYPE_CHECKING:
    from calmix.diagnostics.inspecting import Health
    from calmix.pruning.report import LayerReport

WORST = 5  # layers that are named
WARNINGS = 10  # that are printed one by one


class InspectOptions(Json):
    """What `doctor inspect` can be asked for."""

    path: Path = option(..., "A result of calmix.", argument=True, metavar="OUT")
    layers: bool = option(False, "One row for every layer.")
    plot: Path | None = option(None, "Draw sparsity and error to a .png or .svg.")


class RerunOptions(Json):
    """What `doctor rerun` can be asked for."""

    manifest: Path = option(
        ..., "A checkpoint's calmix.json, a set's manifest.json.", argument=True
    )
    output: Path | None = path_option("Keep the new one here.", default=None)
    trust_remote_code: bool = option(False, "Run modelling code shipped with the model.")


class AssetOptions(Json):
    """What `doctor assets` can be asked for."""

    names: tuple[str, ...] = option((), "Archives; all that are needed.", argument=True)
    install: bool = option(False, "Fetch them into the cache.")
    verify: bool = option(False, "Check hashes; exit code 2 if one is bad.")
    path: bool = option(False, "Print where one lies.")


def register(app: typer.Typer, panel: str) -> None:
    """Add the verbs to the command line."""
    doctor = group(app, "doctor", "Check the installation; inspect or re-run a result.", "check",
                   panel)  # fmt: skip
    verb(doctor, "check")(check)
    verb(doctor, "inspect")(inspect)
    verb(doctor, "rerun")(rerun)
    verb(doctor, "models")(models)
    verb(doctor, "methods")(methods)
    verb(doctor, "assets")(archives)


def check(options: Json) -> None:
    """Check this installation and machine; exit code 0 if pruning works."""
    from calmix.diagnostics.doctor import examine, works

    with progress_bar() as bar:
        task = bar.add_task("looking", total=None)
        checks = examine(tick=lambda name: bar.update(task, description=f"looking at {name}"))
    fine = works(checks)
    if options.as_json:
        print_json({"works": fine, "checks": [asdict(one) for one in checks]})
    else:
        rows = [{"what": one.name, "state": one.state, "found": one.found} for one in checks]
        print_rows(rows, as_json=False, text=["found"], least=[])
        for one in checks:
            if one.advice is not None:
                line(f"{one.name}: {one.advice}")
        line("pruning works" if fine else "pruning does not work")
    if not fine:
        sys.exit(2)


def inspect(options: InspectOptions) -> None:
    """Check a result against its manifest and summarise it.

    Exit code 2 if a file is missing, damaged or changed.
    """
    from calmix.diagnostics.inspecting import inspect as look
    from calmix.diagnostics.plotting import check_plot, plot

    if options.plot is not None:
        check_plot(options.plot, options.path)
    with progress_bar() as bar:
        task = bar.add_task("checking", total=None)
        health = look(
            options.path, tick=lambda name: bar.update(task, description=f"checked {name}")
        )
    if options.as_json:
        print_json(health.to_json())
    else:
        _print_health(health, each=options.layers)
    if health.problems:
        more = f" (and {len(health.problems) - 1} more)" if health.problems[1:] else ""
        raise InputError(f"{health.problems[0]}{more}: make it again")
    if options.plot is not None:
        plot(health, options.plot)
        if not options.as_json:
            line(f"drawn to {options.plot}")


def rerun(options: RerunOptions) -> None:
    """Make a result again from its manifest and compare hashes; exit code 2 if they differ.

    Relative paths in the manifest are relative to the current folder.
    """
    from calmix.diagnostics.rerunning import rerun as again

    manifest, output = options.manifest, options.output
    beside = (manifest if manifest.is_dir() else manifest.parent).resolve().parent
    place = beside if os.access(beside, os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(dir=place, prefix=".calmix-rerun-")
        if output is None
        else contextlib.nullcontext(str(output.parent)) as folder,
        progress_bar() as bar,
    ):
        task = bar.add_task("making it again", total=None)
        result = again(
            manifest,
            Path(folder) / "again" if output is None else output,
            trust_remote_code=options.trust_remote_code,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            writing=writing_on(bar),
            note=note,
        )
    if options.as_json:
        print_json(result.to_json() | {"output": None if output is None else str(output)})
    else:
        for told in result.inputs:
            line(f"changed since: {told}")
        if result.same:
            line("the same: every file has the hash of the manifest")
    if not result.same:
        why = result.inputs[0] if result.inputs else "though all inputs are the same"
        raise InputError(f"not the same: {', '.join(result.differing)} ({why})")


def _print_health(health: Health, *, each: bool) -> None:
    line(f"{health.path}: {health.kind}")
    for name, value in health.facts.items():
        line(f"  {name}: {f'{value:,}' if isinstance(value, int) else value}")
    if health.layers:
        print_rows(_each(health.layers) if each else _by_kind(health.layers), as_json=False)
        measured = [layer for layer in health.layers if layer.error is not None]
        worst = sorted(measured, key=lambda layer: -(layer.error or 0))[:WORST]
        if worst and not each:
            named = ", ".join(f"{layer.name} {layer.error:.1%}" for layer in worst)
            line(f"largest reconstruction errors: {named}")
    for warning in health.warnings[:WARNINGS]:
        line(f"warning: {warning}")
    if len(health.warnings) > WARNINGS:
        line(f"and {len(health.warnings) - WARNINGS} more warnings (--json has them all)")
    for problem in health.problems:
        line(f"problem: {problem}")
    if not health.problems:
        fine = "every file matches its manifest" if health.hashed else "nothing missing or damaged"
        line(f"intact: {fine}")


def _each(layers: list[LayerReport]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer.name,
            "sparsity": f"{layer.sparsity:.2%}",
            "error": "" if layer.error is None else f"{layer.error:.2%}",
            "damping": "" if layer.damping is None else f"{layer.damping:g}",
            "dead": layer.dead_inputs,
        }
        for layer in layers
    ]


def _by_kind(layers: list[LayerReport]) -> list[dict[str, Any]]:
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)
    return [
        {
            "layer": kind,
            "blocks": len(held),
            "sparsity": _range([100 * layer.sparsity for layer in held]),
            "error": _range([100 * la.error for la in held if la.error is not None]),
            "damping": max((f"{la.damping:g}" for la in held if la.damping is not None),
                           key=float, default=""),
            "dead inputs": sum(layer.dead_inputs for layer in held),
        }
        for kind, held in kinds.items()
    ]  # fmt: skip


def _range(values: list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}%" if low == high else f"{low}-{high}%"


def models(options: Json) -> None:
    """List the builtin models."""
    from calmix.models import builtin_models
    from calmix.sources.licences import use_of

    rows = [
        {
            "name": f"builtin:{model.name}",
            "parameters": model.parameters,
            "licence": model.licence,
            "use": use_of(model.licence),
            "from": model.origin,
            "assets": list(model.parts) if options.as_json else _states(list(model.parts)),
            "description": model.description,
        }
        for model in builtin_models().values()
    ]
    if options.as_json:
        print_json(rows)
        return
    below = ("from", "description")
    print_rows(
        [{k: v for k, v in row.items() if k not in below} for row in rows],
        as_json=False, text=["licence", "assets"], least=["parameters", "assets"],
    )  # fmt: skip
    for row in rows:
        line(f"{row['name']}: {row['description']}; from {row['from']}")


def _states(names: list[str]) -> str:
    """Return assets in a cell: the first, how many more, and in which states they are."""
    states = ", ".join(sorted({assets.get_asset(name).state for name in names}))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} ({states})"


def methods(options: Json) -> None:
    """List the pruning methods, other packages' too, with their options and papers."""
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
    print_rows(rows, as_json=options.as_json, text=["options", "paper"], least=["paper", "needs"])


def archives(options: AssetOptions) -> None:
    """List, fetch or check the data archives in the cache."""
    names = list(options.names) or assets.needed()
    states = {name: assets.get_asset(name).state for name in names}
    if options.install:
        for name in names:
            line(f"{name}: {assets.install(name)}")
    elif options.path:
        for name, state in states.items():
            if state != "ok":
                advice = f"run 'calmix doctor assets {name} --install'"
                raise AssetError(f"asset {name} is {state}: {advice}")
            line(str(assets.get_asset(name).path))
    elif options.verify:
        if options.as_json:
            print_json({"cache": str(cache_dir()), "assets": states})
        else:
            for name, state in states.items():
                line(f"{name}: {state}")
        if bad := [name for name, state in states.items() if state != "ok"]:
            raise AssetError(
                f"missing or damaged: {', '.join(bad)}; run 'calmix doctor assets --install'"
            )
    else:
        rows = [
            {
                "name": asset.name,
                "package": f"{asset.distribution} {asset.version}",
                "size": f"{asset.size / 1e6:.0f} MB",
                "state": asset.state,
                "licence": asset.licence,
                "purpose": asset.purpose,
            }
            for asset in assets.assets().values()
            if not options.names or asset.name in options.names
        ]
        print_rows(rows, as_json=options.as_json, text=["package", "licence", "purpose"],
                   least=["package", "licence"])  # fmt: skip
